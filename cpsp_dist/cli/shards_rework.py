"""`cpsp-dist shards index, merge, subset, split`: other folders of shards, made of finished ones."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from cpsp_dist.cli.paths import local_path
from cpsp_dist.utils.console import echo
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.numbers import integer, real

if TYPE_CHECKING:
    from cpsp_dist.data.manifest import Manifest
    from cpsp_dist.packing.packed import Packed


def register(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    index = actions.add_parser("index", help="write the manifest of a folder of tars, from the tars alone")
    index.add_argument("folder", type=local_path, help="folder of tars, also of others' (see docs/shard-format.md)")
    index.add_argument("--categories", type=local_path, help="class names, one a line, in class order")
    add_encoders(index)
    index.set_defaults(handler=_index)

    merge = actions.add_parser("merge", help="one folder of the shards of several")
    merge.add_argument("folders", type=local_path, nargs="+", help="folders of shards, of the same classes and shapes")
    merge.add_argument("--out", type=local_path, required=True, help="folder to make")
    merge.set_defaults(handler=_merge)

    subset = actions.add_parser("subset", help="pack a part of a folder of shards")
    subset.add_argument("folder", type=local_path, help="folder of shards")
    subset.add_argument("--out", type=local_path, required=True, help="folder to make")
    size = subset.add_mutually_exclusive_group(required=True)
    size.add_argument("--first", type=integer, metavar="N", help="the first N videos of each class in each split")
    size.add_argument(
        "--fraction", type=real, metavar="F", help="this share of each class in each split, drawn by --seed"
    )
    subset.add_argument("--split", action="append", help="this split only; may be given again")
    subset.set_defaults(handler=_subset)

    split = actions.add_parser("split", help="pack a folder of shards as several, no video in two of them")
    split.add_argument("folder", type=local_path, help="folder of shards")
    split.add_argument("--out", type=local_path, required=True, help="folder in which to make one for each part")
    split.add_argument(
        "--part", action="append", required=True, metavar="NAME=SHARE", help="a part and its share of each class"
    )
    split.set_defaults(handler=_split)
    for parser in (subset, split):
        parser.add_argument("--seed", type=integer, default=0, help="of what is drawn, and of the shuffle (default 0)")
        parser.add_argument("--shard-mb", type=real, default=130, help="megabytes a shard, about (default 130)")
        parser.add_argument("--workers", type=integer, help="processes (default: one a gigabyte, at most one a core)")


def add_encoders(parser: argparse._ActionsContainer) -> None:
    for modality in ("visual", "audio"):
        text = f"name of the {modality} encoder, where nothing records it (an extraction's encoders.json does)"
        parser.add_argument(f"--{modality}-encoder", metavar="NAME", help=text)


def _index(args: argparse.Namespace) -> int:
    from cpsp_dist.packing.encoders import kept_encoders, with_names
    from cpsp_dist.packing.preview import describe_shards
    from cpsp_dist.packing.rework import rebuild
    from cpsp_dist.packing.text import read_categories

    categories = read_categories(args.categories) if args.categories else None
    kept = kept_encoders(args.folder)
    encoders = with_names(kept, args.visual_encoder, args.audio_encoder, str(args.folder))
    echo(describe_shards(rebuild(args.folder, categories, encoders)))
    return 0


def _merge(args: argparse.Namespace) -> int:
    from cpsp_dist.packing.preview import describe_shards
    from cpsp_dist.packing.rework import merge

    echo(describe_shards(merge(args.folders, args.out)))
    return 0


def _subset(args: argparse.Namespace) -> int:
    from cpsp_dist.packing.preview import describe_shards
    from cpsp_dist.packing.rework import subset

    if args.first is not None and args.first < 1:
        raise UserError(f"--first {args.first}: has to be 1 or more")
    if args.fraction is not None and not 0 < args.fraction <= 1:
        raise UserError(f"--fraction {args.fraction:g}: has to be above 0, and 1 at most")
    source = _packed(args)
    for split in args.split or ():
        source.manifest.rows(split)  # names the splits that there are, if not this one
    entries = [e for e in source.entries if not args.split or e.split in args.split]
    source.entries = subset(entries, first=args.first, fraction=args.fraction, seed=args.seed)
    echo(describe_shards(_repack(args, source, args.out)))
    return 0


def _split(args: argparse.Namespace) -> int:
    from cpsp_dist.data.manifest import Manifest
    from cpsp_dist.packing.preview import describe_shards
    from cpsp_dist.packing.rework import cut
    from cpsp_dist.packing.target import workplace

    shares = {}
    for part in args.part:
        name, _, share = part.partition("=")
        if not re.fullmatch(r"[\w-]+=[0-9]{0,9}\.?[0-9]{1,9}", part) or float(share) <= 0:
            raise UserError(f"--part {part}: write it as NAME=SHARE, for example a=0.5")
        shares[name] = float(share)
    source = _packed(args)
    parts = cut(source.entries, shares, args.seed)
    if empty := [name for name, entries in parts.items() if not entries]:
        raise UserError(f"{args.folder}: too few videos to give part '{empty[0]}' any; give it a larger share")
    with workplace(args.out) as part_of_out:  # all parts or none
        for name, entries in parts.items():
            source.entries = entries
            _repack(args, source, part_of_out / name)
    echo(*(describe_shards(Manifest.load(args.out / name)) for name in parts))
    return 0


def _packed(args: argparse.Namespace) -> Packed:
    from cpsp_dist.packing.packed import Packed
    from cpsp_dist.packing.source import SourceOptions

    return Packed(SourceOptions("packed", source=args.folder))


def _repack(args: argparse.Namespace, source: Packed, out: Path) -> Manifest:
    from cpsp_dist.packing.pack import pack
    from cpsp_dist.packing.plan import PackOptions

    dtype = {"<f2": "float16", "<f4": "float32"}[source.manifest.fields["visual"].dtype]
    return pack(source, out, PackOptions(dtype, args.shard_mb, args.seed), workers=args.workers)
