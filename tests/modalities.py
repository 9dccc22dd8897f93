"""Does the model need both modalities? CPSP against the same network with one of them blanked.

    python tests/modalities.py SHARDS [--seeds 5] [--epochs 60] [--output runs/modalities] [--set key=value …]

Trains each kind on each seed (the published settings at a batch of 32, best weights on val), then prints the table, and
what CPSP is ahead of each other kind: the mean of the differences at the same seed, with its 95 % interval (Student's t
over seeds). Settings of `--set` hold for every kind. What is finished is not done again.
`tests/test_avdigits.py` runs a short form of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pool_experiment import interval

REPO = Path(__file__).resolve().parents[1]
KINDS = {
    "cpsp": [],
    "psp": ["objectives.avps=0", "objectives.psa_s=0", "objectives.psa_v=0"],
    "audio-only": ["model.sees=audio"],
    "visual-only": ["model.sees=visual"],
}
METRICS = ("accuracy/test", "event_accuracy/test", "boundary_f1/test")
LIMIT_SECONDS = 1800


def run(
    shards: str, output: str, kinds: list[str], seeds: int, epochs: int, settings: Sequence[str] = ()
) -> dict[str, dict[str, list[float]]]:
    """Train and compare: for each kind and metric the values, one a seed. CalledProcessError where a run fails."""
    for seed in range(1, seeds + 1):
        for kind in kinds:
            name = f"{kind}-seed{seed}"
            if Path(output, name, "results.json").exists():
                continue
            command = [sys.executable, "-m", "cpsp_dist.train", "--config", str(REPO / "configs/ave_full.yaml")]
            command += [f"data.shards={shards}", f"output={output}/{name}", f"train.seed={seed}"]
            command += ["train.global_batch=32", f"train.epochs={epochs}", "engine.kind=ddp"]
            command += ["tracking.experiment=modalities", f"tracking.run_name={name}", *settings, *KINDS[kind]]
            subprocess.run(command, check=True, timeout=LIMIT_SECONDS, env={"OMP_NUM_THREADS": "1"} | os.environ)
    store = f"sqlite:///{output}/mlflow.db"
    compare = ["compare", "--uri", store, "--experiment", "modalities", "--mean", "--metrics"]
    subprocess.run([sys.executable, "-m", "cpsp_dist", *compare, ",".join(METRICS)], check=True, timeout=120)
    results = {
        kind: [
            json.loads(Path(output, f"{kind}-seed{seed}", "results.json").read_text()) for seed in range(1, seeds + 1)
        ]
        for kind in kinds
    }
    return {kind: {name: [each[name] for each in found] for name in METRICS} for kind, found in results.items()}


def print_differences(found: dict[str, dict[str, list[float]]], first: str = "cpsp") -> None:
    """How far `first` is ahead of each other kind, seed by seed."""
    for kind in [kind for kind in found if kind != first]:
        told = []
        for name in METRICS:
            pairs = [a - b for a, b in zip(found[first][name], found[kind][name], strict=True)]
            mean, half = interval(pairs)
            told.append(f"{name} {mean:+.2f} ± {half:.2f}")
        print(f"{first} - {kind}, {len(pairs)} seeds, 95 %: {'; '.join(told)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("--output", default="runs/modalities")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="for every kind")
    given = parser.parse_args()
    found = run(given.shards, given.output, given.kinds, given.seeds, given.epochs, given.set)
    if given.seeds > 1 and "cpsp" in given.kinds:
        print_differences(found)
