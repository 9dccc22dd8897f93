"""`cpsp-dist train`: the same as `python -m cpsp_dist.train`."""

from __future__ import annotations

import argparse

from cpsp_dist.train import DESCRIPTION, add_arguments, epilog, run


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model, or resume a run",
        description=DESCRIPTION,
        epilog=epilog("cpsp-dist train"),
    )
    add_arguments(parser)
    parser.set_defaults(handler=run)
