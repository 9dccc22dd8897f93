"""`cpsp-dist compare`: a table of runs."""

from __future__ import annotations

import argparse
import os

from cpsp_dist.utils.console import echo

STORE = "sqlite:///runs/mlflow.db"


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("compare", help="print a table of MLflow runs: differing settings, final metrics")
    parser.add_argument("--experiment", default="cpsp", help="MLflow experiment (default: %(default)s)")
    parser.add_argument("--uri", help=f"MLflow store (default: MLFLOW_TRACKING_URI, else {STORE})")
    parser.add_argument(
        "--metrics",
        default="accuracy/test,accuracy/best_val,loss/total,videos_per_second",
        help="metrics to show, by commas (default: %(default)s)",
    )
    parser.add_argument("--parent", metavar="SWEEP", help="the runs of one sweep alone: its name or MLflow id")
    parser.add_argument(
        "--mean", action="store_true", help="one row for runs that differ in seed only: mean ± deviation"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(handler=_compare)


def _compare(args: argparse.Namespace) -> None:
    from cpsp_dist.tracking.compare import compare

    uri = args.uri or os.environ.get("MLFLOW_TRACKING_URI") or STORE
    metrics = args.metrics.split(",")
    echo(compare(uri, args.experiment, metrics, parent=args.parent, mean=args.mean, as_json=args.json))
