"""Other folders of shards from finished ones: index rebuilt, folders merged, one cut into parts, a part of one."""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cpsp_dist.data.encoders import MODALITIES, UNKNOWN, Encoders, common_record, compare_records, encoder_text
from cpsp_dist.data.manifest import Manifest, Shard
from cpsp_dist.packing.index import IndexedShard, assemble, index_shard, split_order
from cpsp_dist.packing.plan import keyed_hash
from cpsp_dist.packing.source import Entry
from cpsp_dist.packing.target import workplace
from cpsp_dist.utils.console import Progress
from cpsp_dist.utils.errors import DataError, UserError

logger = logging.getLogger(__name__)

MAX_LISTED = 20


def rebuild(folder: Path, categories: list[str] | None = None, encoders: Encoders = UNKNOWN) -> Manifest:
    """Write the manifest of the tars in `folder`, from the tars alone; also of tars that others wrote with webdataset.

    Each sample needs `audio.npy`, `json` (with a number `category`), `label.npy` and `visual.npy`, side by side. Where
    the json lacks `split`, a tar's name up to its first `-` is the split. `categories`: names, in class order; without
    them the samples' own, and `class k` for a class that no sample is of. `encoders`: which made the features.

    Raises:
        DataError: naming tar, byte and sample for whatever is damaged, incomplete, interleaved or of other types.
    """
    if not folder.is_dir():  # raises where it may not be entered
        raise UserError(f"{folder}: no such folder")
    paths = sorted(folder / name for name in os.listdir(folder) if name.endswith(".tar"))
    if not paths:
        raise UserError(f"{folder}: no .tar files here")
    with Progress(len(paths), "shards", "indexing") as shown:
        indexed = [(path.name, index_shard(path)) for path in shown.over(paths)]
    indexed.sort(key=lambda shard: (split_order(shard[1].split), shard[0]))
    manifest = assemble(folder, indexed, _names(folder, indexed, categories), encoders)
    manifest.save()
    warn_nonfinite(folder, indexed)
    return Manifest.load(folder)


def _names(folder: Path, indexed: list[tuple[str, IndexedShard]], given: list[str] | None) -> list[str]:
    found: dict[int, str] = {}
    for name, shard in indexed:
        for number, category in shard.categories.items():
            if found.setdefault(number, category) != category:
                raise DataError(f"{folder / name}: class {number} is '{category}', elsewhere '{found[number]}'")
    count = max(found, default=-1) + 1
    if given is None:
        names = [found.get(number, f"class {number}") for number in range(count)]
        if len({*names}) < count:
            name = Counter(names).most_common(1)[0][0]
            classes = " and ".join(str(k) for k, other in enumerate(names) if other == name)
            raise DataError(f"{folder}: samples call classes {classes} '{name}'; give --categories")
        return names
    if len(given) < count:
        raise DataError(f"{folder}: samples of class {count - 1}, but --categories has {len(given)} names")
    for number, name in found.items():
        if name not in (given[number], f"class {number}"):
            raise DataError(f"{folder}: samples call class {number} '{name}', --categories '{given[number]}'")
    return given


def merge(folders: list[Path], out: Path) -> Manifest:
    """One folder of the shards of several (hard links where the disk allows, else copies), each read to its last byte.

    Raises:
        DataError: class names, types, shapes or encoders that differ, a key that two of them have, damage, a shard
            that is not what its manifest says.
    """
    manifests = [Manifest.load(folder) for folder in folders]
    for manifest in manifests[1:]:
        if manifest.categories != manifests[0].categories:
            raise DataError(f"{manifest.folder}: other classes than {manifests[0].folder}, or in another order")
    encoders = _common_encoders(manifests)
    shards = [(manifest, shard) for manifest in manifests for shard in manifest.shards]
    shards.sort(key=lambda each: split_order(each[1].split))
    numbers: dict[str, int] = defaultdict(int)
    with workplace(out) as part:
        indexed = []
        with Progress(len(shards), "shards", "merging") as shown:
            for manifest, shard in shown.over(shards):
                target = part / f"{shard.split}-{numbers[shard.split]:06d}.tar"
                numbers[shard.split] += 1
                found = _take(manifest, shard, target)
                indexed.append((target.name, found))
        assemble(part, indexed, manifests[0].categories, encoders).save()
        warn_nonfinite(out, indexed)
    return Manifest.load(out)


