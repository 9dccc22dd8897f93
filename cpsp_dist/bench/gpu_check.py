"""`cpsp-dist gpu-check`: what only a real GPU shows, in ten minutes on one: a line `PART ok|BAD|note TEXT` each.

Each part is a process of its own with a limit; a part that dies or does not end is a line too. What the parts look at
was read or simulated before (`tests/integration/test_simulated_gpu.py`): host syncs, the busy share, the LSTM's
kernels, the ring under copies, that runs repeat bit for bit, and what a user reads where the GPU's memory is full.
"""

from __future__ import annotations

import collections
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from cpsp_dist.errors import UserError
from cpsp_dist.utils.console import echo

#: Seconds for each part, in order: together under ten minutes.
LIMITS = {"facts": 30, "syncs": 60, "speed": 120, "lstm": 45, "ring": 45, "engines": 120, "repeat": 100, "memory": 40}
LINE = re.compile(r"[a-z]+ +(ok|BAD|note) ")
TRAIN = [sys.executable, "-m", "cpsp_dist.train", "--config", "keypad"]


def gpu_check(parts: Sequence[str] = ()) -> int:
    """Run these parts (all), print their lines; the exit code: 0, or 1 where a line says BAD.

    Raises:
        UserError: no GPU here.
    """
    require_gpu()
    bad = 0
    with tempfile.TemporaryDirectory(prefix="cpsp-gpu-check-") as folder:
        for part in parts or LIMITS:
            command = [sys.executable, "-m", "cpsp_dist.bench.gpu_check", part, folder]
            for line in run_part(part, command, LIMITS[part]):
                echo(line)
                bad += " BAD " in line
    echo(f"{bad} lines say BAD" if bad else "nothing is BAD")
    return 1 if bad else 0


def require_gpu() -> None:
    if not torch.cuda.is_available():
        raise UserError("gpu-check: torch sees no GPU here; run it on a machine with one (see docs/results.md)")


def run_part(part: str, command: Sequence[str], limit: float) -> list[str]:
    """The lines that a part's process prints; one more where it fails, or is not done within `limit` seconds."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        text, _ = process.communicate(timeout=limit)
        end = "" if process.returncode == 0 else f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()
        text, end = process.communicate()[0], f"not done within {limit:g} s"
    lines = text.strip().splitlines()
    found = [line for line in lines if LINE.match(line)]
    return found + ([line_of(part, False, f"{end}: {' | '.join(lines[-3:])[:400]}")] if end else [])


def line_of(part: str, good: bool | None, text: str) -> str:
    return f"{part:8} {'note' if good is None else 'ok  ' if good else 'BAD '} {text}"


def _say(part: str, good: bool | None, text: str) -> None:
    echo(line_of(part, good, text))


def _facts(folder: Path) -> None:
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    found = torch.cuda.get_device_properties(0)
    _say("facts", None, f"{found.name}, {found.total_memory >> 30} GiB, NCCL {torch.cuda.nccl.version()}; {versions}")


def _syncs(folder: Path) -> None:
    """Torch's own count of host syncs in a step, beside the budget of the simulation."""
    from cpsp_dist.bench.step import WAYS, make_step

    step = make_step(*WAYS["ours fp32"], 64, 512, torch.device("cuda", 0))
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
        if "synchroniz" in str(found.message)
    )
    # The norm alone: the flag by which ranks stop together is the loop's, not the step's.
    _say("syncs", sum(places.values()) <= 1, f"{sum(places.values())} in a step: {dict(places)}")


def _speed(folder: Path) -> None:
    from cpsp_dist.bench.step import bench_step

    for tf32 in (False, True):
        for channels in (512, 1024):
            found = bench_step(channels=channels, rounds=10, samples=0, ways=("ours fp32", "ours bf16"), tf32=tf32)
            rates = ", ".join(f"{name} {row['samples_per_second']:,.0f}" for name, row in found["ways"].items())
            _say(
                "speed",
                None,
                f"TF32 {'on' if tf32 else 'off'}, {channels} channels: samples/s {rates}; fp32: busy"
                f" {found['busy_share']:.0%}, {found['kernels']:.0f} kernels, H2D {found['h2d_ms']:.2f} ms,"
                f" memory {found['peak_bytes'] / 1e9:.2f} GB",
            )


def _lstm(folder: Path) -> None:
    """Whether cuDNN's LSTM gives the same gradients each time."""
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        network = torch.nn.LSTM(128, 128, batch_first=True, bidirectional=True).to("cuda", dtype)
        x = torch.randn(64, 10, 128, device="cuda", dtype=dtype)
        first: list[torch.Tensor] = []
        repeats = True
        for _ in range(20):
            network.zero_grad()
            network(x)[0].square().sum().backward()
            now = [p.grad.clone() for p in network.parameters() if p.grad is not None]
            first = first or now
            repeats = repeats and all(torch.equal(a, b) for a, b in zip(first, now, strict=True))
        _say("lstm", repeats, f"{dtype}: gradients {'repeat' if repeats else 'differ'} over 20 passes")


