"""A real training on the simulated GPU, as rank 0 of 2, and what each of its steps did there.

The collectives and DDP's wrapper are stand-ins that act as if the other rank had the same rows, of other videos.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from cpsp_dist.config import load_config
from cpsp_dist.data.reader import ring
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.metrics import reported
from cpsp_dist.training import trainer
from tests.support.runs import KEYPAD
from tests.support.simulated_device import CUDA, GpuTensor, Record, SimulatedGpu
from tests.support.simulated_gpu import simulated_gpu
from tests.support.simulated_graph import accumulator

WORLD = 2
#: DeepSpeed's timer starts, and ZeRO 3 learns its parameters' order.
WARM_UP = 2
STEPS_EACH = 3
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@dataclass
class SimulatedStep:
    """One optimizer step. collectives: Python's, by name; the gradients' own are not among them."""

    record: Record
    collectives: dict[str, int]
    mining: str  # the way in which the video-level objective chose its pairs


@dataclass
class SimulatedRun:
    steps: list[SimulatedStep]
    micro_batches: int  # of a step

    @property
    def step(self) -> SimulatedStep:
        """The third of four: DeepSpeed's timer starts, and ZeRO 3 knows its parameters' order; the last one saves."""
        return self.steps[2]

    def syncs_per_micro_batch(self, step: SimulatedStep | None = None) -> float:
        return len((step or self.step).record.syncs) / self.micro_batches

    def report(self, step: SimulatedStep | None = None) -> str:
        step = step or self.step
        lines = [f"host syncs per micro-batch: {self.syncs_per_micro_batch(step):g}"]
        lines += [f"  {sync.what}: {sync.where}" for sync in step.record.syncs]
        kernels = sum(step.record.kernels.values())
        return "\n".join([*lines, f"kernels: {kernels}, collectives: {step.collectives}"])


class _Work:
    def wait(self) -> bool:
        return True


def _held(x: torch.Tensor) -> torch.Tensor:
    return x.held if isinstance(x, GpuTensor) else x


class _Collectives:
    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()

    def _done(self, name: str, asynchronous: bool) -> _Work | None:
        self.counts[name] += 1
        assert SimulatedGpu.current is not None
        SimulatedGpu.current.kernel(f"nccl.{name}")
        return _Work() if asynchronous else None

    def all_gather_into_tensor(
        self, output_tensor: Any, input_tensor: Any, group: Any = None, async_op: bool = False
    ) -> Any:
        parts = [_held(input_tensor).clone() for _ in range(WORLD)]
        if input_tensor.dtype == torch.int64 and input_tensor.dim() == 2:  # labels: the other rank has other videos
            parts[1][:, 2] += 1_000_000
        _held(output_tensor).copy_(torch.cat(parts).view(output_tensor.shape))
        return self._done("all_gather_into_tensor", async_op)

    def reduce_scatter_tensor(
        self, output: Any, input: Any, op: Any = None, group: Any = None, async_op: bool = False
    ) -> Any:
        assert input.numel() == WORLD * output.numel()
        _held(output).copy_(WORLD * _held(input).reshape(WORLD, *output.shape)[0])  # the other rank's are the same
        return self._done("reduce_scatter_tensor", async_op)

    def all_reduce(self, tensor: Any, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        if op == dist.ReduceOp.SUM:
            _held(tensor).mul_(WORLD)
        return self._done("all_reduce", async_op)

    def broadcast(self, tensor: Any, src: Any = None, group: Any = None, async_op: bool = False, **_: Any) -> Any:
        return self._done("broadcast", async_op)

    def replaced(self) -> dict[str, Any]:
        return {
            "get_backend": lambda *_, **__: "nccl",
            "barrier": lambda *_, **__: None,
            "broadcast": self.broadcast,
            "all_gather_object": lambda values, value: values.__setitem__(slice(None), [value] * WORLD),
            "all_gather_into_tensor": self.all_gather_into_tensor,
            "reduce_scatter_tensor": self.reduce_scatter_tensor,
            "all_reduce": self.all_reduce,
        }


class _Wrapper(torch.nn.Module):
    """For DistributedDataParallel, whose reducer is C++ and has no simulated device."""

    def __init__(self, module: torch.nn.Module, **_: Any) -> None:
        super().__init__()
        self.module = module
        self.accumulators = [accumulator(p) for p in module.parameters()]

    def forward(self, *args: Any) -> Any:
        return self.module(*args)

    def no_sync(self) -> Any:
        return contextlib.nullcontext()


def _forget_backend() -> None:
    """DeepSpeed's, which keeps some of torch's functions as it found them when it was made: those of an earlier
    simulation, whose counts they would go to, or of none."""
    if (module := sys.modules.get("deepspeed.comm.comm")) is not None:
        assert hasattr(module, "cdb"), "DeepSpeed keeps its backend elsewhere"
        vars(module).update(cdb=None)


@contextlib.contextmanager
def simulated_ranks() -> Iterator[collections.Counter[str]]:
    """This process is rank 0 of 2, by torch's own stand-in for a group of ranks, which DeepSpeed can make further
    groups of. Counts Python's collectives by name."""
    collectives = _Collectives()
    with contextlib.ExitStack() as stack:
        _forget_backend()
        stack.callback(_forget_backend)
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
        stack.callback(dist.destroy_process_group)
        stack.enter_context(mock.patch.dict("os.environ", LOCAL_RANK="0", RANK="0", WORLD_SIZE=str(WORLD), **ADDRESS))
        for name, value in collectives.replaced().items():
            stack.enter_context(mock.patch.object(dist, name, value))
        stack.enter_context(mock.patch("torch.nn.parallel.DistributedDataParallel", _Wrapper))
        yield collectives.counts


