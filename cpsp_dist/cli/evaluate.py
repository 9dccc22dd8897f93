"""`cpsp-dist evaluate`: the accuracy of a trained run, and what lies behind it."""

from __future__ import annotations

import argparse
from typing import Any

from cpsp_dist.cli.paths import local_path, require_replaceable
from cpsp_dist.utils.console import echo, table
from cpsp_dist.utils.errors import UserError


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="accuracy of a trained run's best weights: by category, by second",
        description="The accuracy of a trained run's best weights, on one process or under any launcher: torchrun "
        "--nproc-per-node=4 -m cpsp_dist evaluate RUN.",
    )
    parser.add_argument("run", help="output folder of a training run")
    parser.add_argument("--split", default="test", help="(default: %(default)s)")
    parser.add_argument("--shards", help="folder of shards (default: those it was trained on)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, the confusion table too")
    parser.add_argument(
        "--predictions", type=local_path, metavar="FILE", help="also write what each video is predicted to be"
    )
    parser.add_argument("--format", choices=("jsonl", "csv", "npz"), help="of that file (default: by its suffix)")
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

    from cpsp_dist.distributed import process_group
    from cpsp_dist.distributed.launchers import read_place
    from cpsp_dist.distributed.signals import StopSignals
    from cpsp_dist.metrics.predictions import Predictions, format_of
    from cpsp_dist.training.evaluate import evaluate_run

    if args.format and args.predictions is None:
        raise UserError(f"--format {args.format} is that of --predictions FILE, which is missing")
    form = format_of(args.predictions, args.format) if args.predictions is not None else ""
    if args.predictions is not None:
        require_replaceable("--predictions", args.predictions, (".jsonl", ".csv", ".npz"))
    answers: list[Predictions] | None = [] if form else None
    place = read_place()
    ranks = process_group.discover(place=place)
    asked = {"command": "evaluate", "run": args.run, "split": args.split, "predictions": form}
    with (
        StopSignals() as signals,
        process_group.connected(place, ranks, process_group.Connection(600, 60, asked), signals),
    ):
        found = evaluate_run(args.run, args.split, args.shards, ranks, answers)
    if not ranks.first:
        return
    if answers is not None:
        try:
            answers[0].save(args.predictions, form)
        except OSError as error:
            raise UserError(f"--predictions {args.predictions}: cannot be written ({error.strerror})") from None
    echo(json.dumps(found, indent=1) if args.json else format_evaluation(found))
    if answers is not None and not args.json:
        echo(f"{args.predictions}: {len(answers[0]):,} videos")
