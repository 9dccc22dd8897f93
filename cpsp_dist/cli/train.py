"""`cpsp-dist train`: the same as `python -m cpsp_dist.train`."""

from __future__ import annotations

import argparse

from cpsp_dist import train


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model, or resume a run",
        description=train.DESCRIPTION,
        epilog=train.epilog("cpsp-dist train"),
    )
    train.add_arguments(parser)
    parser.set_defaults(handler=train.run)
