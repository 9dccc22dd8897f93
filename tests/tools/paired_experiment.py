"""Does one setting train a better model than another, at the same seeds? And do all of its runs hold?

    python -m tests.tools.paired_experiment pool.scope=local pool.scope=gather --data keypad=SHARDS --ranks 2
    python -m tests.tools.paired_experiment "" "objectives.psa_s=0 objectives.psa_v=0" \\
        --config configs/small.yaml --data avdigits=SHARDS --seeds 10

Trains with each of the settings on each seed, then prints the table: test accuracy of the weights best on val, the
paired difference to the first setting with its 95 % interval (Student's t over seeds), and how many runs hold: whose
accuracy on val is `--holds` at least (a run that fails stays near 50). An empty setting is the configuration as it is;
with `--epochs` the milestones are at a half and three quarters. What is finished is not done again.
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
LIMIT_SECONDS = 4 * 3600


def folder_of(given: argparse.Namespace, data: str, setting: str, seed: int) -> Path:
    return Path(given.output) / f"{data}-{setting or Path(given.config).stem}-{seed}".replace(" ", "+")


def train_all(given: argparse.Namespace) -> None:
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
    lengths: list[str] = []
    if epochs := given.epochs:
        lengths = [f"train.epochs={epochs}", f"train.milestones=[{epochs // 2}, {3 * epochs // 4}]"]
    for data, shards in given.data.items():
        for seed in range(1, given.seeds + 1):
            for setting in given.settings:
                settings = [f"data.shards={shards}", f"output={folder_of(given, data, setting, seed)}"]
                settings += ["engine.kind=ddp", "evaluation.every_epochs=2", "tracking.enabled=false"]
                settings += ["tracking.every_steps=1000", "checkpoint.keep=1"]
                settings += [*lengths, *setting.split(), f"train.seed={seed}"]
                train(load_config(given.config, settings), ranks)
    dist.barrier()
    dist.destroy_process_group()


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval."""
    from scipy.stats import t

    spread = statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(t.ppf(0.975, len(values) - 1)) * spread


def results_of(given: argparse.Namespace, data: str, setting: str) -> list[dict[str, float]]:
    folders = [folder_of(given, data, setting, seed) for seed in range(1, given.seeds + 1)]
    return [json.loads((folder / "results.json").read_text()) for folder in folders]


def print_table(given: argparse.Namespace) -> None:
    """A row for each kind of data and setting."""
    print("| data | setting | test | − first, 95 % | hold |\n|---|---|---|---|---|")
    for data in given.data:
        first = [run["accuracy/test"] for run in results_of(given, data, given.settings[0])]
        for setting in given.settings:
            runs = results_of(given, data, setting)
            found = [run["accuracy/test"] for run in runs]
            hold = sum(run["accuracy/best_val"] >= given.holds for run in runs)
            mean, half = interval(found)
            cells = [data, setting or "as configured", f"{mean:.2f} ± {half:.2f}"]
            if setting == given.settings[0]:
                cells += [""]
            else:
                ahead, half = interval([b - a for a, b in zip(first, found, strict=True)])
                cells += [f"{ahead:+.2f} ± {half:.2f}"]
            print("|", " | ".join([*cells, f"{hold} of {given.seeds}"]), "|")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", metavar="'key=value …'")
    parser.add_argument("--config", default=str(REPO / "configs" / "keypad.yaml"))
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=SHARDS")
    parser.add_argument("--output", default="runs/paired")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="(default: the configuration's)")
    parser.add_argument("--holds", type=float, default=60, metavar="PERCENT")
    given = parser.parse_args(arguments)
    given.data = dict(text.split("=", 1) for text in given.data)
    return given


def main() -> None:
    given = parse(sys.argv[1:])
    if "RANK" in os.environ:
        train_all(given)
        return
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={given.ranks}"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)} | os.environ
    command = [*launch, "-m", "tests.tools.paired_experiment", *sys.argv[1:]]
    subprocess.run(command, check=True, timeout=LIMIT_SECONDS, env=environment)
    print_table(given)


if __name__ == "__main__":
    main()
