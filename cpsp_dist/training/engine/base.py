"""What all engines share: their interface, the training state, and a bare model on each rank."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from cpsp_dist.config import Config
from cpsp_dist.data.batch import Batch
from cpsp_dist.models import Output

#: Adam's state by torch's own names; SGD without momentum has none.
ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass
class TrainingState:
    """Weights and optimizer state, complete, on the CPU, float32 (float64 for fp64 runs), by parameter name."""

    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # {'exp_avg': {name: tensor}, …}
    updates: int = 0  # optimizer steps taken, as Adam counts them
    objectives: dict[str, Tensor] = field(default_factory=dict)  # what they remember: `Objectives.state`


class Forward(Protocol):
    """What an evaluation needs: a model that takes batches."""

    module: nn.Module

    def __call__(self, batch: Batch) -> Output: ...


class Engine(Forward, Protocol):
    """A wrapped model. Every call below is made by all ranks together."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch's `loss`, averaged over ranks once the last one of a global batch is in.

        A loss that is not finite makes all of them not finite, on every rank."""

    def step(self, learning_rate: float) -> float:
        """Close a micro-batch; after the last one of a global batch clip, update and return the gradient norm before
        clipping, else return nan. Where that norm, the same on every rank, is not finite, nothing was updated."""

    def capture(self) -> TrainingState:
        """The complete state, on every rank."""

    def close(self) -> None:
        """Give up what keeps the model in memory; the engine is not used any more."""


def propagate_nonfinite(loss: Tensor) -> Tensor:
    """`loss`, bit for bit; or, where it is not finite, with a gradient of nan in all parameters that it depends on.

    An infinite loss can have a finite gradient, on this rank alone; so every rank's norm shows it."""
    return loss * (1 + 0 * loss.detach())


def build_optimizer(config: Config, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    """On a GPU fused: one kernel for all parameters."""
    trained = [*parameters]
    kind = torch.optim.Adam if config.train.optimizer == "adam" else torch.optim.SGD
    return kind(trained, lr=config.train.learning_rate, fused=trained[0].device.type == "cuda" or None)


def adam_step(updates: int, device: torch.device) -> Tensor:
    """Adam's count of updates as it keeps it for parameters of `device`: the fused one of a GPU reads it there."""
    return torch.tensor(float(updates), device=device if device.type == "cuda" else None)


class PlainModel:
    """A bare copy of a model on each rank, in one dtype and without an optimizer."""

    def __init__(
        self, model: nn.Module, weights: dict[str, Tensor], device: torch.device, dtype: torch.dtype = torch.float32
    ):
        self.module, self.device, self.dtype = model.to(device, dtype), device, dtype
        self.module.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()})

    def __call__(self, batch: Batch) -> Output:
        batch = batch.to(self.device, self.dtype)
        output: Output = self.module(batch.visual, batch.audio)
        return output


def tune_cpu() -> None:
    """Keep freed memory in the process: fresh 64 MB tensors otherwise fault in page by page at every step, which costs
    a third of the speed on a CPU. Only where glibc is at hand and the user did not decide."""
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, 1 << 30)
