"""`cpsp-dist bench collectives`: what a training step sends, by engine."""

from __future__ import annotations

import argparse
from typing import Any

from cpsp_dist.utils.console import echo, table
from cpsp_dist.utils.numbers import count

#: c10d's names of those that the engines and the pool use; another one has a column under its own name.
NAMES = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
}


def register(benches: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = benches.add_parser(
        "collectives",
        help="the collectives of a training step, by engine",
        description="Number and bytes of the collectives of one training step of PSP on two ranks over gloo, with DDP"
        " (its own, in C++, included) and each ZeRO stage.",
    )
    parser.add_argument("--batch", type=count, default=8, help="videos a rank (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(handler=_collectives)


def _collectives(args: argparse.Namespace) -> None:
    import json

    from cpsp_dist.bench.collectives import bench_collectives

    result = bench_collectives(batch=args.batch)
    echo(json.dumps(result, indent=1) if args.json else _describe(result))


def _describe(result: dict[str, Any]) -> str:
    names = [*NAMES, *sorted({name for found in result["engines"].values() for name in found} - NAMES.keys())]
    rows = [
        {"engine": engine, "bytes": f"{sum(row['bytes'] for row in found.values()):,}"}
        | {NAMES.get(name, name): found.get(name, {"calls": 0})["calls"] for name in names}
        for engine, found in result["engines"].items()
    ]
    title = f"{result['ranks']} ranks, {result['batch']} videos each, {result['gradient_bytes']:,} bytes of gradients"
    return f"{title}; bytes and collectives that a rank starts in a step\n{table(rows)}"
