"""From a finished tar shard to its rows of the sample table: a strict reading of every byte.

The packer indexes what it has just written, `verify` indexes again and compares: there is one reading of the format.
Anything out of order is an error with its byte offset: a header that fails its checksum, padding that is not zero, a
sample with a member missing, twice or in another order, bytes after the end.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np

from cpsp_dist.errors import DataError
from cpsp_dist.manifest import ARRAY_FIELDS, SAMPLE, Field, Manifest, Shard

BLOCK = 512
MEMBERS = ("audio.npy", "json", "label.npy", "visual.npy")  # of each sample, in this order (webdataset sorts them)
NO_CATEGORY = "(no category)"
MAX_NPY_HEADER = 1000  # bytes; ours have about 120


@dataclass(frozen=True)
class IndexedShard:
    """What the bytes of one shard say. `rows` lacks the shard and video numbers, which need the other shards."""

    split: str
    filesize: int
    sha256: str
    fields: dict[str, Field]
    rows: np.ndarray  # [n] of dtype SAMPLE
    video_ids: list[str]  # of each sample
    histogram: dict[str, int]  # videos by category name


def index_shard(path: Path) -> IndexedShard:
    """Read every byte of `path`.

    Raises:
        DataError: naming the shard, the byte and, where known, the sample, if anything is not as the format says.
    """
    digest = hashlib.sha256()
    rows, infos = [], []
    fields: dict[str, Field] = {}
    row, sample, expected = np.zeros((), SAMPLE), "", MEMBERS[-1]
    try:
        with open(path, "rb") as file:
            for number, (name, offset, data) in enumerate(_members(file, digest)):
                key, _, member = name.partition(".")
                expected = MEMBERS[number % len(MEMBERS)]
                if expected == MEMBERS[0]:
                    row = np.zeros((), SAMPLE)
                    row["key"], sample = key.encode(), key
                if member != expected or key != sample:
                    raise _Fault(offset - BLOCK, f"member '{name}' where '{sample}.{expected}' should be")
                if member == "json":
                    infos.append(_read_info(data, offset, name))
                    field, start, size = "json", 0, len(data)
                    row["json_size"], row["category"] = size, infos[-1]["category"]
                else:
                    field = member.removesuffix(".npy")
                    array, start = _read_array(data, offset, name)
                    form = Field(array.dtype.str, array.shape)
                    if fields.setdefault(field, form) != form:
                        raise _Fault(offset, f"'{name}' is {form}, the samples before it {fields[field]}")
                    if field == "label":
                        row["events"] = array.sum()
                row[field] = offset + start
                row[f"{field}_crc"] = google_crc32c.value(data[start:] if start else data)
                if expected == MEMBERS[-1]:
                    rows.append(row)
            if expected != MEMBERS[-1]:
                raise _Fault(file.tell(), f"sample '{sample}' is incomplete")
            if not rows:
                raise _Fault(0, "no samples in it")
            size = file.tell()
    except _Fault as fault:
        raise DataError(f"{path}: byte {fault.offset}: {fault}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    split, *others = sorted({info["split"] for info in infos})
    if others:
        raise DataError(f"{path}: samples of several splits in one shard: {split}, {', '.join(others)}")
    ids = [info["video_id"] for info in infos]
    histogram = dict(sorted(Counter(info["category_name"] or NO_CATEGORY for info in infos).items()))
    return IndexedShard(split, size, digest.hexdigest(), fields, np.array(rows), ids, histogram)


def assemble(folder: Path, shards: list[tuple[str, IndexedShard]], categories: list[str]) -> Manifest:
    """The manifest over indexed shards (name, content), in this order; splits must lie together.

    Raises:
        DataError: shards whose arrays differ in type or shape, or a key that is there twice.
    """
    fields = shards[0][1].fields
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
    return Manifest(folder, {name: fields[name] for name in ARRAY_FIELDS}, categories, entries, table)


class _Fault(Exception):
    def __init__(self, offset: int, text: str):
        super().__init__(text)
        self.offset = offset


def _members(file: BinaryIO, digest: hashlib._Hash) -> Iterator[tuple[str, int, bytes]]:
    """(name, offset of the payload, payload) of each file in a plain USTAR archive; hashes every byte of it."""

    def take(count: int, what: str) -> bytes:
        data = file.read(count)
        digest.update(data)
        if len(data) < count:
            raise _Fault(file.tell(), f"the file ends within {what}: it is cut short")
        return data

    while True:
        start = file.tell()
        block = take(BLOCK, "a header or before the end blocks")
        if block == bytes(BLOCK):
            rest = file.read()
            digest.update(rest)
            if len(rest) < BLOCK or rest.strip(b"\0"):
                raise _Fault(start, "a zero block, but not the end of the archive (two zero blocks, nothing after)")
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise _Fault(start, f"damaged tar header ({error})") from None
        if info.type != tarfile.REGTYPE or block[257:265] != tarfile.POSIX_MAGIC:
            raise _Fault(start, f"'{info.name}' is not a plain USTAR file")
        data = take(info.size, f"'{info.name}'")
        padding = take(-info.size % BLOCK, f"the padding behind '{info.name}'")
        if padding.strip(b"\0"):
            raise _Fault(start + BLOCK + info.size, f"padding behind '{info.name}' is not zero")
        yield info.name, start + BLOCK, data


def _read_array(data: bytes, offset: int, name: str) -> tuple[np.ndarray, int]:
    """The array in a .npy member (a view), and where its data start."""
    stream = io.BytesIO(data[:MAX_NPY_HEADER])
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("not npy version 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        start = stream.tell()
        if fortran or dtype.hasobject:
            raise ValueError("an array of objects or in Fortran order")
        return np.frombuffer(data, dtype, offset=start).reshape(shape), start
    except Exception as error:  # numpy evaluates the header's text: damage there raises nearly any type
        raise _Fault(offset, f"'{name}' is not a plain .npy array ({error})") from None


def _read_info(data: bytes, offset: int, name: str) -> dict:
    types = {"video_id": str, "category": int, "category_name": (str, type(None)), "split": str, "row": int}
    try:
        info = json.loads(data)
        if not all(key in info and isinstance(info[key], kind) for key, kind in types.items()):  # type: ignore[arg-type]
            raise ValueError(f"needs {', '.join(types)}")
        return info
    except (ValueError, AttributeError) as error:
        raise _Fault(offset, f"'{name}' is not a sample's json ({error})") from None
