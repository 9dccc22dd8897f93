"""`cpsp-dist compare`: a table of runs, and what can be concluded from it."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

from cpsp_dist.cli.paths import local_path, require_replaceable
from cpsp_dist.utils.console import echo
from cpsp_dist.utils.errors import UserError

if TYPE_CHECKING:
    from cpsp_dist.tracking.compare import Comparison
    from cpsp_dist.tracking.store import AskedStore

logger = logging.getLogger(__name__)


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "compare",
        help="runs side by side: differing settings, results with 95 %% intervals, tests against a baseline",
        description="A table of MLflow runs. With --mean or --by, runs of several seeds share a row: mean ± half of "
        "the 95 % interval.",
        epilog="Example: cpsp-dist compare --mean --baseline psp --metric accuracy/test",
    )
    which = parser.add_argument_group("which runs")
    which.add_argument(
        "--experiment", nargs="+", default=["cpsp"], metavar="E", help="MLflow experiments (default: cpsp)"
    )
    which.add_argument("--uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else sqlite:///runs/mlflow.db)")
    which.add_argument("--parent", metavar="SWEEP", help="the runs of one sweep alone: its name or MLflow id")
    which.add_argument(
        "--runs", nargs="+", default=[], metavar="RUN", help="these runs alone: names, also with *, or MLflow ids"
    )
    rows = parser.add_argument_group("rows and columns")
    rows.add_argument("--mean", action="store_true", help="one row for runs that differ in seed only")
    rows.add_argument(
        "--by", type=_names, default=(), metavar="KEY,…", help="one row for runs alike in these settings: psa_v,zero"
    )
    rows.add_argument(
        "--metric",
        "--metrics",
        dest="metrics",
        type=_names,
        default=(),
        metavar="M,…",
        help="metrics to show (default: accuracy on test, best and last on val, loss, speed)",
    )
    rows.add_argument(
        "--sort", metavar="M", help="a metric (best first), a setting, run or start (default: 1st metric)"
    )
    rows.add_argument("--baseline", metavar="ROW", help="also the difference to this row, paired by seed, and its p")
    output = parser.add_mutually_exclusive_group()
    for form, text in (("json", "JSON"), ("csv", "CSV"), ("latex", "a LaTeX tabular")):
        output.add_argument(f"--{form}", dest="form", action="store_const", const=form, help=f"print {text}")
    parser.add_argument("--html", type=local_path, metavar="FILE", help="also write a page: figures, curves, all rows")
    parser.set_defaults(handler=_compare)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _compare(args: argparse.Namespace) -> None:
    import shutil
    import sys

    from cpsp_dist.tracking.compare import Question, compare_runs
    from cpsp_dist.tracking.compare_formats import FORMATS, as_text
    from cpsp_dist.tracking.predictions import stored_predictions
    from cpsp_dist.tracking.runs import default_store, find_runs
    from cpsp_dist.tracking.store import AskedStore
    from cpsp_dist.utils.console import is_terminal

    if args.html:
        require_replaceable("--html", args.html, (".html", ".htm"))
    uri = args.uri or default_store()
    runs = find_runs(uri, args.experiment, parent=args.parent, wanted=args.runs)
    question = Question(args.metrics, args.by, args.mean, args.sort, args.baseline)
    store = AskedStore(uri)
    found = compare_runs(runs, question, stored_predictions(store))
    width = shutil.get_terminal_size().columns if is_terminal(sys.stdout) else None
    echo(FORMATS[args.form](found) if args.form else as_text(found, width))
    for line in found.warnings:
        logger.warning("%s", line)
    if args.html:
        _write_page(args, store, found)


def _write_page(args: argparse.Namespace, store: AskedStore, found: Comparison) -> None:
    from cpsp_dist.report.comparison_page import ComparedRuns, comparison_page
    from cpsp_dist.report.page import write
    from cpsp_dist.tracking.history import curves_of, read_histories

    if not found.groups:
        raise UserError("--html: there are no runs to write a page of")
    runs = [run for group in found.groups for run in group.runs]
    names = curves_of(runs)
    data = ComparedRuns(found, read_histories(store, runs, names), names)
    write(comparison_page(data, f"Comparison of {', '.join(args.experiment)}"), args.html)
    echo(f"{args.html}: open it in a browser")