def _common_encoders(manifests: list[Manifest]) -> Encoders:
    """The record that holds for each of them. Raises DataError where encoders differ, or one alone is not known."""
    first, *others = manifests
    found = first.encoders
    for other in others:
        for modality in MODALITIES:
            ours, theirs = found[modality], other.encoders[modality]
            if names := compare_records(ours, theirs):
                remedy = "the features of one folder have to come from one encoder"
            elif (ours is None) != (theirs is None):
                names = encoder_text(ours), encoder_text(theirs)
                unknown = first.folder if ours is None else other.folder
                remedy = f"name it: `cpsp-dist shards index {unknown} --{modality}-encoder NAME`"
            else:
                continue
            raise DataError(
                f"{other.folder}: its {modality} encoder is {names[1]}, that of {first.folder} {names[0]}; {remedy}"
            )
        if found.segment_seconds != other.encoders.segment_seconds:
            lengths = f"last {other.encoders.segment_seconds:g} s, those of {first.folder} {found.segment_seconds:g} s"
            raise DataError(f"{other.folder}: its segments {lengths}; they have to be of one length")
        visual, audio = (common_record(found[name], other.encoders[name]) for name in MODALITIES)
        found = Encoders(visual, audio, found.segment_seconds)
    return found


def _take(manifest: Manifest, shard: Shard, target: Path) -> IndexedShard:
    """Link or copy a shard to `target`; raises DataError unless it arrives as its manifest says."""
    path = os.path.realpath(manifest.path(shard))  # a link to a link would depend on where it lies
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)
    found = index_shard(target)
    rows = np.array(manifest.samples[shard.first : shard.first + shard.nsamples])
    if found.sha256 != shard.sha256 or not same_rows(found.rows, rows):
        raise DataError(f"{manifest.path(shard)}: not the shard of {manifest.folder}; verify that folder")
    return found


def same_rows(indexed: np.ndarray, rows: np.ndarray) -> bool:
    """Whether a shard's rows are those of a sample table, but for the numbers of shards and videos."""
    indexed = indexed.copy()
    indexed["shard"], indexed["video"] = (rows[name] if len(rows) == len(indexed) else 0 for name in ("shard", "video"))
    return np.array_equal(indexed, rows)


def warn_nonfinite(folder: Path, shards: list[tuple[str, IndexedShard]]) -> None:
    """Name the arrays with NaN or infinite values, on stderr: steps with them are left out of a training."""
    found = [f"{folder / name}: {array}" for name, shard in shards for array in shard.nonfinite]
    if found:
        more = [f"and {len(found) - MAX_LISTED} more"] if len(found) > MAX_LISTED else []
        lines = [f"{len(found)} arrays hold values that are NaN or infinite:", *found[:MAX_LISTED], *more]
        logger.warning("%s", "\n  ".join(lines))


def subset(
    entries: list[Entry], *, first: int | None = None, fraction: float | None = None, seed: int = 0
) -> list[Entry]:
    """Of each class in each split the `first` n by row, or a `fraction` (rounded) drawn by `seed`."""
    chosen = []
    for (split, category), members in _classes(entries).items():
        if first is not None:
            chosen += members[:first]
        elif fraction is not None:
            drawn = sorted(members, key=lambda e: keyed_hash(seed, split, category, e.row))
            chosen += drawn[: round(fraction * len(members))]
    return sorted(chosen, key=lambda e: e.row)


def cut(entries: list[Entry], shares: dict[str, float], seed: int = 0) -> dict[str, list[Entry]]:
    """Each class of each split dealt to named parts in these shares, drawn by `seed`; a video's rows stay together."""
    parts: dict[str, list[Entry]] = {name: [] for name in shares}
    part_of: dict[str, str] = {}
    for (split, category), members in _classes(entries).items():
        drawn = sorted(
            {e.video_id for e in members} - part_of.keys(), key=lambda v: keyed_hash(seed, split, category, v)
        )
        start, reached = 0, 0.0
        for name, share in shares.items():
            reached += share
            end = round(reached / sum(shares.values()) * len(drawn))
            part_of |= dict.fromkeys(drawn[start:end], name)
            start = end
    for entry in entries:
        parts[part_of[entry.video_id]].append(entry)
    return parts


def _classes(entries: Iterable[Entry]) -> dict[tuple[str, int], list[Entry]]:
    """The entries of each (split, class), by row."""
    classes: dict[tuple[str, int], list[Entry]] = defaultdict(list)
    for entry in sorted(entries, key=lambda e: e.row):
        classes[entry.split, entry.category].append(entry)
    return classes
