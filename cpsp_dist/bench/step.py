"""How fast a training step is on this machine, against what the machine multiplies and against the published way.

All ways are measured in turn within each round, so that a machine's moods hit all of them; figures are medians over
rounds. A step is forward, losses, backward, clipping and Adam, on one process, from a batch in memory as shards hold
it; `end_to_end` is a training loop that reads from shards.
"""

from __future__ import annotations

import copy
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from cpsp_dist.bench.loader import noise_shards
from cpsp_dist.bench.profiled import gpu_figures
from cpsp_dist.bench.published import published_forward, published_loss
from cpsp_dist.config import Config
from cpsp_dist.config.schema import TrainSettings
from cpsp_dist.data.batch import Batch
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.losses.global_batch import GlobalBatch
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.models import build_model
from cpsp_dist.models.psp import PSP
from cpsp_dist.training.engine import build_engine, set_numerics
from cpsp_dist.training.feed import BatchFeed
from cpsp_dist.training.setup import open_train_stream
from cpsp_dist.training.step import StepRunner

SEGMENTS, AUDIO, CATEGORIES = 10, 128, 28
#: Rows and columns of the matrices by which the machine's rate is measured.
MATRIX = 2048


class Variant(NamedTuple):
    whose: str  # ours or published
    precision: str
    compile: str = "none"  # as `engine.compile`


WAYS = {
    "ours fp32": Variant("ours", "fp32"),
    "ours fp32, graphs": Variant("ours", "fp32", "graphs"),
    "published network, fp32": Variant("published", "fp32"),
    "ours bf16": Variant("ours", "bf16"),
    "ours bf16, graphs": Variant("ours", "bf16", "graphs"),
    "published, float64": Variant("published", "fp64"),
}


