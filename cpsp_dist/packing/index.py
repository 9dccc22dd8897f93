"""From a finished tar shard to its rows of the sample table: a strict reading of every byte.

The packer indexes what it has just written, `verify` indexes again and compares, `rebuild` indexes tars that came
without a manifest: there is one reading of the format. What cannot be right is an error with its byte offset: a header
that fails its checksum, padding that is not zero, a sample with a member missing, twice or apart from the others, bytes
after the end.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c

from cpsp_dist.data.encoders import UNKNOWN, Encoders
from cpsp_dist.data.manifest import ARRAY_FIELDS, SAMPLE, SPLITS, Field, Manifest, Shard
from cpsp_dist.data.shard_index import MAX_NAME, is_split_name, is_visual_shape
from cpsp_dist.packing.npy import parse_npy
from cpsp_dist.packing.tar import BLOCK, Fault, members
from cpsp_dist.packing.text import MAX_CLASSES
from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.input_files import open_input
from cpsp_dist.utils.strict_json import load_json
from cpsp_dist.utils.text import is_plain, quoted

MEMBERS = ("audio.npy", "json", "label.npy", "visual.npy")  # that every sample has
KEY_BYTES = SAMPLE["key"].itemsize
NO_CATEGORY = "(no category)"


@dataclass(frozen=True)
class IndexedShard:
    """What the bytes of one shard say. `rows` lacks the shard and video numbers, which need the other shards."""

    split: str
    filesize: int
    sha256: str
    fields: dict[str, Field]
    rows: np.ndarray  # [n] of dtype SAMPLE
    video_ids: list[str]  # of each sample
    categories: dict[int, str]  # names of those that occur
    histogram: dict[str, int]  # videos by category name
    nonfinite: list[str]  # "audio of sample 000012-abc": arrays with NaN or infinite values


def index_shard(path: Path) -> IndexedShard:
    """Read every byte of `path`.

    Raises:
        DataError: naming the shard, the byte and, where known, the sample, if anything is not as the format says.
    """
    digest = hashlib.sha256()
    reading = _Reading()
    try:
        with open_input(path) as file:
            for name, offset, data in members(file, digest):
                reading.add(name, offset, data)
            size = file.tell()
            reading.finish(size)
    except Fault as fault:
        raise DataError(f"{path}: byte {fault.offset}: {fault}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    return reading.result(path, size, digest.hexdigest())


class _Reading:
    """The samples of a shard, member by member."""

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []
        self.infos: list[dict[str, Any]] = []
        self.fields: dict[str, Field] = {}
        self.names: dict[int, str] = {}  # of the classes that occur
        self.nonfinite: list[str] = []
        self._seen: set[str] = set()
        self._missing: set[str] = set()
        self._sample = ""

    def add(self, name: str, offset: int, data: bytes) -> None:
        """One member; raises Fault."""
        key, member = _split_name(name, offset)
        if key != self._sample or not self.rows:
            self._begin(key, name, offset)
        if member not in MEMBERS:
            return  # others may store more
        if member not in self._missing:
            raise Fault(offset - BLOCK, f"{quoted(name)} is there twice")
        self._missing.remove(member)
        row, field, start = self.rows[-1], member.removesuffix(".npy"), 0
        if member == "json":
            info = _read_info(data, offset, name)
            self.infos.append(info)
            row["json_size"], row["category"] = len(data), info["category"]
            self._name_class(info, offset, name)
        else:
            array, start = _read_array(data, offset, name)
            form = Field(array.dtype.str, array.shape)
            if self.fields.setdefault(field, form) != form:
                raise Fault(offset, f"{quoted(name)} is {form}, the samples before it {self.fields[field]}")
            if field == "label":
                row["events"] = _count_events(array, offset + start, name)
            elif not is_finite(array):
                self.nonfinite.append(f"{field} of sample {key}")
        row[field] = offset + start
        row[f"{field}_crc"] = crc32c(data[start:] if start else data)

    def finish(self, size: int) -> None:
        """The archive's end, after `size` bytes; raises Fault."""
        self._check_complete(size)
        if not self.rows:
            raise Fault(0, "no samples in it")

    def result(self, path: Path, size: int, sha256: str) -> IndexedShard:
        # Tars of others may lack what only names things: the key and the file's name give it.
        split, *others = sorted({info.get("split", path.name.split("-")[0]) for info in self.infos})
        if others:
            raise DataError(f"{path}: samples of several splits in one shard: {split}, {', '.join(others)}")
        if not is_split_name(split):
            raise DataError(f"{path}: split {quoted(split)}; a split is a name of letters, digits, '_', '-' and '.'")
        pairs = zip(self.infos, self.rows, strict=True)
        ids = [info.get("video_id", row["key"].item().decode()) for info, row in pairs]
        counts = Counter(self.names.get(info["category"], NO_CATEGORY) for info in self.infos)
        histogram = dict(sorted(counts.items()))
        table = np.array(self.rows)
        return IndexedShard(split, size, sha256, self.fields, table, ids, self.names, histogram, self.nonfinite)

    def _begin(self, key: str, name: str, offset: int) -> None:
        self._check_complete(offset - BLOCK)
        if key in self._seen:
            raise Fault(offset - BLOCK, f"{quoted(name)} is apart from the other members of its sample")
        self._sample, self._missing = key, set(MEMBERS)
        self._seen.add(key)
        self.rows.append(np.zeros((), SAMPLE))
        self.rows[-1]["key"] = key.encode()

    def _check_complete(self, offset: int) -> None:
        if self._missing:
            missing = ", no ".join(sorted(self._missing))
            raise Fault(offset, f"sample '{self._sample}' is incomplete: no {missing}")

    def _name_class(self, info: dict[str, Any], offset: int, name: str) -> None:
        if (number := info["category"]) >= 0:
            given = info.get("category_name") or f"class {number}"
            if self.names.setdefault(number, given) != given:
                raise Fault(offset, f"{quoted(name)} calls class {number} '{given}', elsewhere '{self.names[number]}'")


