"""`cpsp-dist evaluate`: the accuracy of a trained run, and what lies behind it."""

from __future__ import annotations

import argparse
from typing import Any

from cpsp_dist.utils.console import echo, table


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("evaluate", help="accuracy of a trained run's best weights: by category, by second")
    parser.add_argument("run", help="output folder of a training run")
    parser.add_argument("--split", default="test", help="(default: %(default)s)")
    parser.add_argument("--shards", help="folder of shards (default: those it was trained on)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, the confusion table too")
    parser.set_defaults(handler=_evaluate)


def format_evaluation(found: dict[str, Any]) -> str:
    """Accuracy, by category and by second, for people."""
    from cpsp_dist.metrics import METRICS

    rows = [
        {"category": name, "segments": shares["segments"]}
        | {key: f"{100 * shares[key]:.1f}" for key in ("precision", "recall", "f1")}
        for name, shares in found["categories"].items()
    ]
    summary = "\n".join(line for metric in METRICS.values() for line in metric.summary(found))
    return f"{found['split']}: {found['videos']} videos, weights of step {found['step']}\n{summary}\n\n{table(rows)}"


def _evaluate(args: argparse.Namespace) -> None:
    import json

    from cpsp_dist.distributed.launchers import require_one_process

    require_one_process("evaluate")
    from cpsp_dist.training.evaluate import evaluate_run

    found = evaluate_run(args.run, args.split, args.shards)
    echo(json.dumps(found, indent=1) if args.json else format_evaluation(found))
