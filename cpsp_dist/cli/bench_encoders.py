"""`cpsp-dist bench encoders`: how much an encoder computes in a second."""

from __future__ import annotations

import argparse

from cpsp_dist.cli.paths import local_path
from cpsp_dist.utils.console import echo, table
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.numbers import integer


def register(benches: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = benches.add_parser(
        "encoders",
        help="what an encoder computes in a second",
        description="Encode a clip of noise, as extract does; no video is decoded.",
    )
    parser.add_argument(
        "--encoder", action="append", metavar="NAME", help="may be repeated (default: those without a download)"
    )
    parser.add_argument("--weights", type=local_path, metavar="FILE", help="of the encoder, where one is named")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, … (default: %(default)s)")
    parser.add_argument("--precision", choices=("float32", "float16"), default="float32", help="(default: %(default)s)")
    parser.add_argument("--segments", type=integer, default=10, metavar="N", help="of a clip (default: %(default)s)")
    parser.add_argument("--rounds", type=integer, default=5, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(handler=_encoders)


def _encoders(args: argparse.Namespace) -> None:
    import json

    from cpsp_dist.bench.encoders import bench_encoder

    names = args.encoder or ["efficientnet-lite0", "logmel"]
    if args.weights and len(names) > 1:
        raise UserError("--weights is of one encoder; name it with --encoder")
    if args.segments < 1 or args.rounds < 1:
        raise UserError("--segments and --rounds are numbers from 1 on")
    options = {"segments": args.segments, "rounds": args.rounds}
    found = [bench_encoder(name, args.weights, args.device, args.precision, **options) for name in names]
    if args.json:
        echo(json.dumps(found, indent=1))
        return
    rows = [
        {
            "encoder": each["name"],
            "inputs": f"{each['inputs']} {'frames' if each['modality'] == 'visual' else 'seconds'}",
            "seconds": f"{each['seconds']:.3f}",
            "inputs/s": f"{each['inputs_per_second']:,.1f}",
            "seconds of video/s": f"{each['seconds_per_second']:,.1f}",
        }
        for each in found
    ]
    first = found[0]
    echo(
        f"{first['device']}, {first['precision']}, {first['threads']} threads, load {first['load']:.1f};"
        f" medians of {args.rounds} calls",
        table(rows),
    )
