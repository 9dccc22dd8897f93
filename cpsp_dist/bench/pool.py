"""What the pool costs: bytes and collectives of a step, memory kept for the backward pass, and time.

Ranks are processes of this machine, one thread each, over gloo. Steps are those of PSP at the published sizes, with the
pool off, local and gathered in turn within a round, so that other programs slow down all alike; figures are medians
over rounds. Pools larger than the ranks of one machine can fill are simulated: the rows are there, nobody sends them.
Their times, and the share of a step, are CPU time of the one thread, which other processes of the machine hardly
lengthen; for the share, the step and the pool are timed in turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cpsp_dist.bench.batches import AUDIO, CATEGORIES, SEGMENTS, VISUAL, WIDTH, random_batch
from cpsp_dist.bench.large_pools import measure_parts, measure_tiles
from cpsp_dist.bench.ranks import launch
from cpsp_dist.config import Config, ObjectiveSettings
from cpsp_dist.data.batch import Batch
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.losses.global_batch import Rows
from cpsp_dist.losses.mining import mine
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.losses.psa_v import psa_v
from cpsp_dist.models import Output, build_model
from cpsp_dist.training.engine import build_engine

#: The pool whose share of a training step is reported.
SHARE_OF = 4096
#: N × N matrices beyond this many rows do not fit a laptop.
REPLICATED_LIMIT = 4096


def bench_pool(
    *,
    batch: int = 64,
    ranks: Sequence[int] = (1, 2, 4),
    pools: Sequence[int] = (64, 256, 1024, 4096, 16384, 65536),
    rounds: int = 5,
) -> dict[str, Any]:
    """Measure with `batch` videos a rank.

    Returns:
        ranks: for each number of them `floor_bytes` ((W−1)·b·d·4: what one rank has to receive of the others'
        embeddings, one way), `bytes` and `collectives` of a step (forward and backward), `wire_bytes` that a process
        really wrote (None where the system does not report it), `gather_ms` waited, `step_ms` and `step_cpu_ms` (of one
        rank) with the pool off, local, gathered. pools: for each size CPU `ms` of mining, loss and backward, `floor_ms`
        of the bare product of anchors and pool, and `saved_bytes` for the backward pass. tiles, parts: see
        `large_pools`. share: what mining, loss and
        backward over a pool of 4,096 are of a training step's CPU time (`least` and `most` over the rounds), and
        `floor_share`, what the bare product is. With one rank among `ranks` only.
    """
    found: dict[str, Any] = {"batch": batch, "width": WIDTH, "rounds": rounds, "ranks": {}}
    found["ranks"] = {world: launch(_steps, world, batch, rounds) for world in ranks}
    found["pools"] = launch(_simulate, 1, batch, rounds, list(pools))
    found["tiles"] = launch(measure_tiles, 1, batch, list(pools))
    found["parts"] = launch(measure_parts, 1, batch, rounds)
    if 1 in found["ranks"]:
        found["share"] = found["ranks"][1].pop("share")
    return found


def bench_tiles(batch: int, pools: Sequence[int]) -> dict[str, Any]:
    """What `tiles` of `bench_pool` has, alone: pools of hundreds of thousands take minutes."""
    return launch(measure_tiles, 1, batch, list(pools))


def _steps(ranks: Ranks, size: int, rounds: int) -> dict[str, Any]:
    """Complete training steps, and what the gathered pool sends."""
    model = build_model("psp", visual_channels=VISUAL, audio_channels=AUDIO, categories=CATEGORIES)
    train = {"global_batch": size * ranks.world, "optimizer": "sgd", "precision": "fp32"}
    described = {"data": {"shards": "-"}, "engine": {"kind": "ddp"}, "train": train}
    engine = build_engine(model, Config.model_validate(described), ranks)
    batch = random_batch(size, ranks.rank)
    kinds = {
        "off": Objectives(ObjectiveSettings(psa_v=0.0), pool="gather"),
        "local": Objectives(ObjectiveSettings(), pool="local"),
        "gather": Objectives(ObjectiveSettings(), pool="gather"),
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    cpu: dict[str, list[float]] = {kind: [] for kind in kinds}
    waits, beside = [], []
    for number in range(rounds + 1):
        for kind, objectives in kinds.items():
            dist.barrier()
            began, cpu_began = time.perf_counter(), time.process_time()
            engine.backward(objectives(engine(batch), batch)[0])
            engine.step(0.0)
            if number:  # the first round warms up
                times[kind].append(1e3 * (time.perf_counter() - began))
                cpu[kind].append(1e3 * (time.process_time() - cpu_began))
                waits += [objectives.traffic.milliseconds()] if kind == "gather" else []
        if ranks.world == 1 and number:
            beside.append(_beside(cpu["off"][-1], size))
    return {
        "floor_bytes": (ranks.world - 1) * size * WIDTH * 4,
        **_sent(ranks, batch),
        "gather_ms": statistics.median(waits),
        "step_ms": {kind: statistics.median(each) for kind, each in times.items()},
        "step_cpu_ms": {kind: statistics.median(each) for kind, each in cpu.items()},
        **({"share": _share(beside)} if beside else {}),
    }


def _beside(step_ms: float, anchors: int) -> dict[str, float]:
    """The share of a step that has just taken `step_ms` CPU milliseconds, were its pool one of `SHARE_OF` rows."""
    found = _simulated(SHARE_OF, min(anchors, SHARE_OF), rounds=2)
    return {name: found[key] / (step_ms + found[key]) for name, key in (("share", "ms"), ("floor_share", "floor_ms"))}


def _share(rounds: list[dict[str, float]]) -> dict[str, float]:
    shares = [each["share"] for each in rounds]
    floor = statistics.median(each["floor_share"] for each in rounds)
    median = statistics.median(shares)
    return {"pool": SHARE_OF, "share": median, "least": min(shares), "most": max(shares), "floor_share": floor}


def _sent(ranks: Ranks, batch: Batch) -> dict[str, int | None]:
    """Collectives and bytes of the pool alone: without a network, nothing else is sent."""
    only = ObjectiveSettings(event=0.0, category=0.0, avps=0.0, psa_s=0.0)
    objectives = Objectives(only, pool="gather")
    size = len(batch)
    for _ in range(2):  # connections are made in the first
        fusion = torch.randn(size, SEGMENTS, WIDTH, requires_grad=True)
        rest = torch.zeros(size, SEGMENTS, requires_grad=True)
        dist.barrier()
        before = _written()
        objectives(Output(rest, rest, None, fusion, fusion, fusion, rest, None), batch)[0].backward()
        after = _written()
    wire = None if before is None or after is None else after - before
    return {"bytes": objectives.traffic.bytes, "collectives": objectives.traffic.collectives, "wire_bytes": wire}


def _written() -> int | None:
    """Bytes that this process has written so far, to sockets too; None where the system does not report it."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return int(dict(line.split(": ") for line in lines)["wchar"])


