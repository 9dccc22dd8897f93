"""From a finished tar shard to its rows of the sample table: a strict reading of every byte.

The packer indexes what it has just written, `verify` indexes again and compares, `rebuild` indexes tars that came
without a manifest: there is one reading of the format. What cannot be right is an error with its byte offset: a header
that fails its checksum, padding that is not zero, a sample with a member missing, twice or apart from the others, bytes
after the end.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from crc32c import crc32c

from cpsp_dist.data.manifest import ARRAY_FIELDS, SAMPLE, SPLITS, Field, Manifest, Shard
from cpsp_dist.errors import DataError

BLOCK = 512
MEMBERS = ("audio.npy", "json", "label.npy", "visual.npy")  # that every sample has
KEY_BYTES = SAMPLE["key"].itemsize
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
    categories: dict[int, str]  # names of those that occur
    histogram: dict[str, int]  # videos by category name


def index_shard(path: Path) -> IndexedShard:
    """Read every byte of `path`.

    Raises:
        DataError: naming the shard, the byte and, where known, the sample, if anything is not as the format says.
    """
    digest = hashlib.sha256()
    rows: list[np.ndarray] = []
    infos: list[dict[str, Any]] = []
    fields: dict[str, Field] = {}
    seen: set[str] = set()
    missing: set[str] = set()
    sample = ""
    try:
        with open(path, "rb") as file:
            for name, offset, data in _members(file, digest):
                key, member = _split_name(name, offset)
                if key != sample or not rows:
                    _check_complete(sample, missing, offset - BLOCK)
                    if key in seen:
                        raise _Fault(offset - BLOCK, f"'{name}' is apart from the other members of its sample")
                    sample, missing = key, set(MEMBERS)
                    seen.add(key)
                    rows.append(np.zeros((), SAMPLE))
                    rows[-1]["key"] = key.encode()
                if member not in MEMBERS:
                    continue  # others may store more
                if member not in missing:
                    raise _Fault(offset - BLOCK, f"'{name}' is there twice")
                missing.remove(member)
                field, start = member.removesuffix(".npy"), 0
                if member == "json":
                    infos.append(_read_info(data, offset, name))
                    rows[-1]["json_size"], rows[-1]["category"] = len(data), infos[-1]["category"]
                else:
                    array, start = _read_array(data, offset, name)
                    form = Field(array.dtype.str, array.shape)
                    if fields.setdefault(field, form) != form:
                        raise _Fault(offset, f"'{name}' is {form}, the samples before it {fields[field]}")
                    if field == "label":
                        rows[-1]["events"] = np.count_nonzero(array)
                rows[-1][field] = offset + start
                rows[-1][f"{field}_crc"] = crc32c(data[start:] if start else data)
            size = file.tell()
            _check_complete(sample, missing, size)
            if not rows:
                raise _Fault(0, "no samples in it")
    except _Fault as fault:
        raise DataError(f"{path}: byte {fault.offset}: {fault}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    # Tars of others may lack what only names things: the key and the file's name give it.
    split, *others = sorted({info.get("split", path.name.split("-")[0]) for info in infos})
    if others:
        raise DataError(f"{path}: samples of several splits in one shard: {split}, {', '.join(others)}")
    ids = [info.get("video_id", row["key"].item().decode()) for info, row in zip(infos, rows, strict=True)]
    names = {i["category"]: i.get("category_name") or f"class {i['category']}" for i in infos if i["category"] >= 0}
    counts = Counter(names.get(info["category"], NO_CATEGORY) for info in infos)
    return IndexedShard(
        split, size, digest.hexdigest(), fields, np.array(rows), ids, names, dict(sorted(counts.items()))
    )


def assemble(folder: Path, shards: list[tuple[str, IndexedShard]], categories: list[str]) -> Manifest:
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
    return Manifest(folder, fields, categories, entries, table)


def split_order(split: str) -> tuple[int, str]:
    """Sorts splits in their usual order, others behind."""
    return SPLITS.index(split) if split in SPLITS else len(SPLITS), split


def _check_fields(path: Path, fields: dict[str, Field]) -> None:
    visual, audio, label = (fields[name] for name in ARRAY_FIELDS)
    shapes = [f.shape for f in (visual, audio, label)]
    fits = (len(visual.shape), len(audio.shape), len(label.shape)) == (4, 2, 1) and len({s[0] for s in shapes}) == 1
    types = visual.dtype in ("<f2", "<f4") and (audio.dtype, label.dtype) == ("<f4", "|u1")
    if not fits or not types or visual.shape[1:3] != (7, 7):
        found = ", ".join(f"{name} {f.dtype} {list(f.shape)}" for name, f in fields.items())
        wanted = "visual <f2 or <f4 [T, 7, 7, C], audio <f4 [T, A], label |u1 [T]"
        raise DataError(f"{path}: holds {found}; shards need {wanted}")


def _split_name(name: str, offset: int) -> tuple[str, str]:
    """Key and member name, split at the first dot of the last part of the path, as webdataset does."""
    match = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]+)", name)
    if match is None or len(match[1]) > KEY_BYTES:
        raise _Fault(offset - BLOCK, f"'{name}' is not named KEY.MEMBER with a key of at most {KEY_BYTES} characters")
    return match[1], match[2]


def _check_complete(sample: str, missing: set[str], offset: int) -> None:
    if missing:
        raise _Fault(offset, f"sample '{sample}' is incomplete: no {', no '.join(sorted(missing))}")


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
        if info.type == tarfile.XHDTYPE:  # webdataset writes one for the fraction of a second in a file's time
            if not _is_harmless(take(info.size + -info.size % BLOCK, "an extended header")):
                raise _Fault(start, "an extended header that changes more than times and owners")
            continue
        if info.type != tarfile.REGTYPE or block[257:265] not in (tarfile.POSIX_MAGIC, tarfile.GNU_MAGIC):
            raise _Fault(start, f"'{info.name}' is not a plain file in USTAR format")
        data = take(info.size, f"'{info.name}'")
        padding = take(-info.size % BLOCK, f"the padding behind '{info.name}'")
        if padding.strip(b"\0"):
            raise _Fault(start + BLOCK + info.size, f"padding behind '{info.name}' is not zero")
        yield info.name, start + BLOCK, data


def _is_harmless(extended: bytes) -> bool:
    """Whether the records of a PAX header, `LENGTH KEY=VALUE`, leave a member's name, type and content alone."""
    keys = {record.partition(b" ")[2].partition(b"=")[0] for record in extended.rstrip(b"\0").splitlines()}
    return keys <= {b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname"}


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


def _read_info(data: bytes, offset: int, name: str) -> dict[str, Any]:
    types = {"video_id": str, "category": int, "category_name": str | None, "split": str, "row": int}
    try:
        info: dict[str, Any] = json.loads(data)
        if "category" not in info or not all(isinstance(info[key], types[key]) for key in types.keys() & info.keys()):
            raise ValueError("needs a category number, and video_id, category_name, split, row of their types, if any")
        return info
    except (ValueError, AttributeError, TypeError) as error:
        raise _Fault(offset, f"'{name}' is not a sample's json ({error})") from None
