"""`cpsp-dist gpu-check`: what only a real GPU shows, in ten minutes on one."""

from __future__ import annotations

import argparse

PARTS = [
    "facts",
    "syncs",
    "speed",
    "compile",
    "graphs",
    "lstm",
    "scale",
    "agree",
    "ring",
    "engines",
    "repeat",
    "errors",
]


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "gpu-check",
        help="check and measure training on a GPU of this machine (ten minutes)",
        description="Host syncs, speed, repeatability and messages on one GPU: a line ok, BAD or note for each. Exit "
        "code 1 where a line says BAD, 2 where there is no GPU.",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"these only, of: {', '.join(PARTS)}")
    parser.set_defaults(handler=_gpu_check)


def _gpu_check(args: argparse.Namespace) -> int:
    from cpsp_dist.utils.errors import UserError

    if unknown := [part for part in args.parts if part not in PARTS]:
        raise UserError(f"gpu-check: no part '{unknown[0]}'; there are: {', '.join(PARTS)}")
    from cpsp_dist.bench.gpu_check.check import gpu_check

    return gpu_check(args.parts)
