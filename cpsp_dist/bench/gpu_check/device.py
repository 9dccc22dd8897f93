"""Parts of `gpu-check` on a step's kernels, copies and waits; see `check`."""

from __future__ import annotations

import collections
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cpsp_dist.bench.gpu_check.lines import say
from cpsp_dist.bench.gpu_check.runs import shards
from cpsp_dist.bench.step import AUDIO, CATEGORIES, WAYS, bench_step, make_step, random_batch
from cpsp_dist.config import Config
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.reader import ReaderOptions, TrainStream
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.losses.settings import ObjectiveSettings
from cpsp_dist.models import build_model
from cpsp_dist.training.engine import build_engine
from cpsp_dist.training.feed import BatchFeed

GPU = torch.device("cuda", 0)


def facts(folder: Path) -> None:
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    found = torch.cuda.get_device_properties(0)
    say("facts", None, f"{found.name}, {found.total_memory >> 30} GiB, NCCL {torch.cuda.nccl.version()}; {versions}")


def syncs(folder: Path) -> None:
    """Torch's own count of host syncs in a step, beside the budget of the simulation."""
    step = make_step(*WAYS["ours fp32"], 64, 512, GPU)
    for _ in range(3):
        step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    places = collections.Counter(
        f"{'/'.join(Path(found.filename).parts[-2:])}:{found.lineno}"
        for found in caught
        if "called a synchronizing" in str(found.message)
    )
    # The norm alone: the flag by which ranks stop together is the loop's, not the step's.
    say("syncs", sum(places.values()) <= 1, f"{sum(places.values())} in a step: {dict(places)}")


def speed(folder: Path) -> None:
    ours = ("ours fp32", "ours bf16")
    cases: list[dict[str, Any]] = [
        {"ways": tuple(WAYS), "batch": batch, "samples": 16 * batch, "rounds": 10} for batch in (64, 256)
    ]
    cases += [{"ways": ours, "batch": 256, "channels": 1024, "tf32": tf32} for tf32 in (False, True)]
    for case in cases:
        found = bench_step(**({"samples": 0, "rounds": 20} | case))
        rates = ", ".join(f"{name} {row['samples_per_second']:,.0f}" for name, row in found["ways"].items())
        first = found["ways"]["ours fp32"]
        end = found.get("end_to_end")
        say(
            "speed",
            None,
            f"TF32 {'on' if case.get('tf32') else 'off'}, batch {found['batch']}, {found['channels']} channels:"
            f" samples/s {rates}; fp32: {first['ms']:.2f} ms, of products {first['matmul_share']:.2f}, busy"
            f" {found['busy_share']:.0%}, {found['kernels']:.0f} kernels, H2D {found['h2d_ms']:.2f} ms, memory"
            f" {found['peak_bytes'] / 1e9:.2f} GB"
            + (f"; from shards {end['samples_per_second']:,.0f}, waits {end['data_wait_share']:.0%}" if end else ""),
        )


def compile(folder: Path) -> None:
    """A step whose network is as it is, compiled, and compiled with CUDA graphs."""
    for precision in ("fp32", "bf16"):
        times, losses = {}, {}
        for name, options in {"eager": None, "compiled": {}, "graphs": {"mode": "reduce-overhead"}}.items():
            step, loss = _compiled_step(precision, options)
            for _ in range(8):
                step()
            times[name] = statistics.median(_milliseconds(step) for _ in range(30))
            losses[name] = loss()
        apart = max(abs(value / losses["eager"] - 1) for value in losses.values())
        text = ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items())
        say("compile", None, f"{precision}, batch 64: {text}; losses after 38 steps up to {apart:.1e} apart")


def _compiled_step(precision: str, options: dict[str, Any] | None) -> tuple[Callable[[], None], Callable[[], float]]:
    torch.manual_seed(0)
    torch.compiler.reset()
    batch = random_batch(64, 512).to(GPU)
    settings = {"precision": precision, "global_batch": 64}
    config = Config.model_validate({"data": {"shards": "-"}, "engine": {"kind": "ddp"}, "train": settings})
    network = build_model("psp", visual_channels=512, audio_channels=AUDIO, categories=CATEGORIES)
    engine: Any = build_engine(network, config, Ranks(0, 1, 0, GPU))
    engine.module.train()
    if options is not None:
        engine.wrapped = torch.compile(engine.module, **options)
    objectives, last = Objectives(config.objectives, pool="gather"), torch.zeros(())

    def step() -> None:
        nonlocal last
        torch.compiler.cudagraph_mark_step_begin()
        last = objectives(engine(batch), batch)[0]
        engine.backward(last)
        engine.step(1e-3)

    return step, lambda: float(last.detach())


def _milliseconds(work: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def lstm(folder: Path) -> None:
    """Whether cuDNN's LSTM gives the same gradients each time, and its kernels, with weights in one piece of memory or
    in several, as ZeRO keeps them."""
    from torch.profiler import ProfilerActivity, profile

    for dtype, scattered in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        torch.manual_seed(0)
        network = torch.nn.LSTM(128, 128, batch_first=True, bidirectional=True).to(GPU, dtype)
        for parameter in network.parameters() if scattered else ():
            parameter.data = parameter.data.clone()
        x = torch.randn(64, 10, 128, device=GPU, dtype=dtype)

        def gradients(network: torch.nn.LSTM = network, x: torch.Tensor = x) -> list[torch.Tensor]:
            network.zero_grad()
            network(x)[0].square().sum().backward()
            return [p.grad.clone() for p in network.parameters() if p.grad is not None]

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            first = gradients()
            same = all(torch.equal(a, b) for _ in range(20) for a, b in zip(first, gradients(), strict=True))
            with profile(activities=[ProfilerActivity.CUDA]) as found:
                gradients()
                torch.cuda.synchronize()
        kernels = sum(event.device_type.name == "CUDA" for event in found.events() or [])
        name = f"{str(dtype).removeprefix('torch.')}{', scattered weights' if scattered else ''}"
        printed = {str(warning.message)[:60] for warning in caught}
        text = f"{name}: gradients {'repeat' if same else 'differ'} over 20 passes, {kernels} kernels"
        say("lstm", same, f"{text}; {f'warns: {printed}' if printed else 'no warning'}")


def ring(folder: Path) -> None:
    """A batch's memory is not filled anew while its copy to a busy GPU is under way."""
    manifest, count = Manifest.load(shards(folder)), 60
    with TrainStream(manifest, "train", global_batch=16, seed=1) as plain:
        expected = [batch.visual.double().sum((1, 2, 3, 4)) for batch in plain.batches(0, count)]
    options = ReaderOptions(depth=1, threads=4, pin=True)
    with TrainStream(manifest, "train", global_batch=16, seed=1, options=options) as stream:
        feed = BatchFeed(stream, GPU, Objectives(ObjectiveSettings(), pool="gather"))
        sums = []
        for _ in range(count):
            torch.cuda._sleep(20_000_000)
            sums.append(feed.take().batch.visual.double().sum((1, 2, 3, 4)))
            feed.prefetch()
    wrong = sum(not torch.allclose(a, b.cpu()) for a, b in zip(expected, sums, strict=True))
    say("ring", wrong == 0, f"{wrong} of {count} batches arrived changed")
