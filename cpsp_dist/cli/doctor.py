"""`cpsp-dist doctor`: what a training would trip over here, each with its fix."""

from __future__ import annotations

import argparse
import os

from cpsp_dist.utils.numbers import real


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check this environment, on all ranks: packages, GPUs, rendezvous, shards, disks, MLflow, clocks",
        description="Check what a training needs, a line each, with the fix for what is not right. Under a launcher "
        "(srun, torchrun, accelerate) on all its ranks, which then have to meet. Nothing is trained or kept. Exit code "
        "2 where something has to be fixed, 0 else, also with warnings.",
        epilog="Example: srun -N 4 --ntasks-per-node 8 python -m cpsp_dist doctor --config configs/avel100k_full.yaml",
    )
    parser.add_argument("--config", metavar="CONFIG", help="also check what this configuration reads and writes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top of the file")
    parser.add_argument(
        "--timeout", type=real, default=60.0, metavar="SECONDS", help="that any check waits (default: %(default)g)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.set_defaults(handler=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from cpsp_dist.utils.errors import UserError

    if args.overrides and args.config is None:
        raise UserError(f"'{args.overrides[0]}' is a setting on top of a file: give --config FILE too")
    if args.timeout <= 0:
        raise UserError(f"--timeout {args.timeout:g}: seconds, more than 0")
    # Torch reads it when imported. Its warnings about a rank that is missing are pages of C++ frames.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from cpsp_dist.doctor import doctor

    return doctor(args.config, args.overrides, args.timeout, as_json=args.json)
