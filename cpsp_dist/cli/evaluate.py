"""`cpsp-dist evaluate`: the accuracy of a trained run, and what lies behind it."""

from __future__ import annotations

import argparse

from cpsp_dist.utils.console import echo


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("evaluate", help="accuracy of a trained run's best weights: by category, by second")
    parser.add_argument("run", help="output folder of a training run")
    parser.add_argument("--split", default="test", help="(default: %(default)s)")
    parser.add_argument("--shards", help="folder of shards (default: those it was trained on)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, the confusion table too")
    parser.set_defaults(handler=_evaluate)


def _evaluate(args: argparse.Namespace) -> None:
    import json

    from cpsp_dist.distributed.launchers import require_one_process

    require_one_process("evaluate")
    from cpsp_dist.tracking.compare import format_evaluation
    from cpsp_dist.training.evaluate import evaluate_run

    found = evaluate_run(args.run, args.split, args.shards)
    echo(json.dumps(found, indent=1) if args.json else format_evaluation(found))
