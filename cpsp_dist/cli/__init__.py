"""The console command `cpsp-dist`: one module here for each group of subcommands.

Modules here import nothing heavy at their top: `--help` has to answer at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cpsp_dist import __version__
from cpsp_dist.cli import bench, compare, demo, doctor, evaluate, export, import_checkpoint, launch, shards
from cpsp_dist.errors import report_errors


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cpsp-dist",
        description="Train audio-visual event localization (CPSP) at scale: pack features, look at them, compare runs.",
        epilog="Training itself: python -m cpsp_dist.train --config configs/X.yaml [key=value ...]",
    )
    parser.add_argument("--version", action="version", version=f"cpsp-dist {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (shards, launch, evaluate, export, compare, import_checkpoint, bench, demo, doctor):
        module.register(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes `key=value` of a subcommand in one place only; people also give them behind flags.
    if rest and not (hasattr(args, "overrides") and all("=" in text and text[0] != "-" for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return report_errors(lambda: args.handler(args))
