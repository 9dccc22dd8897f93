"""`cpsp-dist bench …`: measure this program on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cpsp_dist.cli import bench_collectives, bench_encoders
from cpsp_dist.cli.paths import local_path
from cpsp_dist.utils.console import echo, table
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.numbers import count

PEERS = ("webdataset", "mosaicml", "litdata", "published")
POOLS = ("off", "local", "gathered")


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("bench", help="measure speed on this machine")
    benches = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    loader = benches.add_parser(
        "loader",
        help="reading shards, against memcpy",
        description="Rate of the streaming reader, over one core's memcpy of the same bytes in the same run: in one"
        " process, with each number of threads, page cache warm and cold; plain webdataset beside it.",
    )
    loader.add_argument("--shards", type=local_path, help="folder (default: 0.5 MB samples, made and removed)")
    loader.add_argument("--split", default="train", help="split to read (default: %(default)s)")
    loader.add_argument("--samples", type=count, default=2000, help="so many samples a round (default: %(default)s)")
    loader.add_argument("--batch", type=count, default=64, help="samples a batch (default: %(default)s)")
    loader.add_argument("--depth", type=count, default=3, help="batches read ahead (default: %(default)s)")
    loader.add_argument("--threads", type=count, nargs="+", default=[1, 2, 4, 8], metavar="N", help="default: 1 2 4 8")
    loader.add_argument("--rounds", type=count, default=5, help="at least so many (default: %(default)s)")
    loader.add_argument("--no-crc", action="store_true", help="do not check the samples' crc32c")
    loader.add_argument("--only-warm", action="store_true", help="do not measure with the shards out of the page cache")
    loader.add_argument("--json", action="store_true", help="print JSON instead of a table")
    loader.set_defaults(handler=_loader)

    peers = benches.add_parser(
        "peers",
        help="the same samples through other libraries",
        description="Reading speed of this package and of webdataset, mosaicml-streaming, litdata and the published"
        " zip-of-pickle layout, each in an environment of its own (made at the first call; some GB).",
    )
    peers.add_argument("--envs", type=local_path, default=Path("runs/bench-peers"), help="where (default: %(default)s)")
    peers.add_argument("--samples", type=count, default=1024, help="so many samples (default: %(default)s)")
    peers.add_argument("--peer", action="append", choices=PEERS, help="this one only; may be given again")
    peers.add_argument("--json", action="store_true", help="print JSON instead of a table")
    peers.set_defaults(handler=_peers)

    _register_steps(benches)
    bench_collectives.register(benches)
    bench_encoders.register(benches)

    pool = benches.add_parser(
        "pool",
        help="what the gathered pool costs",
        description="Bytes, collectives, memory and time of the contrastive pool, with ranks of this machine over gloo"
        " (one thread each), and for pools that they cannot fill.",
    )
    pool.add_argument("--batch", type=count, default=64, help="videos a rank (default: %(default)s)")
    pool.add_argument("--ranks", type=count, nargs="+", default=[1, 2, 4], metavar="W", help="default: 1 2 4")
    sizes = [64, 256, 1024, 4096, 16384, 65536]
    pool.add_argument("--pools", type=count, nargs="+", default=sizes, metavar="N", help="default: 64 to 65536")
    pool.add_argument("--rounds", type=count, default=5, help="default: %(default)s")
    pool.add_argument("--tiles", action="store_true", help="only the pools in tiles: time and memory by their size")
    pool.add_argument("--json", action="store_true", help="print JSON instead of a table")
    pool.set_defaults(handler=_pool)


def _register_steps(benches: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    step = benches.add_parser(
        "step",
        help="a training step, against the published one",
        description="Samples a second of a training step of PSP in float32 and bf16, of the published network in"
        " float32 and of the published step in float64, in turn within each round; their share of the matrix products"
        " that the machine does; a training loop from shards. On a GPU also copies and the share in which it is busy.",
    )
    step.add_argument("--batch", type=count, default=64, help="videos a step (default: %(default)s)")
    step.add_argument("--channels", type=count, default=512, help="visual channels (default: %(default)s)")
    step.add_argument("--rounds", type=count, default=5, help="default: %(default)s")
    step.add_argument("--json", action="store_true", help="print JSON instead of a table")
    step.set_defaults(handler=_step)

    scaling = benches.add_parser(
        "scaling",
        help="training steps on 1, 2 and 4 ranks",
        description="Samples a second over all ranks of this machine, bytes that a rank receives, and time waited; on"
        " GPUs, of which each rank has one, also copies and the share in which one is busy.",
    )
    scaling.add_argument("--batch", type=count, default=64, help="videos a rank (default: %(default)s)")
    scaling.add_argument("--ranks", type=count, nargs="+", metavar="W", help="default: 1 2 4, or as many as GPUs")
    scaling.add_argument("--rounds", type=count, default=5, help="default: %(default)s")
    scaling.add_argument("--json", action="store_true", help="print JSON instead of a table")
    scaling.set_defaults(handler=_scaling)


def _loader(args: argparse.Namespace) -> None:
    import json

    from cpsp_dist.bench.loader import bench_loader
    from cpsp_dist.data.reader import ReaderOptions

    result = bench_loader(
        args.shards,
        split=args.split,
        samples=args.samples,
        batch=args.batch,
        threads=args.threads,
        rounds=args.rounds,
        options=ReaderOptions(depth=args.depth, check_crc=not args.no_crc),
        also=["webdataset"] if args.only_warm else ["cold", "webdataset"],
    )
    if args.json:
        echo(json.dumps(result, indent=1))
        return
    checked = "crc32c checked" if result["check_crc"] else "crc32c not checked"
    rows = []
    for kind, threads in (("memcpy", result["memcpy"]), ("warm", result["threads"]), ("cold", result.get("cold", {}))):
        rows += [_rate(f"{kind}, {count} thread{'s' if count > 1 else ''}", row) for count, row in threads.items()]
    echo(
        f"{result['samples']:,} samples of {result['sample_bytes'] / 1e6:.2f} MB, batch {result['batch']}, {checked}; "
        f"medians of {result['rounds']} rounds; {result['cores']} cores, load {result['load']:.1f}",
        table([*rows, _rate("plain webdataset", result["webdataset"])]),
        f"The fastest warm reader has {result['memcpy_ratio']:.2f} of one core's memcpy, and "
        f"{result['webdataset_ratio']:.1f} times webdataset's rate.",
    )
    if result["check_crc"]:
        echo(
            f"Floor: copying, and crc32c of bytes in the cache ({result['crc32c_cpu_ms_per_sample']:.3f} ms a sample): "
            f"one core alone reaches at most {result['floor_ratio']:.2f} of memcpy; more threads, more."
        )


def _rate(name: str, row: dict[str, Any]) -> dict[str, str]:
    """A row of a table; the reason where it could not be measured."""
    if "error" in row:
        return {"": f"{name} failed: {row['error']}", "samples/s": "-", "of memcpy": "-", "CPU ms/sample": "-"}
    rate, ratio, cpu = row["samples_per_second"], row["memcpy_ratio"], row["cpu_ms_per_sample"]
    return {"": name, "samples/s": f"{rate:,.0f}", "of memcpy": f"{ratio:.3f}", "CPU ms/sample": f"{cpu:.3f}"}


def _peers(args: argparse.Namespace) -> None:
    import json

    from cpsp_dist.bench.peers import bench_peers

    rows = bench_peers(args.envs, args.samples, args.peer or list(PEERS))
    echo(json.dumps(rows, indent=1) if args.json else table([_rate(name, row) for name, row in rows.items()]))


def _pool(args: argparse.Namespace) -> None:
    import json

    from cpsp_dist.bench.pool import bench_pool, bench_tiles

    if args.tiles:
        costs = bench_tiles(args.batch, args.pools)
        echo(json.dumps(costs, indent=1) if args.json else table(_tiles(costs)))
        return
    result = bench_pool(batch=args.batch, ranks=args.ranks, pools=args.pools, rounds=args.rounds)
    echo(json.dumps(result, indent=1) if args.json else _describe_pool(result, args.batch))


def _describe_pool(result: dict[str, Any], batch: int) -> str:
    exchange = [
        {
            "ranks": world,
            "collectives": row["collectives"],
            "floor, 2 ways": f"{2 * row['floor_bytes']:,}",
            "bytes": f"{row['bytes']:,}",
            "on the wire": "unknown" if row["wire_bytes"] is None else f"{row['wire_bytes']:,}",
            "waited ms": f"{row['gather_ms']:.1f}",
        }
        for world, row in result["ranks"].items()
    ]
    steps = [
        {"ranks": world}
        | {pool: f"{ms:.0f}" for pool, ms in zip(POOLS, row["step_ms"].values(), strict=True)}
        | {f"CPU {pool}": f"{ms:.0f}" for pool, ms in zip(POOLS, row["step_cpu_ms"].values(), strict=True)}
        for world, row in result["ranks"].items()
    ]
    sizes = [
        {"pool": size, "ms": f"{row['ms']:.2f}", "product ms": f"{row['floor_ms']:.2f}"}
        | {
            kind: "not run" if kept is None else f"{kept:,}"
            for kind, kept in zip(("two-stage", "full matrix", "replicated"), row["saved_bytes"].values(), strict=True)
        }
        for size, row in result["pools"].items()
    ]
    lines = [
        f"{batch} videos a rank, embeddings of {result['width']}, medians of {result['rounds']} rounds",
        "A step's pool: received bytes forward and backward, of them the floor (W-1)*b*d*4 each way",
        table(exchange),
        "A complete step of a rank with the pool off, local, gathered: time and CPU time in ms",
        table(steps),
        "Pools (simulated): CPU time of mining, loss and backward; of the bare product; bytes kept for backward",
        table(sizes),
        "Pools in tiles (simulated): CPU ms of values and gradient; MB beside the pool's rows and their gradient",
        table(_tiles(result["tiles"])),
        *(
            f"4 parts of {batch} videos, {'one pool over all' if over == 'parts' else 'a pool for each'}: "
            f"{row['pool']:.0f} videos in the pool, {row['ms']:.0f} ms CPU, {row['peak_bytes'] / 1e6:.0f} MB at most"
            for over, row in result["parts"].items()
        ),
    ]
    if "share" in result:
        share = result["share"]
        shares = f"{share['share']:.2%} of a training step's CPU time ({share['least']:.2%} to {share['most']:.2%})"
        lines.append(
            f"A pool of {share['pool']:,} at {batch} videos a rank: {shares}; its bare product "
            f"{share['floor_share']:.2%}"
        )
    return "\n".join(lines)


def _tiles(result: dict[str, dict[str, dict[str, float]]]) -> list[dict[str, str]]:
    return [
        {"pool": count}
        | {f"{way} ms": f"{cost['ms']:.0f}" for way, cost in row.items()}
        | {f"{way} MB": f"{cost['peak_bytes'] / 1e6:.1f}" for way, cost in row.items()}
        for count, row in result.items()
    ]


def _step(args: argparse.Namespace) -> None:
    if args.batch < 3:
        raise UserError("--batch: at least 3, since the published loss compares a video with 3 others")
    import json

    from cpsp_dist.bench.step import bench_step

    result = bench_step(batch=args.batch, channels=args.channels, rounds=args.rounds)
    echo(json.dumps(result, indent=1) if args.json else _describe_step(result))


def _describe_step(result: dict[str, Any]) -> str:
    rows = [
        {
            "": name,
            "samples/s": f"{row['samples_per_second']:,.0f}",
            "ms": f"{row['ms']:.1f}",
            "of products": f"{row['matmul_share']:.2f}",
        }
        for name, row in result["ways"].items()
    ]
    lines = [
        f"{result['device']}, {result['threads']} threads, load {result['load']:.1f}; batch {result['batch']}, "
        f"{result['channels']} channels; medians of {result['rounds']} rounds; float32 products: "
        f"{result['matmul_gflops']:,.0f} GFLOP/s",
        table(rows),
        *(
            f"{name} has {ratio:.2f} times the rate of the published network in fp32"
            for name, ratio in result["ratios"].items()
        ),
        f"most memory: {result['peak_bytes'] / 1e9:.2f} GB",
    ]
    if "busy_share" in result:
        lines += [
            f"{name}: GPU busy {share:.0%}, {result['kernels'][name]:.0f} kernels"
            for name, share in result["busy_share"].items()
        ]
        lines.append(f"copies to the GPU: {result['h2d_ms']:.2f} ms a step")
    loop = result["end_to_end"]
    lines.append(
        f"from shards, end to end: {loop['samples_per_second']:,.0f} samples/s, waiting for data "
        f"{loop['data_wait_share']:.0%}"
    )
    return "\n".join(lines)


def _scaling(args: argparse.Namespace) -> None:
    import json

    from cpsp_dist.bench.scaling import bench_scaling

    result = bench_scaling(batch=args.batch, ranks=args.ranks, rounds=args.rounds)
    echo(json.dumps(result, indent=1) if args.json else _describe_scaling(result))


def _describe_scaling(result: dict[str, Any]) -> str:
    rows = [
        {
            "ranks": world,
            "samples/s": f"{row['samples_per_second']:,.0f}",
            "efficiency": f"{row['efficiency']:.2f}",
            "step ms": f"{row['step_ms']:.0f}",
            "waited ms": f"{row['waited_ms']:.1f}",
            "pool bytes": f"{row['pool_bytes']:,}",
            "gradient bytes": f"{row['gradient_bytes']:,}",
        }
        | ({"H2D ms": f"{row['h2d_ms']:.2f}", "GPU busy": f"{row['busy_share']:.0%}"} if "h2d_ms" in row else {})
        for world, row in result["ranks"].items()
    ]
    title = (
        f"{result['device']}; {result['batch']} videos a rank, one thread each, {result['cores']} cores; medians of "
    )
    return f"{title}{result['rounds']} rounds\n{table(rows)}"
