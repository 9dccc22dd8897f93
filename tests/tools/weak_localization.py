"""Does weak supervision find which seconds are events? Compared with an event in every second.

    python -m tests.tools.weak_localization SHARDS [--config configs/ave_weak_localized.yaml] [--seeds 5] [--epochs 4]

Trains from each seed, and prints what the weights best on val reach on test, what an event everywhere would reach with
the same categories, and the difference with its 95 % interval (Student's t over seeds). What is finished is not done
again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cpsp_dist.config import load_config
from cpsp_dist.distributed.process_group import discover
from cpsp_dist.training.trainer import train
from tests.tools.paired_experiment import REPO, interval

METRICS = ("accuracy", "event_accuracy")


def compare(given: argparse.Namespace) -> None:
    found: list[dict[str, dict[str, float]]] = []
    for seed in range(1, given.seeds + 1):
        output = Path(given.output) / f"{Path(given.config).stem}-{seed}"
        if not (output / "results.json").exists():
            settings = [f"data.shards={given.shards}", f"output={output}", f"train.seed={seed}", "engine.kind=ddp"]
            settings += ["train.global_batch=32", f"train.epochs={given.epochs}", "train.milestones=[]"]
            settings += ["tracking.enabled=false", "tracking.every_steps=1000", "checkpoint.keep=1"]
            train(load_config(given.config, settings), discover())
        results = json.loads((output / "evaluation_test.json").read_text())
        found.append({"trained": results, "event everywhere": results["baselines"]["always_event"]})
    print(f"{given.seeds} seeds, 95 %:")
    for name in METRICS:
        trained, trivial = ([100 * each[kind][name] for each in found] for kind in ("trained", "event everywhere"))
        rows = (trained, trivial, [a - b for a, b in zip(trained, trivial, strict=True)])
        texts = [f"{mean:.2f} ± {half:.2f}" for mean, half in map(interval, rows)]
        print(f"{name}: trained {texts[0]}, event everywhere {texts[1]}, difference {texts[2]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("--config", default=str(REPO / "configs" / "ave_weak_localized.yaml"))
    parser.add_argument("--output", default="runs/weak")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4)
    compare(parser.parse_args())
