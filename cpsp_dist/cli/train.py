"""`cpsp-dist train`: the same as `python -m cpsp_dist.train`."""

from __future__ import annotations

import argparse
from importlib import import_module

#: The module; to type checkers `cpsp_dist.train` is the function for programs.
train = import_module("cpsp_dist.train")


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model, or resume a run",
        description=train.DESCRIPTION,
        epilog=train.epilog("cpsp-dist train"),
    )
    train.add_arguments(parser)
    parser.set_defaults(handler=train.run)