def _find_as_one_rank(config: Any, manifest: Any, ranks: Ranks, *more: Any) -> Any:
    """The ranks agree on a checkpoint through pickled objects, which is not of interest here."""
    config, state, progress = trainer_find(config, manifest, replace(ranks, world=1), *more)
    return config, state, replace(progress, world=ranks.world)


trainer_find = trainer.load_latest_checkpoint
build_engine = trainer.build_engine


def _build_engine(*given: Any) -> Any:
    """What takes gradients by now, and is held by the engine, belongs to the stream on which it was made."""
    engine = build_engine(*given)
    for parameter in engine.module.parameters():
        accumulator(parameter).metadata["of another stream"] = True
    return engine


def simulate_training(
    shards: Path,
    output: Path,
    *settings: str,
    evaluation: bool = False,
    saving: bool = True,
    minings: Sequence[str] = (),
) -> SimulatedRun:
    """Train 4 steps, save unless asked not to, and evaluate where asked to.

    minings: train `WARM_UP` steps, and then `STEPS_EACH` with each of these instead, on one engine, without logging.

    Raises:
        RuntimeError: an operand on another device.
    """
    count = WARM_UP + STEPS_EACH * len(minings) if minings else 4
    small = ["tracking.enabled=false", f"train.steps={count}", f"train.global_batch={6 if minings else 12}"]
    small += ["tracking.every_steps=100", "data.reader_threads=1"]
    small += [] if any(setting.startswith("engine.zero") for setting in settings) else ["engine.kind=ddp"]
    config = load_config(KEYPAD, [f"data.shards={shards}", f"output={output}", *small, *settings])
    steps = list[SimulatedStep]()
    run = SimulatedRun(steps, config.train.accumulation)
    stop_if_requested = trainer.Trainer.stop_if_requested

    def end_of_step(self: Any, stop_signal: int) -> None:
        stop_if_requested(self, stop_signal)
        machine = SimulatedGpu.current
        assert machine is not None
        mining = self.objectives.terms["psa_v"].settings.mining
        steps.append(SimulatedStep(machine.record, dict(collectives), mining))
        machine.record = Record()
        collectives.clear()
        done = len(steps) - WARM_UP
        if done >= 0 and done % STEPS_EACH == 0 and done // STEPS_EACH < len(minings):
            _mine_by(self.objectives, minings[done // STEPS_EACH])

    gc.collect()  # an engine of a training that failed waits for the GPU when it goes: not in this one's record
    with contextlib.ExitStack() as stack:
        collectives = stack.enter_context(simulated_ranks())
        stack.enter_context(mock.patch.object(trainer.Trainer, "stop_if_requested", end_of_step))
        stack.enter_context(mock.patch.object(trainer, "load_latest_checkpoint", _find_as_one_rank))
        stack.enter_context(mock.patch.object(trainer, "build_engine", _build_engine))
        if not evaluation:
            stack.enter_context(mock.patch.object(trainer, "evaluate", return_value=dict.fromkeys(reported(), 0.0)))
            stack.enter_context(mock.patch.object(trainer, "evaluate_best", return_value={}))
        if minings:
            stack.enter_context(mock.patch.object(trainer.Trainer, "log_step"))
        if not saving:
            stack.enter_context(mock.patch.object(trainer.Trainer, "_save"))
        machine = stack.enter_context(simulated_gpu())
        stack.enter_context(mock.patch.object(ring.Slot, "__init__", _pinned_slots(machine)))
        trainer.train(config, Ranks(0, WORLD, 0, CUDA))
    return run


def _mine_by(objectives: Objectives, mining: str) -> None:
    term: Any = objectives.terms["psa_v"]
    objectives.terms["psa_v"] = type(term)(replace(term.settings, mining=mining), term.context)


def _pinned_slots(machine: SimulatedGpu) -> Any:
    real = ring.Slot.__init__

    def init(self: Any, fields: Any, size: int, pin: bool) -> None:
        real(self, fields, size, False)
        self.pin = pin
        for tensor in (*self.arrays.values(), *vars(self.batch()).values()) if pin else ():
            machine.pin(tensor)

    return init