def _shards(folder: Path) -> Path:
    from cpsp_dist.demo.keypad import generate

    out = folder / "shards"
    if not (out / "index.json").exists():
        generate(folder / "features", {"train": 192, "val": 32, "test": 32}, seed=3)
        command = [sys.executable, "-m", "cpsp_dist", "shards", "pack", "--layout", "ave-h5", "--out", str(out)]
        subprocess.run([*command, "--source", str(folder / "features")], check=True, capture_output=True, timeout=60)
    return out


def _ring(folder: Path) -> None:
    """A batch's memory is not filled anew while its copy to a busy GPU is under way."""
    from cpsp_dist.data.manifest import Manifest
    from cpsp_dist.data.reader import ReaderOptions, TrainStream
    from cpsp_dist.losses.objectives import Objectives
    from cpsp_dist.losses.settings import ObjectiveSettings
    from cpsp_dist.training.feed import BatchFeed

    manifest, count = Manifest.load(_shards(folder)), 60
    with TrainStream(manifest, "train", global_batch=16, seed=1) as plain:
        expected = [batch.visual.double().sum((1, 2, 3, 4)) for batch in plain.batches(0, count)]
    options = ReaderOptions(depth=1, threads=4, pin=True)
    with TrainStream(manifest, "train", global_batch=16, seed=1, options=options) as stream:
        feed = BatchFeed(stream, torch.device("cuda", 0), Objectives(ObjectiveSettings(), pool="gather"))
        sums = []
        for _ in range(count):
            torch.cuda._sleep(20_000_000)
            sums.append(feed.take().batch.visual.double().sum((1, 2, 3, 4)))
            feed.prefetch()
    wrong = sum(not torch.allclose(a, b.cpu()) for a, b in zip(expected, sums, strict=True))
    _say("ring", wrong == 0, f"{wrong} of {count} batches arrived changed")


def _train(folder: Path, name: str, *settings: str) -> subprocess.CompletedProcess[str]:
    overrides = [f"data.shards={_shards(folder)}", f"output={folder / name}", "tracking.enabled=false"]
    overrides += ["train.global_batch=32", "train.epochs=9", "evaluation.every_epochs=1000"]
    return subprocess.run([*TRAIN, *overrides, *settings], capture_output=True, text=True, timeout=90, check=False)


def _engines(folder: Path) -> None:
    """Every engine and precision makes its first steps, without a line that a user takes for trouble."""
    cases = {"ddp": ["engine.kind=ddp"], "ddp, bf16": ["engine.kind=ddp", "train.precision=bf16"]}
    cases |= {f"ZeRO {stage}": [f"engine.zero={stage}"] for stage in range(4)}
    for name, settings in cases.items():
        done = _train(folder, f"engine {name}", "train.steps=2", *settings)
        lines = (done.stdout + done.stderr).splitlines()
        noise = [line for line in lines if re.search(r"[Ww]arning|deprecat|\[W", line)]
        text = f"{name}: exit code {done.returncode}" + (f"; {noise[0][:200]}" if noise else "")
        _say("engines", done.returncode == 0 and not noise, text)


def _repeat(folder: Path) -> None:
    """The same run twice ends with the same weights."""
    from safetensors.torch import load_file

    for name, settings in {"ddp": ["engine.kind=ddp"], "ZeRO 2": ["engine.zero=2"]}.items():
        ends = []
        for time_ in "ab":
            done = _train(folder, f"{name} {time_}", "train.steps=30", *settings)
            newest = sorted((folder / f"{name} {time_}" / "checkpoints").glob("step-*"))
            if done.returncode or not newest:
                _say("repeat", False, f"{name}: exit code {done.returncode}")
                return
            ends.append(load_file(newest[-1] / "weights.safetensors"))
        apart = max(float((ends[0][key] - ends[1][key]).abs().max()) for key in ends[0])
        _say("repeat", apart == 0, f"{name}: two runs of 30 steps are {apart:.1e} apart")


def _memory(folder: Path) -> None:
    """A full GPU is one line and the user's exit code."""
    code = "import sys, torch; torch.cuda.set_per_process_memory_fraction(0.002); import cpsp_dist.train as t; "
    command = [sys.executable, "-c", code + "sys.exit(t.main(sys.argv[1:]))", *TRAIN[3:]]
    command += [
        f"data.shards={_shards(folder)}",
        f"output={folder / 'full'}",
        "tracking.enabled=false",
        "train.steps=2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=35, check=False)
    lines = done.stderr.strip().splitlines() or [""]
    _say(
        "memory",
        done.returncode == 2 and len(lines) < 4,
        f"exit code {done.returncode}, {len(lines)} lines: {lines[-1][:200]}",
    )


PARTS: dict[str, Callable[[Path], None]] = {
    "facts": _facts,
    "syncs": _syncs,
    "speed": _speed,
    "lstm": _lstm,
    "ring": _ring,
    "engines": _engines,
    "repeat": _repeat,
    "memory": _memory,
}

if __name__ == "__main__":
    PARTS[sys.argv[1]](Path(sys.argv[2]))