def _simulate(ranks: Ranks, size: int, rounds: int, pools: Sequence[int]) -> dict[str, Any]:
    """Pools that this machine's ranks cannot fill, in a process set up as one that trains."""
    return {str(n): _simulated(n, min(size, n), rounds) | _kept(n, min(size, n)) for n in pools}


def _simulated(count: int, anchors: int, rounds: int) -> dict[str, float]:
    """CPU milliseconds of mining, loss and backward, and of the bare product, in turn; medians."""
    pool = _random_pool(count)
    ways = {"ms": _two_stage, "floor_ms": _product}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(2 * rounds + 1):
        for name, way in ways.items():
            began = time.process_time()
            loss = way(pool, anchors)
            if loss.requires_grad:
                loss.backward()
                pool.rows.grad = None
            if number:
                times[name].append(1e3 * (time.process_time() - began))
    return {name: statistics.median(each) for name, each in times.items()}


def _kept(count: int, anchors: int) -> dict[str, dict[str, int | None]]:
    """Bytes that each way keeps for the backward pass."""
    pool = _random_pool(count)
    return {
        "saved_bytes": {
            "two_stage": _saved(_two_stage, pool, anchors),
            "full_matrix": _saved(_full_matrix, pool, anchors),
            "replicated": _saved(_full_matrix, pool, count) if count <= REPLICATED_LIMIT else None,
        }
    }


def _random_pool(count: int) -> Rows:
    g = torch.Generator().manual_seed(count)
    rows = torch.rand(count, WIDTH, generator=g).requires_grad_()
    return Rows(rows, torch.randint(0, CATEGORIES, (count,), generator=g), torch.arange(count))


def _two_stage(pool: Rows, anchors: int) -> Tensor:
    """Ours: mining without gradient, then the mined pairs."""
    own = torch.arange(anchors)
    mined = mine(pool.rows[:anchors], own, *pool, 3)
    return psa_v(pool.rows[:anchors], pool.rows, mined, 0.2).sum()


@torch.no_grad()
def _product(pool: Rows, anchors: int) -> Tensor:
    """The floor of anything exact: each anchor with each row, once."""
    return (pool.rows[:anchors] @ pool.rows.t())[0, 0]


def _full_matrix(pool: Rows, anchors: int) -> Tensor:
    """The plain way: all distances with gradient (with all rows as anchors: on every rank, everybody's)."""
    x, y = pool.rows[:anchors], pool.rows
    squares = x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.t()
    distance = squares.clamp(min=1e-12).sqrt()
    same = pool.category[:anchors].unsqueeze(1) == pool.category
    k = min(3, len(pool.rows))
    hardest = torch.where(same, distance, -torch.inf).amax(1)
    nearest = torch.where(same, 1e12, distance).topk(k, largest=False).values.mean(1)
    return torch.relu(hardest - nearest + 0.2).sum()


def _saved(way: Callable[[Rows, int], Tensor], pool: Rows, anchors: int) -> int:
    """Bytes kept for the backward pass, each storage once, the pool's own rows not counted."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() != pool.rows.untyped_storage().data_ptr():
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = way(pool, anchors)  # holds the graph, so that no storage is freed and its address used again
    assert loss.requires_grad
    return sum(kept.values())