def assemble(
    folder: Path, shards: list[tuple[str, IndexedShard]], categories: list[str], encoders: Encoders = UNKNOWN
) -> Manifest:
    """The manifest over indexed shards (name, content), in this order; splits must lie together.

    Raises:
        DataError: shards whose arrays differ in type or shape or are none of ours, a key that is there twice.
    """
    fields = {name: shards[0][1].fields[name] for name in ARRAY_FIELDS}
    _check_fields(folder / shards[0][0], fields)
    for name, shard in shards:
        if shard.fields != fields:
            raise DataError(f"{folder / name}: its samples have {shard.fields}, those of {shards[0][0]} {fields}")
    table = np.concatenate([shard.rows for _, shard in shards])
    table["shard"] = np.repeat(np.arange(len(shards)), [len(shard.rows) for _, shard in shards])
    # Numbers of video ids depend on the ids alone, so any order of the work gives the same table.
    ids = np.array([video_id for _, shard in shards for video_id in shard.video_ids])
    table["video"] = np.unique(ids, return_inverse=True)[1].ravel()
    keys, counts = np.unique(table["key"], return_counts=True)
    if (counts > 1).any():
        raise DataError(f"{folder}: key '{keys[counts > 1][0].decode()}' is there twice")
    entries, first = [], 0
    for name, shard in shards:
        count = len(shard.rows)
        entries.append(Shard(name, shard.split, first, count, shard.filesize, shard.sha256, shard.histogram))
        first += count
    return Manifest(folder, fields, categories, entries, table, encoders=encoders)


def split_order(split: str) -> tuple[int, str]:
    """Sorts splits in their usual order, others behind."""
    return SPLITS.index(split) if split in SPLITS else len(SPLITS), split


def _check_fields(path: Path, fields: dict[str, Field]) -> None:
    visual, audio, label = (fields[name] for name in ARRAY_FIELDS)
    shapes = [f.shape for f in (visual, audio, label)]
    fits = (
        is_visual_shape(visual.shape)
        and (len(audio.shape), len(label.shape)) == (2, 1)
        and len({s[0] for s in shapes}) == 1
    )
    types = visual.dtype in ("<f2", "<f4") and (audio.dtype, label.dtype) == ("<f4", "|u1")
    if not fits or not types:
        found = ", ".join(f"{name} {f.dtype} {list(f.shape)}" for name, f in fields.items())
        wanted = "visual <f2 or <f4 [T, H, W, C] or [T, C], audio <f4 [T, A], label |u1 [T]"
        raise DataError(f"{path}: holds {found}; shards need {wanted}")


def _split_name(name: str, offset: int) -> tuple[str, str]:
    """Key and member name, split at the first dot of the last part of the path, as webdataset does."""
    match = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]+)", name)
    if match is None or len(match[1]) > KEY_BYTES or not is_plain(name):
        raise Fault(
            offset - BLOCK, f"{quoted(name)} is not named KEY.MEMBER with a key of at most {KEY_BYTES} characters"
        )
    return match[1], match[2]


def _read_array(data: bytes, offset: int, name: str) -> tuple[np.ndarray, int]:
    """The array in a .npy member (a view), and where its data start."""
    try:
        array, start, fortran = parse_npy(data)
        if fortran:
            raise ValueError("an array in Fortran order")
        return array, start
    except ValueError as error:
        raise Fault(offset, f"{quoted(name)} is not a plain .npy array ({error})") from None


def _count_events(label: np.ndarray, offset: int, name: str) -> int:
    """Raises Fault for values other than 0 and 1: class numbers or votes would all count as events."""
    if label.dtype == np.uint8 and label.size and label.max() > 1:
        values = ", ".join(map(str, np.unique(label)[:5].tolist()))
        raise Fault(offset, f"{quoted(name)} has values other than 0 and 1: {values}")
    return int(np.count_nonzero(label))


#: The exponent's bits, all set in NaN and infinity: a test of integers is several times quicker than `isfinite`.
_EXPONENT = {"<f2": ("<u2", 0x7C00), "<f4": ("<u4", 0x7F800000)}


def is_finite(array: np.ndarray) -> bool:
    """Whether a float16 or float32 array has neither NaN nor infinity."""
    if array.dtype.str not in _EXPONENT or not array.size:
        return True  # refused for its type
    integer, exponent = _EXPONENT[array.dtype.str]
    return int((array.view(integer) & np.array(exponent, integer)).max()) != exponent


def _read_info(data: bytes, offset: int, name: str) -> dict[str, Any]:
    types = {"video_id": str, "category": int, "category_name": str | None, "split": str, "row": int}
    try:
        info = load_json(data, allow_nan=True)
        if "category" not in info or not all(isinstance(info[key], types[key]) for key in types.keys() & info.keys()):
            raise ValueError("needs a category number, and video_id, category_name, split, row of their types, if any")
        if isinstance(info["category"], bool) or not -1 <= info["category"] < MAX_CLASSES:
            raise ValueError(f"category {info['category']}; a class number from 0, or -1 for none")
        texts = [text for key in ("video_id", "category_name", "split") if (text := info.get(key))]
        if not all(len(text) <= MAX_NAME and is_plain(text) for text in texts):
            raise ValueError(f"a name with control characters, or of more than {MAX_NAME}")
        return dict(info)
    except (ValueError, AttributeError, TypeError) as error:
        raise Fault(offset, f"{quoted(name)} is not a sample's json ({error})") from None
