"""Does the model need both modalities? CPSP against the same network with one of them blanked.

    python tests/modalities.py SHARDS [--seeds 3] [--epochs 60] [--output runs/modalities]

Trains each kind on each seed (the published settings at a batch of 32, best weights on val), then prints the table.
`tests/test_avdigits.py` runs a short form of it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
KINDS = {
    "cpsp": [],
    "psp": ["objectives.avps=0", "objectives.psa_s=0", "objectives.psa_v=0"],
    "audio-only": ["model.sees=audio"],
    "visual-only": ["model.sees=visual"],
}
LIMIT_SECONDS = 1800


def run(shards: str, output: str, kinds: list[str], seeds: int, epochs: int) -> None:
    """Train and compare; raises CalledProcessError where a run fails."""
    for seed in range(1, seeds + 1):
        for kind in kinds:
            name = f"{kind}-seed{seed}"
            command = [sys.executable, "-m", "cpsp_dist.train", "--config", str(REPO / "configs/ave_full.yaml")]
            command += [f"data.shards={shards}", f"output={output}/{name}", f"train.seed={seed}"]
            command += ["train.global_batch=32", f"train.epochs={epochs}", "engine.kind=ddp"]
            command += ["tracking.experiment=modalities", f"tracking.run_name={name}", *KINDS[kind]]
            subprocess.run(command, check=True, timeout=LIMIT_SECONDS, env={"OMP_NUM_THREADS": "1"} | os.environ)
    store = f"sqlite:///{output}/mlflow.db"
    compare = ["compare", "--uri", store, "--experiment", "modalities", "--mean", "--metrics"]
    command = [sys.executable, "-m", "cpsp_dist", *compare, "accuracy/test,event_accuracy/test,boundary_f1/test"]
    subprocess.run(command, check=True, timeout=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("--output", default="runs/modalities")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60)
    given = parser.parse_args()
    run(given.shards, given.output, given.kinds, given.seeds, given.epochs)
