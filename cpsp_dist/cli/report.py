"""`cpsp-dist report`: a page about one run."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpsp_dist.cli.paths import local_path
from cpsp_dist.utils.console import echo


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "report",
        help="write a page about a run: curves, errors by category and second, what the model looks at",
        description="Write one HTML file about a run, which needs no network: what the run was, its curves, and what "
        "its best weights predict for a split, beside trivial baselines.",
    )
    parser.add_argument("run", type=local_path, metavar="RUN", help="output folder of a training run")
    parser.add_argument("--split", help="(default: test; where there is none, val)")
    parser.add_argument("--shards", help="folder of shards (default: those it was trained on)")
    parser.add_argument(
        "--out", type=local_path, metavar="FILE", help="file to write (default: report.html in the run's folder)"
    )
    parser.set_defaults(handler=_report)


def _report(args: argparse.Namespace) -> None:
    from cpsp_dist.distributed.launchers import require_one_process

    require_one_process("report")
    from cpsp_dist.report.collect import collect
    from cpsp_dist.report.page import write
    from cpsp_dist.report.run_page import run_page

    path: Path = args.out or args.run / "report.html"
    write(run_page(collect(args.run, args.split, args.shards)), path)
    echo(f"{path}: open it in a browser")
