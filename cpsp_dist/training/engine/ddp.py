"""Plain torch: DistributedDataParallel; any precision, float64 included."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cpsp_dist.config import Config
from cpsp_dist.data.batch import Batch
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.models import Output
from cpsp_dist.training.engine.base import (
    ADAM_MOMENTS,
    PRECISIONS,
    TrainingState,
    adam_step,
    build_optimizer,
    propagate_nonfinite,
)
from cpsp_dist.training.engine.compiled import release_network


class DDPEngine:
    """Weights and optimizer state are complete on every rank."""

    def __init__(self, model: nn.Module, config: Config, ranks: Ranks, state: TrainingState | None):
        self.module, self.config, self.ranks = model, config, ranks
        self.optimizer = build_optimizer(config, model.parameters())
        if state is not None and state.moments:
            for name, parameter in model.named_parameters():
                self.optimizer.state[parameter] = {"step": adam_step(state.updates, parameter.device)} | {
                    moment: tensors[name].to(parameter) for moment, tensors in state.moments.items()
                }
        self.updates = state.updates if state else 0
        self.dtype = PRECISIONS[config.train.precision]
        ids = [ranks.device] if ranks.device.type == "cuda" else None
        self.wrapped: Any = model
        if ranks.world > 1:
            # find_unused_parameters keeps DDP from sorting its buckets anew after a first step: sums over three and
            # more ranks would then round differently in a run that was interrupted.
            self.wrapped = nn.parallel.DistributedDataParallel(model, device_ids=ids, find_unused_parameters=True)
        self.micro_batch = 0

    def __call__(self, batch: Batch) -> Output:
        features = torch.float64 if self.dtype == torch.float64 else torch.float32
        batch = batch.to(self.ranks.device, features)
        cast = self.dtype == torch.bfloat16
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=cast), self._sync():
            output: Output = self.wrapped(batch.visual, batch.audio)
            return output

    def _sync(self) -> Any:
        last = self.micro_batch == self.config.train.accumulation - 1
        return nullcontext() if last or self.wrapped is self.module else self.wrapped.no_sync()

    def backward(self, loss: Tensor) -> None:
        with self._sync():
            (propagate_nonfinite(loss) / self.config.train.accumulation).backward()

    def step(self, learning_rate: float) -> float:
        self.micro_batch += 1
        if self.micro_batch < self.config.train.accumulation:
            return float("nan")
        self.micro_batch = 0
        limit = self.config.train.grad_clip_norm
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), float("inf") if limit is None else limit)
        grad_norm = float(norm)  # read once: the host waits for the GPU here
        if math.isfinite(grad_norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
            self.updates += 1
        self.optimizer.zero_grad()
        return grad_norm

    def capture(self) -> TrainingState:
        named = list(self.module.named_parameters())
        moments: dict[str, dict[str, Tensor]] = {}
        if self.config.train.optimizer == "adam" and self.updates:
            moments = {m: {n: self.optimizer.state[p][m].cpu().clone() for n, p in named} for m in ADAM_MOMENTS}
        return TrainingState({n: p.detach().cpu().clone() for n, p in named}, moments, self.updates)

    def close(self) -> None:
        self.wrapped = self.module
        release_network(self.module)