def bench_step(
    *,
    batch: int = 64,
    channels: int = 512,
    rounds: int = 5,
    samples: int = 256,
    ways: tuple[str, ...] | None = None,
    tf32: bool = False,
) -> dict[str, Any]:
    """Measure PSP with `batch` videos and `channels` visual channels, and a loop over `samples` packed videos.

    ways: by default all that this machine has; CUDA graphs are a GPU's.

    Returns:
        device, threads, load; matmul_gflops: of float32 products; ways: for each `samples_per_second`, `ms`, and
        `matmul_share`, the products that a step cannot avoid over those that the machine does in that time; peak_bytes:
        of the process after the first way on a CPU, of the GPU's memory for ours fp32 there; ratios: our float32 rates
        over that of the published network, of the same rounds; end_to_end: `samples_per_second` and `data_wait_share`
        of a loop that reads shards, with CUDA graphs where they are; on a GPU also `h2d_ms`, and by our float32 ways
        `busy_share` and `kernels`.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    set_numerics(TrainSettings(tf32=tf32), device)
    load, graphs = os.getloadavg()[0], device.type == "cuda"
    ways = ways or tuple(name for name, way in WAYS.items() if graphs or way.compile != "graphs")
    steps = {name: make_step(WAYS[name], batch, channels, device) for name in ways}
    peak = _warm_up(steps, device)
    times, matmul = _times(steps, rounds, device)
    gflops = 2 * MATRIX**3 / statistics.median(matmul) / 1e9
    work = step_flops(batch, channels) / 1e9
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "load": load,
        "batch": batch,
        "channels": channels,
        "rounds": rounds,
        "matmul_gflops": gflops,
        "peak_bytes": peak,
        "ways": {
            name: {
                "samples_per_second": batch / statistics.median(each),
                "ms": 1e3 * statistics.median(each),
                "matmul_share": work / statistics.median(each) / gflops,
            }
            for name, each in times.items()
        },
    }
    floats = [name for name in steps if WAYS[name][:2] == ("ours", "fp32")]
    if theirs := times.get("published network, fp32"):
        found["ratios"] = {
            name: statistics.median(b / a for a, b in zip(times[name], theirs, strict=True)) for name in floats
        }
    if device.type == "cuda":
        found |= _gpu_figures({name: steps[name] for name in floats}, found["ways"])
    if samples:
        found["end_to_end"] = end_to_end(batch, samples, rounds, device, "graphs" if graphs else "none")
    return found


def step_flops(batch: int, channels: int) -> float:
    """Floating-point operations of the matrix products over a map's positions, which no implementation can avoid:
    forward and backward, without a gradient for the features (the rest of the network is under 5 % of them)."""
    rows = batch * SEGMENTS * 49
    return rows * channels * 512 * 2 * 2 + rows * 512 * 49 * 2 * 3


def make_step(way: Variant, size: int, channels: int, device: torch.device) -> Callable[[], None]:
    torch.manual_seed(0)
    network = build_model("psp", visual_channels=channels, audio_channels=AUDIO, categories=CATEGORIES)
    batch = random_batch(size, channels)
    if device.type == "cuda":
        batch = Batch(**{name: x.pin_memory() for name, x in vars(batch).items()})
    if way.whose == "ours":
        return _our_step(network, way, batch, device)
    assert isinstance(network, PSP)
    return _published_step(network, torch.float64 if way.precision == "fp64" else torch.float32, batch, device)


def _our_step(network: nn.Module, way: Variant, batch: Batch, device: torch.device) -> Callable[[], None]:
    settings = {"precision": way.precision, "global_batch": len(batch)}
    described = {"data": {"shards": "-"}, "engine": {"kind": "ddp", "compile": way.compile}, "train": settings}
    config = Config.model_validate(described)
    engine = build_engine(network, config, Ranks(0, 1, 0, device))
    objectives = Objectives(config.objectives, pool="gather")
    engine.module.train()

    labels = GlobalBatch(batch.valid, batch.category, batch.video, batch.event.any(1), 0, 1)

    def step() -> None:
        moved = batch.to(device)
        engine.backward(objectives(engine(moved), moved, objectives.prepare(labels))[0])
        engine.step(1e-3)

    return step


def _published_step(network: PSP, dtype: torch.dtype, batch: Batch, device: torch.device) -> Callable[[], None]:
    network = copy.deepcopy(network).to(device, dtype).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)

    def step() -> None:
        moved = batch.to(device, dtype)
        optimizer.zero_grad()
        published_loss(published_forward(network, moved.visual, moved.audio), moved).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.1)
        optimizer.step()

    return step


def random_batch(size: int, channels: int) -> Batch:
    """Noise in the shape and types of packed features."""
    g = torch.Generator().manual_seed(0)
    event = torch.rand(size, SEGMENTS, generator=g) < 0.7
    event[:, 0] = True
    return Batch(
        visual=torch.rand(size, SEGMENTS, 7, 7, channels, generator=g).half(),
        audio=torch.randn(size, SEGMENTS, AUDIO, generator=g),
        event=event,
        category=torch.randint(0, CATEGORIES, (size,), generator=g),
        valid=torch.ones(size, dtype=torch.bool),
        video=torch.arange(size),
        index=torch.arange(size),
    )


def _warm_up(steps: dict[str, Callable[[], None]], device: torch.device) -> int:
    """Two steps of each; the most bytes of memory that the first way took."""
    peak = 0
    for step in steps.values():
        for _ in range(2):
            _timed(step, device)
        if not peak and device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        elif not peak:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak


def _times(
    steps: dict[str, Callable[[], None]], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of each step, and of the product of two matrices, in turn within each round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    matmul: list[float] = []
    for _ in range(rounds):
        matmul.append(_timed(_matmul(device), device))
        for name, step in steps.items():
            times[name].append(_timed(step, device))
    return times, matmul


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds, until the device is done too."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _matmul(device: torch.device) -> Callable[[], object]:
    x = torch.ones(MATRIX, MATRIX, device=device)
    return lambda: x @ x


def _gpu_figures(steps: dict[str, Callable[[], None]], ways: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Milliseconds of copies to the GPU in a step; by name the share of the time in which it computes, and kernels."""
    figures = {name: gpu_figures(step, ways[name]["ms"]) for name, step in steps.items()}
    found: dict[str, Any] = {
        key: {name: each[key] for name, each in figures.items()} for key in ("busy_share", "kernels")
    }
    return found | {"h2d_ms": next(iter(figures.values()))["h2d_ms"]}


def end_to_end(batch: int, samples: int, steps: int, device: torch.device, compile: str) -> dict[str, float]:
    """A training loop over made shards of the published size, after two steps."""
    with noise_shards(samples) as folder:
        manifest = Manifest.load(Path(folder))
        size = min(batch, samples)
        described: dict[str, Any] = {"data": {"shards": str(folder)}}
        described["train"] = {"global_batch": size, "precision": "fp32"}
        described["engine"] = {"kind": "ddp", "compile": compile}
        config, ranks = Config.model_validate(described), Ranks(0, 1, 0, device)
        network = build_model("psp", visual_channels=512, audio_channels=AUDIO, categories=len(manifest.categories))
        engine, objectives = build_engine(network, config, ranks), Objectives(config.objectives, pool="gather")
        engine.module.train()
        with open_train_stream(config, manifest, ranks) as stream:
            runner, feed = (
                StepRunner(config, ranks, stream.schedule, engine, objectives),
                BatchFeed(stream, device, objectives),
            )

            def run(first: int, count: int) -> None:
                for step in range(first, first + count):
                    runner.run_micro_batches(feed, step, step * size, 1e-3)

            run(0, 2)
            waited, seconds = stream.wait_seconds, _timed(lambda: run(2, steps), device)
            share = (stream.wait_seconds - waited) / seconds
    return {"samples_per_second": steps * size / seconds, "data_wait_share": share}
