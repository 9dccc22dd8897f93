"""`cpsp-dist extract`: features of a folder of videos."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

from cpsp_dist.cli.paths import local_path
from cpsp_dist.utils.console import echo
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.numbers import integer, real

#: Segments of a clip, more than a day of seconds; decoding processes.
MOST_SEGMENTS, MOST_WORKERS = 100_000, 1024


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "extract",
        help="features of videos, for shards pack, or as shards",
        description="Decode videos and run the encoders over them. The folder that it fills goes to `cpsp-dist shards "
        "pack --layout npy --source OUT`; with --shards it is a folder of shards. The same command again resumes: "
        "videos that are complete are kept.",
    )
    parser.add_argument(
        "--videos", type=local_path, metavar="DIR", required=True, help="folder of ID.mp4, .mkv, .webm or ID_START.mp4"
    )
    parser.add_argument(
        "--csv",
        type=local_path,
        metavar="FILE",
        required=True,
        help="category,video_id,split[,start][,label], "
        "VGGSound's csv, or AVE's Annotations.txt beside the files of its splits",
    )
    for modality, example in (("visual", "efficientnet-lite0"), ("audio", "logmel")):
        parser.add_argument(f"--{modality}", metavar="ENCODER", required=True, help=f"{modality} encoder, as {example}")
        parser.add_argument(f"--{modality}-weights", type=local_path, metavar="FILE", help="its weights")
    parser.add_argument("--out", type=local_path, metavar="DIR", help="folder to fill")
    parser.add_argument(
        "--labels",
        type=local_path,
        metavar="PATH",
        help='a json file, {"ID": {"label": [0, 1, …]}}, or a folder of ID.zip or ID.npy',
    )
    parser.add_argument(
        "--categories", type=local_path, metavar="FILE", help="class names (default: as listed, sorted)"
    )
    parser.add_argument("--segments", type=integer, default=10, metavar="N", help="of a clip (default: %(default)s)")
    parser.add_argument("--segment-seconds", type=real, default=1.0, metavar="S", help="(default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU where there is one)")
    parser.add_argument(
        "--precision", choices=("float32", "float16"), default="float32", help="of the encoders (default: %(default)s)"
    )
    parser.add_argument("--workers", type=integer, metavar="N", help="decoding processes (default: one a core)")
    parser.add_argument(
        "--deadline", type=real, default=300.0, metavar="S", help="seconds to decode a clip in (default: %(default)g)"
    )
    parser.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="videos that cannot be extracted: stop, or leave them out (listed in report.jsonl)",
    )
    parser.add_argument(
        "--portion",
        metavar="I/N",
        help="only the I-th of N portions of the videos (from 0), for an array of N jobs; the same command without "
        "--portion then finishes",
    )
    _add_shards_and_plan(parser)
    parser.set_defaults(handler=_extract)


def _add_shards_and_plan(parser: argparse.ArgumentParser) -> None:
    shards = parser.add_argument_group("shards")
    shards.add_argument("--shards", action="store_true", help="write shards, and no npy files")
    shards.add_argument("--visual-dtype", choices=("float16", "float32"), help="of them (default: float16)")
    shards.add_argument("--shard-mb", type=real, metavar="N", help="megabytes a shard, about (default: 130)")
    plan = parser.add_argument_group("forecast")
    plan.add_argument("--plan", action="store_true", help="print bytes and hours that it will take, and write nothing")
    plan.add_argument("--rate", type=real, metavar="R", help="videos/s of one job (default: measured on a few clips)")
    plan.add_argument("--clips", type=integer, metavar="N", help="to measure on (default: 8)")
    plan.add_argument("--count", type=integer, metavar="N", help="videos to plan for (default: those with a file)")
    plan.add_argument("--jobs", type=integer, metavar="N", help="jobs at once, of a GPU each (default: 16)")


def _extract(args: argparse.Namespace) -> None:
    if not 1 <= args.segments <= MOST_SEGMENTS:
        raise UserError(f"--segments {args.segments}: has to be from 1 to {MOST_SEGMENTS}")
    if not 0.01 <= args.segment_seconds <= 3600:
        raise UserError(f"--segment-seconds {args.segment_seconds:g}: has to be from 0.01 to 3600")
    if args.workers is not None and not 1 <= args.workers <= MOST_WORKERS:
        raise UserError(f"--workers {args.workers}: has to be from 1 to {MOST_WORKERS}")
    if args.deadline <= 0:
        raise UserError(f"--deadline {args.deadline:g}: has to be more than 0")
    _check_plan(args)
    for flag in ("visual_dtype", "shard_mb"):
        if getattr(args, flag) is not None and not (args.shards or args.plan):
            raise UserError(f"--{flag.replace('_', '-')} is of --shards; give that, too")
    if args.shard_mb is not None and args.shard_mb <= 0:
        raise UserError(f"--shard-mb {args.shard_mb:g}: has to be more than 0")
    number, _, portions = (args.portion or "").partition("/")
    if args.portion and not (re.fullmatch("[0-9]{1,9}/[0-9]{1,9}", args.portion) and int(number) < int(portions)):
        raise UserError(f"--portion {args.portion}: write it as I/N, with I from 0 to N - 1")
    from cpsp_dist.distributed.launchers import require_one_process

    require_one_process("extract")
    from cpsp_dist.extraction.extract import ExtractOptions, extract

    names = [each.name for each in dataclasses.fields(ExtractOptions)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    given["portion"] = (int(number), int(portions)) if args.portion else None
    if args.plan:
        from cpsp_dist.extraction.forecast import CLIPS, forecast

        options = ExtractOptions(**({"out": Path()} | given))
        planned = forecast(options, rate=args.rate, clips=args.clips or CLIPS, count=args.count)
        echo(planned.text(args.jobs or 16))
        return
    found = extract(ExtractOptions(**given))
    unfinished = f"; portion {args.portion}, not finished yet" if args.portion else ""
    echo(f"{args.out}: {found.text()}{unfinished}")


def _check_plan(args: argparse.Namespace) -> None:
    """Raises UserError."""
    for flag in ("rate", "clips", "count", "jobs"):
        value = getattr(args, flag)
        if value is not None and not args.plan:
            raise UserError(f"--{flag} is of --plan; give that, too")
        if value is not None and value <= 0:
            raise UserError(f"--{flag} {value:g}: has to be more than 0")
    if args.rate is not None and args.clips is not None:
        raise UserError(f"--clips {args.clips}: with --rate nothing is measured; leave one of them out")
    if args.plan and args.portion:
        raise UserError("--plan is about all videos; leave --portion out, and give --jobs")
    if args.out is None and not args.plan:
        raise UserError("--out is needed: the folder to fill")
