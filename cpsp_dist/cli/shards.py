"""`cpsp-dist shards …`: pack features into shards, check them, look at them."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import re

from cpsp_dist.cli import shards_rework
from cpsp_dist.cli.paths import local_path, require_replaceable
from cpsp_dist.packing import LAYOUTS
from cpsp_dist.utils.console import echo
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.numbers import integer, real

logger = logging.getLogger(__name__)


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    shards = commands.add_parser("shards", help="pack features into shards, verify, look at them")
    actions = shards.add_subparsers(title="actions", metavar="ACTION", required=True)
    _register_pack(actions)
    shards_rework.register(actions)

    verify = actions.add_parser("verify", help="read every byte against the manifest's hashes")
    verify.add_argument("folder", help="folder of shards, or its URL")
    verify.set_defaults(handler=_verify)

    info = actions.add_parser("info", help="splits, sizes, types and classes of a folder of shards")
    info.add_argument("folder", help="folder of shards, or its URL")
    info.set_defaults(handler=_info)

    preview = actions.add_parser("preview", help="show samples' labels over their seconds")
    preview.add_argument("folder", help="folder of shards, or its URL")
    preview.add_argument("--split", help="of this split only")
    preview.add_argument("-n", type=integer, default=10, help="so many samples (default 10)")
    preview.add_argument("--key", action="append", help="this sample (a key, or a video id); may be given again")
    preview.add_argument("--png", type=local_path, metavar="FILE", help="also draw their features and labels")
    preview.add_argument("--html", type=local_path, metavar="FILE", help="also write a page with them")
    preview.set_defaults(handler=_preview)

    _register_plan(actions)

    keypad = actions.add_parser("keypad", help="generate the demo corpus, in AVE's file layout")
    keypad.add_argument("--out", type=local_path, required=True, help="folder to make")
    for split, size in (("train", 600), ("val", 100), ("test", 200)):
        keypad.add_argument(f"--{split}", type=integer, default=size, metavar="N", help=f"videos (default {size})")
    keypad.add_argument("--seed", type=integer, default=0)
    keypad.set_defaults(handler=_keypad)


def _register_plan(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = actions.add_parser("plan", help="simulate an epoch on a cluster, from the manifest alone")
    plan.add_argument("folder", help="folder of shards, or its URL")
    plan.add_argument("--split", default="train", help="(default: %(default)s)")
    plan.add_argument("--nodes", type=integer, default=1, help="(default: %(default)s)")
    plan.add_argument("--gpus", type=integer, default=8, help="ranks of each node (default: %(default)s)")
    plan.add_argument("--batch", type=integer, default=64, help="videos of a rank in each step (default: %(default)s)")
    plan.add_argument(
        "--order", choices=("full", "interleaved"), default="full", help="interleaved: for shards at a URL"
    )
    plan.add_argument("--epoch-end", choices=("carry", "drop", "pad"), default="carry", help="as data.epoch_end")
    plan.add_argument("--step-seconds", type=real, help="seconds a training step takes: gives the bandwidth it needs")
    plan.set_defaults(handler=_plan)


def _register_pack(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    pack = actions.add_parser(
        "pack",
        help="pack features in a published layout into tar shards",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Pack features into webdataset tar shards with a manifest.\n\nlayouts:\n"
        + "\n".join(f"  {name:14} {LAYOUTS.description(name)}" for name in LAYOUTS),
    )
    pack.add_argument("--layout", required=True, choices=LAYOUTS, help="how the features are stored")
    pack.add_argument("--out", type=local_path, required=True, help="folder to make")
    source = pack.add_argument_group("source", "A file with its usual name in --source needs no flag of its own.")
    source.add_argument("--source", type=local_path, help="folder of the features")
    source.add_argument("--visual", "--video", type=local_path, help="visual features: a file or folder, by layout")
    source.add_argument("--audio", type=local_path, help="audio features: a file or folder, by layout")
    source.add_argument(
        "--labels",
        "--label",
        type=local_path,
        help='segment labels: a file or folder, by layout; with a csv also a json file, {"ID": {"label": [0, 1, …]}}',
    )
    source.add_argument("--mil", type=local_path, help="video labels (mil_labels.h5)")
    source.add_argument("--annotations", type=local_path, help="Annotations.txt")
    source.add_argument("--categories", type=local_path, help="class names, one a line, in class order")
    shards_rework.add_encoders(source)
    source.add_argument("--csv", type=local_path, help="category,video_id,split of every video")
    source.add_argument(
        "--noisy",
        action="store_true",
        help="ave-h5: also the background videos in --source (visual_feature_noisy.h5, audio_feature_noisy.h5), as "
        "training videos without an event, for weak supervision",
    )
    source.add_argument(
        "--visual-order",
        choices=("auto", "last", "first"),
        default="auto",
        help="axes of a visual map: channels last [T,H,W,C] or first [T,C,H,W]; stored channels last (default auto)",
    )
    pack.add_argument("--visual-dtype", choices=("float16", "float32"), default="float16", help="default float16")
    pack.add_argument("--shard-mb", type=real, default=130, help="megabytes (10^6 bytes) a shard, about (default 130)")
    pack.add_argument("--seed", type=integer, default=0, help="of the one shuffle at packing (default 0)")
    pack.add_argument("--overwrite", action="store_true", help="replace shards that are in --out already")
    pack.add_argument("--workers", type=integer, help="processes (default: one a gigabyte, at most one a core)")
    pack.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="videos that cannot be packed: list them and stop, or leave them out (listed in skipped.txt)",
    )
    pack.add_argument(
        "--portion",
        metavar="I/N",
        help="make only the I-th of N portions of the shards (from 0), for an array of N jobs; the same command "
        "without --portion then finishes",
    )
    pack.set_defaults(handler=_pack)


def _pack(args: argparse.Namespace) -> int:
    from cpsp_dist.packing.pack import pack, pack_portion
    from cpsp_dist.packing.plan import PackOptions
    from cpsp_dist.packing.preview import describe_shards
    from cpsp_dist.packing.source import SourceOptions, open_source

    number, _, portions = (args.portion or "").partition("/")
    if args.portion and not (re.fullmatch("[0-9]{1,9}/[0-9]{1,9}", args.portion) and int(number) < int(portions)):
        raise UserError(f"--portion {args.portion}: write it as I/N, with I from 0 to N - 1")
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers}: has to be 1 or more")
    options = PackOptions(args.visual_dtype, args.shard_mb, args.seed, args.on_error)
    source = open_source(SourceOptions(**{f.name: getattr(args, f.name) for f in dataclasses.fields(SourceOptions)}))
    for note in source.notes:
        logger.info(f"note: {note}")
    if args.portion:
        made, shards = pack_portion(
            source, args.out, options, int(number), int(portions), overwrite=args.overwrite, workers=args.workers
        )
        echo(f"{args.out}.part: {made} of {shards} shards made by portion {args.portion}; not finished yet")
        return 0
    manifest = pack(source, args.out, options, overwrite=args.overwrite, workers=args.workers)
    echo(describe_shards(manifest))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from cpsp_dist.packing.verify import verify

    manifest = verify(args.folder)
    echo(f"{manifest.place}: {len(manifest.samples):,} samples in {len(manifest.shards)} shards, every byte as packed")
    return 0


def _info(args: argparse.Namespace) -> int:
    from cpsp_dist.data.manifest import Manifest
    from cpsp_dist.packing.preview import describe_shards

    echo(describe_shards(Manifest.load(args.folder)))
    return 0


def _preview(args: argparse.Namespace) -> int:
    from cpsp_dist.data.manifest import Manifest
    from cpsp_dist.packing.preview import preview, read_samples, select
    from cpsp_dist.report.page import write
    from cpsp_dist.report.preview_page import draw, preview_page, require_few

    manifest = Manifest.load(args.folder)
    rows = select(manifest, args.split, args.n, args.key)
    if not rows:
        raise UserError(f"-n {args.n}: has to be 1 or more")
    for flag, path, endings in (("--png", args.png, (".png",)), ("--html", args.html, (".html", ".htm"))):
        if path:
            require_replaceable(flag, path, endings)
            require_few(len(rows), flag)
    seconds = manifest.encoders.segment_seconds
    samples = [*read_samples(manifest, rows)] if args.png or args.html else []
    lines = [*preview(manifest, rows)]
    if args.png:
        draw(samples, seconds, args.png)
        lines.append(f"{args.png}: a picture of {len(samples)} samples")
    if args.html:
        write(preview_page(samples, manifest.place, seconds), args.html)
        lines.append(f"{args.html}: open it in a browser")
    echo(*lines)
    return 0


def _plan(args: argparse.Namespace) -> int:
    from cpsp_dist.data.manifest import Manifest
    from cpsp_dist.data.reader import ReaderOptions
    from cpsp_dist.data.reader.simulate import describe_simulation, simulate

    sizes = {"nodes": args.nodes, "gpus": args.gpus, "batch": args.batch}
    found = simulate(
        Manifest.load(args.folder),
        args.split,
        options=ReaderOptions(order=args.order, epoch_end=args.epoch_end),
        step_seconds=args.step_seconds,
        **sizes,
    )
    echo(describe_simulation(found))
    return 0


def _keypad(args: argparse.Namespace) -> int:
    from cpsp_dist.demo.keypad import generate

    generate(args.out, {"train": args.train, "val": args.val, "test": args.test}, args.seed)
    echo(f"{args.out}: keypad with {args.train} train, {args.val} val, {args.test} test videos, in AVE's layout")
    return 0
