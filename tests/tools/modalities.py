"""Does the model need both modalities? CPSP against the same network with one of them blanked.

    python -m tests.tools.modalities SHARDS [--seeds 5] [--starts 3] [--jobs 2] [--epochs 60] [--set key=value …]

Trains each kind (the published settings at a batch of 32, best weights on val) and prints the table of all runs. Then,
for each seed, it keeps of `--starts` runs from different initial weights the one that is best on val, for every kind
alike, and prints what CPSP is ahead of each other kind: the mean of the differences at the same seed, with its 95 %
interval (Student's t over seeds), for single runs and for those kept. The test split chooses nothing. Settings of
`--set` hold for every kind. What is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

from tests.tools.paired_experiment import interval

REPO = Path(__file__).resolve().parents[2]
KINDS = {
    "cpsp": [],
    "psp": ["objectives.avps=0", "objectives.psa_s=0", "objectives.psa_v=0"],
    "audio-only": ["model.modality=audio"],
    "visual-only": ["model.modality=visual"],
}
METRICS = ("accuracy/test", "event_accuracy/test", "boundary_f1/test")
CHOOSES = "accuracy/best_val"
LIMIT_SECONDS = 1800

Results = list[dict[str, float]]  # of a kind, one a run


def run(
    shards: str, output: str, kinds: list[str], runs: int, epochs: int, jobs: int = 1, settings: Sequence[str] = ()
) -> dict[str, Results]:
    """Train each kind from seeds 1 to `runs`, `jobs` at a time. CalledProcessError where a run fails."""
    store = f"sqlite:///{Path(output).resolve()}/mlflow.db"
    env = {"OMP_NUM_THREADS": "1"} | os.environ | {"MLFLOW_TRACKING_URI": store}

    def train(kind: str, seed: int) -> dict[str, float]:
        name = f"{kind}-seed{seed}"
        results = Path(output, name, "results.json")
        if not results.exists():
            command = [sys.executable, "-m", "cpsp_dist.train", "--config", str(REPO / "configs/ave_full.yaml")]
            command += [f"data.shards={shards}", f"output={output}/{name}", f"train.seed={seed}"]
            command += ["train.global_batch=32", f"train.epochs={epochs}", "engine.kind=ddp", "train.precision=fp32"]
            command += ["tracking.experiment=modalities", f"tracking.run_name={name}", *settings, *KINDS[kind]]
            subprocess.run(command, check=True, timeout=LIMIT_SECONDS, env=env)
        return json.loads(results.read_text())

    with ThreadPoolExecutor(jobs) as pool:
        begun = [(kind, pool.submit(train, kind, seed)) for seed in range(1, runs + 1) for kind in kinds]
        found: dict[str, Results] = {kind: [] for kind in kinds}
        try:
            for kind, future in begun:
                found[kind].append(future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    compare = ["compare", "--uri", store, "--experiment", "modalities", "--mean", "--metrics"]
    subprocess.run([sys.executable, "-m", "cpsp_dist", *compare, ",".join(METRICS)], check=True, timeout=120)
    return found


def best_on_val(results: Results, starts: int) -> Results:
    """Of each `starts` runs in a row the one that is best on val; of equals the first."""
    groups = [results[first : first + starts] for first in range(0, len(results), starts)]
    return [max(group, key=lambda run: run[CHOOSES]) for group in groups]


def print_means(found: dict[str, Results]) -> None:
    for kind, results in found.items():
        columns = {name: [run[name] for run in results] for name in METRICS}
        print(f"{kind:12}", *(f"{name} {mean(x):.2f} ± {stdev(x):.2f}" for name, x in columns.items()), sep="  ")


def print_differences(found: dict[str, Results], first: str = "cpsp") -> None:
    """How far `first` is ahead of each other kind, seed by seed."""
    for kind in [kind for kind in found if kind != first]:
        differences = []
        for name in METRICS:
            pairs = [a[name] - b[name] for a, b in zip(found[first], found[kind], strict=True)]
            middle, half = interval(pairs)
            differences.append(f"{name} {middle:+.2f} ± {half:.2f}")
        print(f"{first} - {kind}, {len(pairs)} seeds, 95 %: {'; '.join(differences)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("--output", default="runs/modalities")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="for every kind")
    given = parser.parse_args()
    runs = given.seeds * given.starts
    found = run(given.shards, given.output, given.kinds, runs, given.epochs, given.jobs, given.set)
    kept = {kind: best_on_val(results, given.starts) for kind, results in found.items()}
    for title, each in (("single runs", found), (f"the best on val of {given.starts} starts", kept)):
        if given.seeds > 1:
            print(f"\n{title}:")
            print_means(each)
            if "cpsp" in given.kinds:
                print_differences(each)
