"""Does weak supervision find which seconds are events? Compared with an event in every second.

    python -m tests.tools.weak_localization SHARDS [--config configs/ave_weak.yaml …] [--seeds 5] [--epochs 4]

Trains each configuration from each seed, and prints what the weights best on val reach on test, what an event
everywhere would reach with the same categories, and the difference with its 95 % interval (Student's t over seeds);
then how far the first configuration is ahead of each other one. What is finished is not done again.
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
CONFIGS = [str(REPO / "configs" / name) for name in ("ave_weak.yaml", "ave_weak_published.yaml")]

#: Of a seed: what is trained, and an event everywhere; each in percent by metric.
Found = dict[str, dict[str, float]]


def run(given: argparse.Namespace, config: str, seed: int) -> Found:
    output = Path(given.output) / f"{Path(config).stem}-{seed}"
    if not (output / "results.json").exists():
        settings = [f"data.shards={given.shards}", f"output={output}", f"train.seed={seed}", "engine.kind=ddp"]
        settings += ["train.global_batch=32", f"train.epochs={given.epochs}", "train.milestones=[]"]
        settings += ["train.precision=fp32", "tracking.enabled=false", "tracking.every_steps=1000", "checkpoint.keep=1"]
        train(load_config(config, settings), discover())
    results = json.loads((output / "evaluation_test.json").read_text())
    kinds = {"trained": results, "event everywhere": results["baselines"]["always_event"]}
    return {kind: {name: 100 * each[name] for name in METRICS} for kind, each in kinds.items()}


def shown(values: list[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.2f} ± {half:.2f}"


def compare(given: argparse.Namespace) -> None:
    found = {config: [run(given, config, seed) for seed in range(1, given.seeds + 1)] for config in given.config}
    print(f"{given.seeds} seeds, 95 %:")
    trained = {}
    for config, runs in found.items():
        for name in METRICS:
            ours, trivial = ([each[kind][name] for each in runs] for kind in ("trained", "event everywhere"))
            ahead = shown([a - b for a, b in zip(ours, trivial, strict=True)])
            print(f"{Path(config).stem}: {name} {shown(ours)}, event everywhere {shown(trivial)}, difference {ahead}")
            trained[config, name] = ours
    first, *others = given.config
    for other in others:
        for name in METRICS:
            ahead = shown([a - b for a, b in zip(trained[first, name], trained[other, name], strict=True)])
            print(f"{Path(first).stem} - {Path(other).stem}: {name} {ahead}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("--config", nargs="+", default=CONFIGS)
    parser.add_argument("--output", default="runs/weak")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4)
    compare(parser.parse_args())
