"""What more ranks of this machine give: training steps of the same share a rank, on 1, 2 and 4 of them.

With GPUs each rank has one, over NCCL. Else ranks are processes on the CPU with one thread each, over gloo; beyond the
cores that the machine has, a rate then says nothing of the program: bytes and waits do.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from cpsp_dist.bench.batches import AUDIO, CATEGORIES
from cpsp_dist.bench.profiled import gpu_figures
from cpsp_dist.bench.ranks import launch
from cpsp_dist.bench.step import random_batch
from cpsp_dist.config import Config
from cpsp_dist.data.batch import Batch
from cpsp_dist.distributed.process_group import Ranks, barrier
from cpsp_dist.losses.global_batch import GlobalBatch
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.models import build_model
from cpsp_dist.training.engine import build_engine
from cpsp_dist.utils.errors import UserError

RANKS = (1, 2, 4)


def bench_scaling(*, batch: int = 64, ranks: Sequence[int] | None = None, rounds: int = 5) -> dict[str, Any]:
    """Measure with `batch` videos a rank.

    ranks: numbers of ranks; by default RANKS, on a machine with GPUs those for which it has enough.

    Returns:
        device: a GPU's name, or CPU; cores; ranks: for each number of them `samples_per_second` over all ranks,
        `efficiency` (of that number times the first one's rate), `step_ms`, `waited_ms` for the pool's collectives,
        `pool_bytes` and `gradient_bytes` that a rank receives in a step; on GPUs also what `gpu_figures` gives.

    Raises:
        UserError: more ranks than GPUs.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = ranks or [world for world in RANKS if not gpus or world <= gpus]
    if gpus and max(ranks) > gpus:
        count = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        raise UserError(
            f"--ranks {max(ranks)}: here is {count}, one for each rank; CUDA_VISIBLE_DEVICES='' measures on the CPU"
        )
    rows = {world: launch(measure_steps, world, batch, rounds, device="cuda" if gpus else "cpu") for world in ranks}
    first = rows[ranks[0]]["samples_per_second"] / ranks[0]
    for world, row in rows.items():
        row["efficiency"] = row["samples_per_second"] / (first * world)
    device, cores = torch.cuda.get_device_name(0) if gpus else "CPU", len(os.sched_getaffinity(0))
    return {"device": device, "batch": batch, "rounds": rounds, "cores": cores, "ranks": rows}


def measure_steps(ranks: Ranks, size: int, rounds: int) -> dict[str, float]:
    """A row of `bench_scaling`, on this rank."""
    torch.manual_seed(0)
    network = build_model("psp", visual_channels=512, audio_channels=AUDIO, categories=CATEGORIES)
    gradients = sum(p.nbytes for p in network.parameters())
    train = {"global_batch": size * ranks.world, "precision": "fp32"}
    config = Config.model_validate({"data": {"shards": "-"}, "engine": {"kind": "ddp"}, "train": train})
    engine, objectives = build_engine(network, config, ranks), Objectives(config.objectives, pool="gather")
    engine.module.train()
    batch = rank_batch(size, ranks)
    labels, gpu = labels_of(batch, ranks), ranks.device.type == "cuda"
    if gpu:
        batch = Batch(**{name: x.pin_memory() for name, x in vars(batch).items()})

    def step() -> None:
        prepared, moved = objectives.prepare(labels), batch.to(ranks.device)
        engine.backward(objectives(engine(moved), moved, prepared)[0])
        engine.step(1e-3)

    times, waits = [], []
    for number in range(rounds + 2):
        barrier()
        began = time.perf_counter()
        step()
        if gpu:
            torch.cuda.synchronize(ranks.device)
        barrier()
        if number > 1:  # two rounds warm up
            times.append(time.perf_counter() - began)
            waits.append(objectives.traffic.milliseconds())
    ms = 1e3 * statistics.median(times)
    return {
        "samples_per_second": size * ranks.world / statistics.median(times),
        "step_ms": ms,
        "waited_ms": statistics.median(waits),
        "pool_bytes": objectives.traffic.bytes,
        # An all-reduce sends and receives each byte twice, but for a rank's own part.
        "gradient_bytes": round(2 * gradients * (ranks.world - 1) / ranks.world),
        **(gpu_figures(step, ms) if gpu else {}),
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
