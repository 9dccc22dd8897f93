"""The training command: `python -m cpsp_dist.train --config configs/X.yaml [key=value ...]`.

The same module under python, torchrun, accelerate launch, srun and submitit; launchers only set the environment.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from cpsp_dist.distributed.signals import StopSignals
from cpsp_dist.training import gc_control
from cpsp_dist.training.idle_starts import note_start
from cpsp_dist.utils.command import run_command
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.logs import run_log
from cpsp_dist.utils.numbers import integer
from cpsp_dist.utils.redact import learn
from cpsp_dist.utils.streams import Parser

if TYPE_CHECKING:
    from cpsp_dist.api import TrainResult
    from cpsp_dist.config import Config

PROGRAM = "python -m cpsp_dist.train"
DESCRIPTION = (
    "Train a model for audio-visual event localization. A run whose output folder has a checkpoint resumes from there, "
    "on any number of ranks."
)


def epilog(program: str) -> str:
    return f"Example: {program} --config keypad train.epochs=2 output=runs/try"


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, description=DESCRIPTION, epilog=epilog(PROGRAM))
    add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """For `cpsp-dist train` too."""
    parser.add_argument(
        "--config", required=True, metavar="CONFIG", help="a YAML file, or a shipped config: see `cpsp-dist configs`"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top of the file: train.seed=2")
    parser.add_argument("--fresh", action="store_true", help="refuse to resume from checkpoints in the output folder")
    parser.add_argument(
        "--allow-config-change",
        action="store_true",
        help="resume from a checkpoint of another configuration or data",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be done: settings, data, memory of a rank; make one step; write nothing",
    )
    parser.add_argument("--world", type=integer, metavar="N", help="with --dry-run on one process: plan for N ranks")
    parser.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print debug lines, and the traceback of an error; as CPSP_DEBUG=1 does",
    )
    # The deepspeed launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)


def main(argv: Sequence[str] | None = None) -> int:
    learn(sys.argv if argv is None else argv)
    return run_command(lambda: run(build_parser().parse_intermixed_args(argv)), stdout=True, doing="training")


def run(args: argparse.Namespace) -> int:
    """The command, with the arguments of `add_arguments`; its exit code."""
    # Torch reads it when imported. Its warnings about a rank that is gone are pages of C++ frames.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # see training/engine/numerics.py

    def work() -> None:
        with StopSignals() as signals:  # first of all: the imports below take seconds
            from cpsp_dist.distributed.launchers import read_place
            from cpsp_dist.distributed.orphans import end_with_parent

            place = read_place()
            end_with_parent()
            if place.rank == 0 and not args.dry_run:
                note_start()
            from cpsp_dist.config import load_config
            from cpsp_dist.distributed import process_group
            from cpsp_dist.distributed.rendezvous import failures_reported

            with failures_reported(place):
                config = load_config(args.config, args.overrides)
                ranks = process_group.discover(place=place)
                if args.world is not None and (not args.dry_run or ranks.world > 1 or args.world < 1):
                    raise UserError(
                        "--world N, at least 1, goes with --dry-run on one process; under a launcher its ranks count"
                    )
            from cpsp_dist.training.agreement import facts

            flags = {name: getattr(args, name) for name in ("dry_run", "fresh", "allow_config_change")}
            settings = process_group.Connection(
                config.engine.timeout, config.engine.heartbeat_timeout, facts(config, **flags)
            )
            with (
                run_log(config.output, ranks.rank, enabled=not args.dry_run),
                process_group.connected(place, ranks, settings, signals),
            ):
                if args.dry_run:
                    from cpsp_dist.training.dry_run import dry_run
                    from cpsp_dist.training.resume import Choices

                    dry_run(config, ranks, args.world or ranks.world, Choices(args.fresh, args.allow_config_change))
                    return
                from cpsp_dist.api import train_ranks

                choices = {"fresh": args.fresh, "allow_config_change": args.allow_config_change}
                train_ranks(config, ranks, signals, **choices)

    with gc_control.reduced_gc():
        return run_command(work, stdout=True, debug=getattr(args, "debug", False), doing="training")


class _CallableModule(ModuleType):
    """`cpsp_dist.train` names this module and the function for programs."""

    def __call__(
        self,
        config: Config | str | Path,
        overrides: Sequence[str] = (),
        *,
        fresh: bool = False,
        allow_config_change: bool = False,
    ) -> TrainResult:
        """See `cpsp_dist.api.train`."""
        from cpsp_dist import api

        return api.train(config, overrides, fresh=fresh, allow_config_change=allow_config_change)


sys.modules[__name__].__class__ = _CallableModule


if __name__ == "__main__":
    sys.exit(main())
