"""The console command `cpsp-dist`: one module here for each group of subcommands.

Modules here import nothing heavy at their top: `--help` has to answer at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cpsp_dist import __version__
from cpsp_dist.cli import bench, compare, demo, doctor, evaluate, export, import_checkpoint, shards
from cpsp_dist.errors import guarded


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cpsp-dist",
        description="Train audio-visual event localization (CPSP) at scale: pack features, look at them, compare runs.",
        epilog="Training itself: python -m cpsp_dist.train --config configs/X.yaml [key=value ...]",
    )
    parser.add_argument("--version", action="version", version=f"cpsp-dist {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (shards, evaluate, export, compare, import_checkpoint, bench, demo, doctor):
        module.register(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return guarded(lambda: args.handler(args))
