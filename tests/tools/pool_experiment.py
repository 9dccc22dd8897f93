"""Does a gathered pool train a better model than local pools, at the same global batch and seeds?

    python -m tests.tools.pool_experiment keypad=SHARDS avdigits=SHARDS [--seeds 5] [--epochs 12] [--output runs/pool]

Trains with each pool on each seed, two ranks of this machine, then prints the table: test accuracy of the weights best
on val, and the paired difference with its 95 % interval (Student's t over seeds). What is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
SCOPES = ("local", "gather")
RANKS = 2
LIMIT_SECONDS = 4 * 3600


def train_all(shards: dict[str, str], output: Path, seeds: int, epochs: int, batch: int) -> None:
    """Every run, one after the other, in this process' group of ranks."""
    import torch.distributed as dist

    from cpsp_dist.config import load_config
    from cpsp_dist.distributed import process_group
    from cpsp_dist.distributed.launchers import read_place
    from cpsp_dist.training.trainer import train

    place = read_place()
    ranks = process_group.discover(place=place)
    session = process_group.connect(place, ranks, process_group.Connection(600, 60, {}))
    process_group.init_process_group(session, ranks, 600)
    for data, folder in shards.items():
        for seed in range(1, seeds + 1):
            for scope in SCOPES:
                settings = [f"data.shards={folder}", f"output={output / f'{data}-{scope}-{seed}'}"]
                settings += [f"pool.scope={scope}", f"train.seed={seed}", f"train.epochs={epochs}"]
                settings += [f"train.global_batch={batch}", f"train.milestones=[{epochs // 2}, {3 * epochs // 4}]"]
                settings += ["engine.kind=ddp", "evaluation.every_epochs=2", "tracking.enabled=false"]
                settings += ["tracking.every_steps=1000", "checkpoint.keep=1"]
                train(load_config(REPO / "configs" / "keypad.yaml", settings), ranks)
    dist.barrier()
    dist.destroy_process_group()


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval."""
    from scipy.stats import t

    spread = statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(t.ppf(0.975, len(values) - 1)) * spread


def table(names: list[str], output: Path, seeds: int) -> None:
    print("| data | local | gathered | gathered − local, 95 % | seeds |\n|---|---|---|---|---|")
    for data in names:
        found = {
            scope: [
                json.loads((output / f"{data}-{scope}-{seed}" / "results.json").read_text())["accuracy/test"]
                for seed in range(1, seeds + 1)
            ]
            for scope in SCOPES
        }
        cells = [f"{mean:.2f} ± {half:.2f}" for mean, half in (interval(found[scope]) for scope in SCOPES)]
        pairs = [b - a for a, b in zip(found["local"], found["gather"], strict=True)]
        mean, half = interval(pairs)
        print(f"| {data} | {cells[0]} | {cells[1]} | {mean:+.2f} ± {half:.2f} | {seeds} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", metavar="NAME=SHARDS")
    parser.add_argument("--output", type=Path, default=Path("runs/pool"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=32)
    given = parser.parse_args()
    named = dict(text.split("=", 1) for text in given.shards)
    if "RANK" in os.environ:
        train_all(named, given.output, given.seeds, given.epochs, given.batch)
    else:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)} | os.environ
        subprocess.run([*launch, *sys.argv], check=True, timeout=LIMIT_SECONDS, env=environment)
        table(list(named), given.output, given.seeds)
