"""Other folders of shards from finished ones: index rebuilt, folders merged, one cut into parts, a part of one."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from cpsp_dist.data.manifest import Manifest
from cpsp_dist.errors import DataError, UserError
from cpsp_dist.packing.index import IndexedShard, assemble, index_shard, split_order
from cpsp_dist.packing.plan import keyed_hash
from cpsp_dist.packing.source import Entry
from cpsp_dist.packing.target import workplace
from cpsp_dist.utils.progress import progress


def rebuild(folder: Path, categories: list[str] | None = None) -> Manifest:
    """Write the manifest of the tars in `folder`, from the tars alone; also of tars that others wrote with webdataset.

    Each sample needs `audio.npy`, `json` (with a number `category`), `label.npy` and `visual.npy`, side by side. Where
    the json lacks `split`, a tar's name up to its first `-` is the split. `categories`: names, in class order; without
    them the samples' own, and `class k` for a class that no sample is of.

    Raises:
        DataError: naming tar, byte and sample for whatever is damaged, incomplete, interleaved or of other types.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"{folder}: no .tar files here")
    indexed = [(path.name, index_shard(path)) for path in progress(paths, unit="shards", label="indexing")]
    indexed.sort(key=lambda shard: (split_order(shard[1].split), shard[0]))
    manifest = assemble(folder, indexed, _names(folder, indexed, categories))
    manifest.save()
    return Manifest.load(folder)


def _names(folder: Path, indexed: list[tuple[str, IndexedShard]], given: list[str] | None) -> list[str]:
    found: dict[int, str] = {}
    for name, shard in indexed:
        for number, category in shard.categories.items():
            if found.setdefault(number, category) != category:
                raise DataError(f"{folder / name}: class {number} is '{category}', elsewhere '{found[number]}'")
    count = max(found, default=-1) + 1
    if given is None:
        return [found.get(number, f"class {number}") for number in range(count)]
    if len(given) < count:
        raise DataError(f"{folder}: samples of class {count - 1}, but --categories has {len(given)} names")
    return given


def merge(folders: list[Path], out: Path) -> Manifest:
    """One folder of the shards of several (hard links where the disk allows, else copies), each read to its last byte.

    Raises:
        DataError: class names, types or shapes that differ, a key that two of them have, damage.
    """
    manifests = [Manifest.load(folder) for folder in folders]
    for manifest in manifests[1:]:
        if manifest.categories != manifests[0].categories:
            raise DataError(f"{manifest.folder}: other classes than {manifests[0].folder}, or in another order")
    shards = [(manifest.path(shard), shard.split) for manifest in manifests for shard in manifest.shards]
    shards.sort(key=lambda shard: split_order(shard[1]))
    numbers: dict[str, int] = defaultdict(int)
    with workplace(out) as part:
        indexed = []
        for path, split in progress(shards, unit="shards", label="merging"):
            target = part / f"{split}-{numbers[split]:06d}.tar"
            numbers[split] += 1
            with contextlib.suppress(OSError):
                os.link(path, target)
            if not target.exists():
                shutil.copyfile(path, target)
            indexed.append((target.name, index_shard(target)))
        assemble(part, indexed, manifests[0].categories).save()
    return Manifest.load(out)


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
