"""`cpsp-dist gpu-check`: what only a real GPU shows, in ten minutes on one: a line `PART ok|BAD|note TEXT` each.

Each part is a process of its own with a limit; a part that dies or does not end is a line too. Parts that measure time
run alone, the others beside each other. What they look at was read or simulated before
(`tests/integration/test_simulated_gpu.py`): host syncs, the busy share, the LSTM's kernels, the ring under copies, that
runs repeat bit for bit, and what a user reads where a GPU fails.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from cpsp_dist.bench.gpu_check.lines import LINE, line_of
from cpsp_dist.bench.gpu_check.runs import shards
from cpsp_dist.utils.console import echo
from cpsp_dist.utils.errors import UserError


class Part(NamedTuple):
    module: str
    limit: int  # seconds
    alone: bool = True  # measures time


#: In the order in which their lines are printed; those that are not alone run at the same time.
PARTS = {
    "facts": Part("device", 20),
    "syncs": Part("device", 45),
    "speed": Part("device", 75),
    "compile": Part("graphs", 70),
    "graphs": Part("graphs", 45),
    "lstm": Part("device", 45),
    "scale": Part("pools", 45),
    "agree": Part("pools", 60),
    "ring": Part("device", 60, alone=False),
    "engines": Part("runs", 180, alone=False),
    "repeat": Part("runs", 180, alone=False),
    "errors": Part("runs", 180, alone=False),
}


def gpu_check(parts: Sequence[str] = ()) -> int:
    """Run these parts (all), print their lines; the exit code: 0, or 1 where a line says BAD.

    Raises:
        UserError: no GPU here.
    """
    require_gpu()
    chosen = [part for part in PARTS if part in (parts or PARTS)]
    bad = 0
    with tempfile.TemporaryDirectory(prefix="cpsp-gpu-check-") as folder, ThreadPoolExecutor() as beside:

        def run(part: str) -> list[str]:
            command = [sys.executable, "-m", "cpsp_dist.bench.gpu_check.check", part, folder]
            return run_part(part, command, PARTS[part].limit)

        if any(PARTS[part].module == "runs" or part == "ring" for part in chosen):
            shards(Path(folder))
        alone = [part for part in chosen if PARTS[part].alone]

        def lines() -> Iterator[str]:
            for part in alone:
                yield from run(part)
            for found in beside.map(run, [part for part in chosen if part not in alone]):
                yield from found

        for line in lines():  # each is printed as soon as its part is done
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


if __name__ == "__main__":
    name = sys.argv[1]
    getattr(importlib.import_module(f"cpsp_dist.bench.gpu_check.{PARTS[name].module}"), name)(Path(sys.argv[2]))
