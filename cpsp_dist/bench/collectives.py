"""The collectives of one training step on two ranks, under each engine.

Every collective of a process group is an operator of c10d, whoever starts it: also those that DDP's reducer starts in
C++. A dispatch mode sees them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cpsp_dist.bench.ranks import launch
from cpsp_dist.bench.scaling import labels_of, rank_batch
from cpsp_dist.bench.step import AUDIO, CATEGORIES
from cpsp_dist.config import Config
from cpsp_dist.distributed.process_group import Ranks, all_reduce_max
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.models import build_model
from cpsp_dist.training.engine import build_engine

#: (engine.kind, engine.zero)
ENGINES = (("ddp", 0), *(("deepspeed", stage) for stage in range(4)))
WORLD, CHANNELS = 2, 512
#: DDP knows its buckets and DeepSpeed's stage 3 its parameters' order after two.
WARM_UP = 2


class Collective(NamedTuple):
    """name: of c10d, as 'allreduce_'; bytes: of the tensors that this rank passes in."""

    name: str
    bytes: int


class CountCollectives(TorchDispatchMode):
    """As a context: `found` lists the collectives that this thread, and autograd for it, started inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            # (outputs, inputs, …), or (tensors in place, …)
            passed = args[1] if len(args) > 1 and isinstance(args[1], Tensor | list) else args[0]
            size = sum(tensor.nbytes for tensor in _tensors(passed))
            self.found.append(Collective(func._overloadpacket.__name__, size))
        return func(*args, **(kwargs or {}))


def bench_collectives(*, batch: int = 8) -> dict[str, Any]:
    """Count with `batch` videos a rank.

    Returns:
        batch, ranks; gradient_bytes: of the network's parameters; engines: for each, by the operation's name, `calls`
        and `bytes` in one optimizer step of rank 0, the pool's and the stop flag's included.
    """
    found = launch(count_engines, WORLD, batch)
    return {"batch": batch, "ranks": WORLD, **found}


def count_engines(ranks: Ranks, size: int, engines: Sequence[tuple[str, int]] = ENGINES) -> dict[str, Any]:
    """What `bench_collectives` returns, on each rank of a group that is connected."""
    counted = {}
    for kind, stage in engines:
        network = psp()
        gradient_bytes = sum(parameter.nbytes for parameter in network.parameters())
        steps = count_steps(network, kind, stage, ranks, size)
        counted["ddp" if kind == "ddp" else f"ZeRO {stage}"] = by_name(steps[-1])
    return {"gradient_bytes": gradient_bytes, "engines": counted}


def psp() -> nn.Module:
    """The same on every rank, at the published sizes."""
    torch.manual_seed(0)
    return build_model("psp", visual_channels=CHANNELS, audio_channels=AUDIO, categories=CATEGORIES)


def count_steps(network: nn.Module, kind: str, stage: int, ranks: Ranks, size: int) -> list[list[Collective]]:
    """The collectives of each of `WARM_UP` + 1 steps, in the order in which they were started."""
    described = {"data": {"shards": "-"}, "engine": {"kind": kind, "zero": stage}}
    config = Config.model_validate(described | {"train": {"global_batch": size * ranks.world, "precision": "fp32"}})
    engine, objectives = build_engine(network, config, ranks), Objectives(config.objectives, pool="gather")
    engine.module.train()
    batch = rank_batch(size, ranks)
    steps = []
    for _ in range(WARM_UP + 1):
        with CountCollectives() as counted:
            prepared = objectives.prepare(labels_of(batch, ranks))
            engine.backward(objectives(engine(batch), batch, prepared)[0])
            engine.step(1e-3)
            all_reduce_max(0, ranks.device)  # the flag by which all ranks stop
        steps.append(counted.found)
    engine.close()
    return steps


def by_name(collectives: Sequence[Collective]) -> dict[str, dict[str, int]]:
    """`calls` and `bytes` for each name."""
    return {
        name: {"calls": len(sizes), "bytes": sum(sizes)}
        for name in sorted({each.name for each in collectives})
        if (sizes := [each.bytes for each in collectives if each.name == name])
    }


def _tensors(passed: Any) -> Iterator[Tensor]:
    if isinstance(passed, Tensor):
        yield passed
    elif isinstance(passed, list):
        for part in passed:
            yield from _tensors(part)
