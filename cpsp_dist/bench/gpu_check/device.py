"""Parts of `gpu-check` on a step's kernels, copies and waits; see `check`."""

from __future__ import annotations

import collections
import warnings
from pathlib import Path
from typing import Any

import torch

from cpsp_dist.bench.gpu_check.lines import say
from cpsp_dist.bench.gpu_check.runs import shards
from cpsp_dist.bench.step import WAYS, bench_step, make_step
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.reader import ReaderOptions, TrainStream
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.losses.settings import ObjectiveSettings
from cpsp_dist.training.feed import BatchFeed

GPU = torch.device("cuda", 0)


def facts(folder: Path) -> None:
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    found = torch.cuda.get_device_properties(0)
    say("facts", None, f"{found.name}, {found.total_memory >> 30} GiB, NCCL {torch.cuda.nccl.version()}; {versions}")


def syncs(folder: Path) -> None:
    """Torch's own count of host syncs in a step, beside the budget of the simulation."""
    step = make_step(WAYS["ours fp32"], 64, 512, GPU)
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
    ours = tuple(name for name, way in WAYS.items() if way.whose == "ours")
    cases: list[dict[str, Any]] = [
        {"ways": tuple(WAYS), "batch": batch, "samples": 16 * batch, "rounds": 10} for batch in (64, 256)
    ]
    cases += [{"ways": ours, "batch": 256, "channels": 1024, "tf32": tf32} for tf32 in (False, True)]
    for case in cases:
        found = bench_step(**({"samples": 0, "rounds": 20} | case))
        rates = ", ".join(f"{name} {row['samples_per_second']:,.0f}" for name, row in found["ways"].items())
        first, end = found["ways"]["ours fp32"], found.get("end_to_end")
        gpu = ", ".join(
            f"{share:.0%} by {found['kernels'][name]:.0f} kernels" for name, share in found["busy_share"].items()
        )
        say(
            "speed",
            None,
            f"TF32 {'on' if case.get('tf32') else 'off'}, batch {found['batch']}, {found['channels']} channels:"
            f" samples/s {rates}; fp32: {first['ms']:.2f} ms, of products {first['matmul_share']:.2f}, busy {gpu} with"
            f" graphs, H2D {found['h2d_ms']:.2f} ms, memory {found['peak_bytes'] / 1e9:.2f} GB"
            + (f"; from shards {end['samples_per_second']:,.0f}, waits {end['data_wait_share']:.0%}" if end else ""),
        )


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
