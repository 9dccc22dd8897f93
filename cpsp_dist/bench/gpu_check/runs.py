"""Parts of `gpu-check` that train, each time with a command as a user gives it; see `check`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cpsp_dist.bench.batches import own_objectives
from cpsp_dist.bench.gpu_check.lines import say
from cpsp_dist.utils.cores import usable_cores

TRAIN = [sys.executable, "-m", "cpsp_dist.train", "--config", "keypad"]
#: Seconds for a training.
LIMIT = 100
#: What a user takes for trouble.
NOISE = re.compile(r"[Ww]arning|deprecat|\[W|RNN module")


def shards(folder: Path) -> Path:
    """A small keypad corpus, made once."""
    from cpsp_dist.demo.keypad import generate

    out = folder / "shards"
    if not (out / "index.json").exists():
        generate(folder / "features", {"train": 192, "val": 32, "test": 32}, seed=3)
        command = [sys.executable, "-m", "cpsp_dist", "shards", "pack", "--layout", "ave-h5", "--out", str(out)]
        subprocess.run([*command, "--source", str(folder / "features")], check=True, capture_output=True, timeout=60)
    return out


@dataclass
class CommandResult:
    code: int
    text: str

    def __str__(self) -> str:
        return f"exit code {self.code}" + ("" if self.code == 0 else f"; {' | '.join(self.lines[-3:])[:400]}")

    @property
    def lines(self) -> list[str]:
        return self.text.strip().splitlines()


def _overrides(folder: Path, name: str) -> list[str]:
    settings = [f"data.shards={shards(folder)}", f"output={folder / name}", "tracking.enabled=false"]
    return settings + ["train.global_batch=32", "train.epochs=9", "evaluation.every_epochs=1000"]


def _train(folder: Path, name: str, *settings: str, killed_at: int | None = None) -> CommandResult:
    """killed_at: SIGKILL as soon as the checkpoint of that step is there."""
    log, checkpoint = folder / f"{name}.log", folder / name / "checkpoints" / f"step-{killed_at or 0:08d}"
    with log.open("w") as file:
        command = [*TRAIN, *_overrides(folder, name), *settings]
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "2"})
        end = time.monotonic() + LIMIT
        while process.poll() is None and time.monotonic() < end:
            if killed_at and checkpoint.exists():
                process.send_signal(signal.SIGKILL)
            time.sleep(0.02)
        if process.poll() is None:
            process.kill()
            return CommandResult(124, f"not done within {LIMIT} s")
    return CommandResult(process.returncode, log.read_text())


def _beside(work: Callable[[str], None], names: Mapping[str, object]) -> None:
    with ThreadPoolExecutor(max(1, min(8, usable_cores() // 2))) as threads:
        list(threads.map(work, names))


def engines(folder: Path) -> None:
    """Every engine, precision and network makes its first steps, without a line that a user takes for trouble."""
    ddp = "engine.kind=ddp"
    cases = {f"ddp, {precision}": [ddp, f"train.precision={precision}"] for precision in ("fp32", "bf16", "fp64")}
    cases |= {f"ZeRO {stage}": [f"engine.zero={stage}"] for stage in range(4)}
    cases |= {f"ZeRO {stage}, bf16": [f"engine.zero={stage}", "train.precision=bf16"] for stage in (1, 3)}
    cases |= {"the default": ["train.precision=auto"]}
    cases |= {name: [ddp, f"model.name={name}"] for name in ("avel", "avsdn", "cmran", "cmbs")}
    cases |= {f"{name}, inductor": [*cases[name], "engine.compile=inductor"] for name in ("ddp, fp32", "ZeRO 0")}
    cases |= {"cace": [ddp, "model.name=cace", "model.enhanced_from=0", *own_objectives("cace")]}

    def work(name: str) -> None:
        done = _train(folder, f"engine {name}", "train.steps=2", *cases[name])
        noise = sorted({line[:160] for line in done.lines if NOISE.search(line)})
        say("engines", done.code == 0 and not noise, f"{name}: {done}" + (f"; prints {noise[:3]}" if noise else ""))

    _beside(work, cases)


def repeat(folder: Path) -> None:
    """The same run twice, and once more killed and resumed, ends with the same weights; the first one without CUDA
    graphs, where they are asked for."""
    from safetensors.torch import load_file

    cases = {"ddp": ["engine.kind=ddp"], "ZeRO 0": [], "ZeRO 2": ["engine.zero=2"], "ZeRO 3": ["engine.zero=3"]}
    cases |= {"ZeRO 1, bf16": ["engine.zero=1", "train.precision=bf16"]}
    cases |= {name: ["engine.kind=ddp", f"model.name={name}"] for name in ("avel", "avsdn", "cmran", "cmbs")}
    graphs = "engine.compile=graphs"
    cases |= {f"{name}, graphs": [*cases[name], graphs] for name in ("ddp", "ZeRO 2")}

    def work(name: str) -> None:
        settings = ["train.steps=30", "checkpoint.every_steps=10", *cases[name]]
        runs = [_train(folder, f"{name} a", *(setting for setting in settings if setting != graphs))]
        runs.append(_train(folder, f"{name} b", *settings))
        _train(folder, f"{name} c", *settings, killed_at=10)
        runs.append(_train(folder, f"{name} c", *settings))
        if failed := [done for done in runs if done.code]:
            return say("repeat", False, f"{name}: {failed[0]}")
        newest = [max((folder / f"{name} {time_}" / "checkpoints").glob("step-*")) for time_ in "abc"]
        first, *others = (load_file(path / "weights.safetensors") for path in newest)
        again, resumed = (max(float((first[key] - other[key]).abs().max()) for key in first) for other in others)
        say("repeat", again == resumed == 0, f"{name}: twice {again:.1e} apart, killed and resumed {resumed:.1e}")

    _beside(work, cases)


FULL = "import sys, torch; torch.cuda.set_per_process_memory_fraction(0.002); "
BROKEN = """import sys, torch; from cpsp_dist.training import step
old = step.StepRunner.run_micro_batches
def failing(*args, **more):
    torch.zeros(4, device='cuda')[torch.tensor([9], device='cuda')]
    return old(*args, **more)
step.StepRunner.run_micro_batches = failing
"""
MAIN = "from cpsp_dist.cli import main; sys.exit(main(['train', *sys.argv[1:]]))"
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cpsp_dist.train"]


def errors(folder: Path) -> None:
    """A full GPU, a kernel that fails, two ranks for one GPU: a line, and the exit code on which a requeue depends."""
    cases: dict[str, tuple[int, Sequence[str], str]] = {
        "memory is full": (2, ["-c", FULL + MAIN], "memory"),
        "a kernel fails": (1, ["-c", BROKEN + MAIN], "device-side assert"),
        "two ranks, one GPU": (2, TWO, "GPU"),
    }

    def work(name: str) -> None:
        code, start, word = cases[name]
        settings = [*_overrides(folder, name), "train.steps=2"]
        command = [sys.executable, *start, "--config", "keypad", *settings]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False, env=os.environ)
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        # An agent's own exit code is 1, and it prints more than the rank's line.
        good = bool(lines) and word in lines[0] and (start is TWO or (done.returncode == code and len(lines) == 1))
        traceback = "" if "Traceback" not in done.stderr or start is TWO else "; a traceback"
        said = lines[:2] or done.stderr.splitlines()[-3:]
        say("errors", good and not traceback, f"{name}: exit code {done.returncode}{traceback}; {str(said)[:400]}")

    _beside(work, cases)
