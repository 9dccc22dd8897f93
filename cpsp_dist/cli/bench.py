"""`cpsp-dist bench …`: measure this program on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpsp_dist.cli.paths import local_path

PEERS = ("webdataset", "mosaicml", "litdata", "published")


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
    loader.add_argument("--samples", type=_count, default=2000, help="so many samples a round (default: %(default)s)")
    loader.add_argument("--batch", type=_count, default=64, help="samples a batch (default: %(default)s)")
    loader.add_argument("--depth", type=_count, default=3, help="batches read ahead (default: %(default)s)")
    loader.add_argument("--threads", type=_count, nargs="+", default=[1, 2, 4, 8], metavar="N", help="default: 1 2 4 8")
    loader.add_argument("--rounds", type=_count, default=5, help="at least so many (default: %(default)s)")
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
    peers.add_argument("--samples", type=_count, default=1024, help="so many samples (default: %(default)s)")
    peers.add_argument("--peer", action="append", choices=PEERS, help="this one only; may be given again")
    peers.add_argument("--json", action="store_true", help="print JSON instead of a table")
    peers.set_defaults(handler=_peers)

    pool = benches.add_parser(
        "pool",
        help="what the gathered pool costs",
        description="Bytes, collectives, memory and time of the contrastive pool, with ranks of this machine over gloo"
        " (one thread each), and for pools that they cannot fill.",
    )
    pool.add_argument("--batch", type=_count, default=64, help="videos a rank (default: %(default)s)")
    pool.add_argument("--ranks", type=_count, nargs="+", default=[1, 2, 4], metavar="W", help="default: 1 2 4")
    sizes = [64, 256, 1024, 4096, 16384, 65536]
    pool.add_argument("--pools", type=_count, nargs="+", default=sizes, metavar="N", help="default: 64 to 65536")
    pool.add_argument("--rounds", type=_count, default=5, help="default: %(default)s")
    pool.add_argument("--json", action="store_true", help="print JSON instead of a table")
    pool.set_defaults(handler=_pool)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 1 on")
    return int(text)


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
        print(json.dumps(result, indent=1))
        return
    checked = "crc32c checked" if result["check_crc"] else "crc32c not checked"
    print(f"{result['samples']:,} samples of {result['sample_bytes'] / 1e6:.2f} MB, batch {result['batch']},", end=" ")
    print(f"{checked}; medians of {result['rounds']} rounds; {result['cores']} cores, load {result['load']:.1f}")
    print(f"{'':22} {'samples/s':>10} {'of memcpy':>10} {'CPU ms/sample':>14}")
    for kind, rows in (("memcpy", result["memcpy"]), ("warm", result["threads"]), ("cold", result.get("cold", {}))):
        for count, row in rows.items():
            _print_row(f"{kind}, {count} thread{'s' if count > 1 else ''}", row)
    _print_row("plain webdataset", result["webdataset"])
    print(f"The fastest warm reader has {result['memcpy_ratio']:.2f} of one core's memcpy, and", end=" ")
    print(f"{result['webdataset_ratio']:.1f} times webdataset's rate.")
    if result["check_crc"]:
        print(f"Floor: copying, and crc32c of bytes in the cache ({result['crc32c_cpu_ms_per_sample']:.3f} ms", end=" ")
        print(f"a sample): one core alone reaches at most {result['floor_ratio']:.2f} of memcpy; more threads, more.")


def _print_row(name: str, row: dict[str, float]) -> None:
    rate, ratio, cpu = row["samples_per_second"], row["memcpy_ratio"], row["cpu_ms_per_sample"]
    print(f"{name:22} {rate:10,.0f} {ratio:10.3f} {cpu:14.3f}")


def _peers(args: argparse.Namespace) -> None:
    import json

    from cpsp_dist.bench.peers import bench_peers

    rows = bench_peers(args.envs, args.samples, args.peer or list(PEERS))
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'':22} {'samples/s':>10} {'of memcpy':>10} {'CPU ms/sample':>14}")
    for name, row in rows.items():
        if "error" in row:
            print(f"{name:22} failed: {row['error']}")
            continue
        _print_row(name, row)


def _pool(args: argparse.Namespace) -> None:
    import json

    from cpsp_dist.bench.pool import bench_pool

    result = bench_pool(batch=args.batch, ranks=args.ranks, pools=args.pools, rounds=args.rounds)
    if args.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{args.batch} videos a rank, embeddings of {result['width']}, medians of {result['rounds']} rounds")
    print("A step's pool: received bytes forward and backward, of them the floor (W-1)*b*d*4 each way")
    print(f"{'ranks':>5} {'collectives':>11} {'floor, 2 ways':>13} {'bytes':>10} {'on the wire':>11}", end=" ")
    print(f"{'waited ms':>9}")
    for world, row in result["ranks"].items():
        wire = "unknown" if row["wire_bytes"] is None else f"{row['wire_bytes']:,}"
        print(f"{world:5} {row['collectives']:11} {2 * row['floor_bytes']:13,} {row['bytes']:10,} {wire:>11}", end=" ")
        print(f"{row['gather_ms']:9.1f}")
    print("A whole step of a rank with the pool off, local, gathered: time and CPU time in ms")
    print(f"{'ranks':>5} {'off':>8} {'local':>8} {'gathered':>8} {'CPU off':>9} {'CPU local':>9} {'CPU gathered':>12}")
    for world, row in result["ranks"].items():
        step, cpu = row["step_ms"].values(), row["step_cpu_ms"].values()
        print(
            f"{world:5}",
            *(f"{ms:8.0f}" for ms in step),
            *(f"{ms:{n}.0f}" for ms, n in zip(cpu, (9, 9, 12), strict=True)),
        )
    print("Pools (simulated): CPU time of mining, loss and backward; of the bare product; bytes kept for backward")
    print(f"{'pool':>6} {'ms':>9} {'product ms':>10} {'two-stage':>12} {'full matrix':>13} {'replicated':>15}")
    for size, row in result["pools"].items():
        kept = ["not run" if x is None else f"{x:,}" for x in row["saved_bytes"].values()]
        print(f"{size:>6} {row['ms']:9.2f} {row['floor_ms']:10.2f} {kept[0]:>12} {kept[1]:>13} {kept[2]:>15}")
    if "share" in result:
        share = result["share"]
        shares = f"{share['share']:.2%} of a training step's CPU time ({share['least']:.2%} to {share['most']:.2%})"
        print(f"A pool of {share['pool']:,} at {args.batch} videos a rank: {shares}; its bare product", end=" ")
        print(f"{share['floor_share']:.2%}")
