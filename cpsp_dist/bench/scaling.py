"""What more ranks of this machine give: training steps of the same share a rank, on 1, 2 and 4 of them.

Ranks are processes on the CPU with one thread each, over gloo. Beyond the cores that the machine has, a rate says
nothing of the program: bytes and waits do.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from cpsp_dist.bench.pool import launch
from cpsp_dist.bench.step import AUDIO, CATEGORIES, random_batch
from cpsp_dist.config import Config
from cpsp_dist.data.batch import Batch
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.losses.global_batch import GlobalBatch
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.models import build_model
from cpsp_dist.training.engine import build_engine


def bench_scaling(*, batch: int = 64, ranks: Sequence[int] = (1, 2, 4), rounds: int = 5) -> dict[str, Any]:
    """Measure with `batch` videos a rank.

    Returns:
        cores; ranks: for each number of them `samples_per_second` over all ranks, `efficiency` (of that number times
        the first one's rate), `step_ms`, `waited_ms` for the pool's collectives, `pool_bytes` and `gradient_bytes` that
        a rank receives in a step.
    """
    rows = {world: launch(_steps, world, batch, rounds) for world in ranks}
    first = rows[ranks[0]]["samples_per_second"] / ranks[0]
    for world, row in rows.items():
        row["efficiency"] = row["samples_per_second"] / (first * world)
    return {"batch": batch, "rounds": rounds, "cores": len(os.sched_getaffinity(0)), "ranks": rows}


def _steps(ranks: Ranks, size: int, rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    network = build_model("psp", visual_channels=512, audio_channels=AUDIO, categories=CATEGORIES)
    described = {"data": {"shards": "-"}, "engine": {"kind": "ddp"}, "train": {"global_batch": size * ranks.world}}
    config = Config.model_validate(described)
    engine, objectives = build_engine(network, config, ranks), Objectives(config.objectives, pool="gather")
    engine.module.train()
    batch = rank_batch(size, ranks)
    labels = labels_of(batch, ranks)
    times, waits = [], []
    for number in range(rounds + 2):
        dist.barrier()
        began = time.perf_counter()
        prepared = objectives.prepare(labels)
        engine.backward(objectives(engine(batch), batch, prepared)[0])
        engine.step(1e-3)
        dist.barrier()
        if number > 1:  # two rounds warm up
            times.append(time.perf_counter() - began)
            waits.append(objectives.traffic.milliseconds())
    gradients = sum(p.nbytes for p in network.parameters())
    return {
        "samples_per_second": size * ranks.world / statistics.median(times),
        "step_ms": 1e3 * statistics.median(times),
        "waited_ms": statistics.median(waits),
        "pool_bytes": objectives.traffic.bytes,
        # An all-reduce sends and receives each byte twice, but for a rank's own part.
        "gradient_bytes": round(2 * gradients * (ranks.world - 1) / ranks.world),
    }


def rank_batch(size: int, ranks: Ranks) -> Batch:
    """The same `size` videos on each rank, with ids of their own."""
    batch = random_batch(size, 512)
    batch.video = batch.video + ranks.rank * size
    return batch


def labels_of(batch: Batch, ranks: Ranks) -> GlobalBatch:
    """Of the global batch in which `batch` is this rank's share."""
    every = torch.ones(len(batch.video) * ranks.world, dtype=torch.bool)
    category, video = batch.category.repeat(ranks.world), torch.arange(len(every))
    return GlobalBatch(every, category, video, every.clone(), ranks.rank, ranks.world)
