"""How fast the first steps of runs were, beside all later ones.

    python -m tests.tools.first_steps RUN [RUN …] [--steps 25]

From the lines of a run's metrics.jsonl: videos of the lines up to step `--steps`, by the seconds that they took, and of
all later lines. Evaluations and checkpoints are no part of either.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def rates(lines: list[dict[str, float]], batch: int, steps: int) -> tuple[float, float]:
    """Videos per second of the lines of steps up to `steps`, and of those after."""
    videos, seconds = [0.0, 0.0], [0.0, 0.0]
    before = 0
    for line in lines:
        made, later = batch * (line["step"] - before), line["step"] > steps
        videos[later] += made
        seconds[later] += made / line["videos_per_second"]
        before = int(line["step"])
    if not all(seconds):
        raise SystemExit(f"error: no line of its log ends at or before step {steps}, or none after")
    return videos[0] / seconds[0], videos[1] / seconds[1]


def measure(run: Path, steps: int) -> tuple[float, float]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    settings = json.loads((run / "mlflow_run.json").read_text(encoding="utf-8"))["config"]
    timed = [line for line in found if "videos_per_second" in line]
    return rates(timed, settings["train.global_batch"], steps)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--steps", type=int, default=25)
    given = parser.parse_args()
    for each in given.runs:
        first, later = measure(each, given.steps)
        print(f"{each.name}: {first:.0f} videos/s up to step {given.steps}, {later:.0f} after: {first / later:.2f}")
