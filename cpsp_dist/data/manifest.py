"""The manifest of a folder of shards: `index.json`, and beside it the table of samples, memory-mapped.

`index.json` is a superset of the wids v1 index, so wids tools read it. `samples.npy` has a row for each sample (dtype
`SAMPLE`), the splits one after the other, in the order of the shards: what the reader needs to fetch any sample with
one positioned read. About 100 bytes a sample.

A folder may be a URL (`https://…`, `s3://…`, any that fsspec knows): its table and shards are then kept by a `Cache`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from cpsp_dist.data.cache import Cache, Remote
from cpsp_dist.data.encoders import UNKNOWN, Encoders
from cpsp_dist.data.shard_index import (
    ARRAY_FIELDS,
    FORMAT_VERSION,
    INDEX_NAME,
    MAX_INDEX_BYTES,
    SPLITS,
    Field,
    Index,
    Shard,
    fingerprint,
)
from cpsp_dist.utils import files
from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.hashing import file_sha256
from cpsp_dist.utils.input_files import open_input, read_input
from cpsp_dist.utils.redact import learn, without_secrets
from cpsp_dist.utils.urls import is_url

TABLE_NAME = "samples.npy"
#: Bytes of an npy file in front of its rows, at most.
LONGEST_HEADER = 1 << 16
TABLE_CHUNK = 65_536  # rows checked at once

# Names of `shard_index` that others take from here.
__all__ = ["ARRAY_FIELDS", "FORMAT_VERSION", "INDEX_NAME", "SAMPLE", "SPLITS", "TABLE_NAME"]
__all__ += ["Field", "Manifest", "Shard"]

#: Offsets are bytes into the shard of an array's data (behind the .npy header) or of the json text; crc is crc32c of
#: those bytes. Array sizes are constant and follow from the schema. `events` counts event segments.
SAMPLE = np.dtype(
    [
        ("shard", "<u4"),
        *[(name, "<u8") for name in (*ARRAY_FIELDS, "json")],
        ("json_size", "<u4"),
        *[(f"{name}_crc", "<u4") for name in (*ARRAY_FIELDS, "json")],
        ("category", "<i4"),
        ("events", "<u2"),
        ("video", "<u4"),
        ("key", "S48"),
    ]
)


@dataclass(frozen=True)
class Manifest:
    """Everything about a folder of shards but the features.

    Attributes:
        folder: where `index.json` lies; shard urls are relative to it. Of remote shards: where the cache keeps them.
        fields: `visual` [T, H, W, C] or [T, C], `audio` [T, A], `label` [T] (uint8, 1 in event segments).
        categories: names, in class order.
        shards: in table order.
        samples: the table, [N] of dtype `SAMPLE`, read-only memory map.
        remote: the URL they were loaded from; None for a folder of this machine.
        encoders: which made the features, as far as known.
    """

    folder: Path
    fields: dict[str, Field]
    categories: list[str]
    shards: list[Shard]
    samples: np.ndarray
    remote: Remote | None = None
    encoders: Encoders = UNKNOWN

    @property
    def place(self) -> str:
        """The folder or URL, as messages name it (without passwords)."""
        return str(self.remote or self.folder)

    @cached_property
    def splits(self) -> dict[str, range]:
        """Rows of the sample table of each split."""
        rows: dict[str, range] = {}
        for shard in self.shards:
            start = rows[shard.split].start if shard.split in rows else shard.first
            rows[shard.split] = range(start, shard.first + shard.nsamples)
        return rows

    @cached_property
    def fingerprint(self) -> str:
        """Hash over schema, categories, encoders and the shards' hashes: the same when the data are, and only then."""
        return fingerprint(self.fields, self.categories, self.shards, self.encoders)

    def rows(self, split: str) -> range:
        """Rows of `split`; raises DataError naming the splits there are."""
        if split not in self.splits:
            raise DataError(f"{self.place}: no split '{split}' in these shards; there are: {', '.join(self.splits)}")
        return self.splits[split]

    def path(self, shard: Shard) -> Path:
        """Where a shard lies; a remote one only while it is in the cache, see `local_file`."""
        return self.folder / shard.url if self.remote is None else self.remote.cache.path(shard.sha256)

    @contextmanager
    def local_file(self, shard: Shard) -> Iterator[Path]:
        """The path of a shard, fetched if necessary; it exists while the `with` lasts. Raises DataError."""
        if self.remote is None:
            yield self.path(shard)
            return
        held = self.remote.open(shard.url, shard.sha256, shard.filesize)
        try:
            yield self.path(shard)
        finally:
            os.close(held)

    def save(self) -> None:
        """Write the table, then `index.json`: a folder with an index is complete."""
        table = self.folder / TABLE_NAME
        with files.replacing(table) as part, open(part, "wb") as file:
            np.save(file, np.asarray(self.samples))
        index = {
            "__kind__": "wids-shard-index-v1",
            "wids_version": 1,
            "name": self.folder.name.removesuffix(".part"),
            "cpsp_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "table": {"url": TABLE_NAME, "sha256": file_sha256(table)},
            "fields": {name: {"dtype": f.dtype, "shape": list(f.shape)} for name, f in self.fields.items()},
            "categories": self.categories,
            "encoders": self.encoders.as_json(),
            "splits": {name: len(rows) for name, rows in self.splits.items()},
            "shardlist": [asdict(shard) for shard in self.shards],
        }
        files.write_text(self.folder / INDEX_NAME, json.dumps(index, indent=1, ensure_ascii=False) + "\n")

    @staticmethod
    def load(place: str | Path, cache: Cache | None = None) -> Manifest:
        """Read a manifest from a folder or a URL; `cache` keeps what a URL holds (by default, `Cache()`).

        Raises:
            DataError: no such folder, no or a damaged index, a table that is not the index's (every byte), missing or
                truncated shards (by file size; `shards verify` reads every byte). Remote shards are checked, every
                byte, as they are fetched.
        """
        if is_url(place):
            learn([str(place)])
            return _load_remote(Remote(str(place), cache or Cache()))
        try:
            return _load_folder(Path(place))
        except OSError as error:
            raise DataError(f"{error.filename or place}: cannot be read ({error.strerror})") from None


def _load_folder(folder: Path) -> Manifest:
    index_path = folder / INDEX_NAME
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of shards; pack one with `cpsp-dist shards pack`")
    if not index_path.exists():
        raise DataError(f"{folder}: no {INDEX_NAME} here, so no finished shards; run `cpsp-dist shards pack`")
    index = Index.parse(read_input(index_path, MAX_INDEX_BYTES), str(index_path))
    table = _load_table(folder / TABLE_NAME, index, "`cpsp-dist shards index` makes it anew from the tars")
    manifest = Manifest(folder, index.fields, index.categories, index.shards, table, None, index.encoders)
    for shard in index.shards:
        path = manifest.path(shard)
        size = path.stat().st_size if path.is_file() else None
        if size != shard.filesize:
            missing = "missing" if not path.exists() else "not a file"
            state = missing if size is None else f"{size} bytes long, not {shard.filesize}"
            raise DataError(f"{path}: shard is {state}; copy or pack it again")
    return manifest


def _load_remote(remote: Remote) -> Manifest:
    index = Index.parse(remote.read(INDEX_NAME), without_secrets(remote.join(INDEX_NAME)))
    digest = str(index.table_sha256)
    held = remote.open(TABLE_NAME, digest)
    try:
        table = _load_table(remote.cache.path(digest), index, "delete this file of the cache, and it is fetched again")
    finally:
        os.close(held)  # the map outlives the file, should the cache delete it
    return Manifest(remote.cache.folder, index.fields, index.categories, index.shards, table, remote, index.encoders)


def _load_table(path: Path, index: Index, remedy: str) -> np.ndarray:
    """The table, once all its bytes are known to be right: no checksum of an array covers what it says of a sample."""
    count = sum(shard.nsamples for shard in index.shards)
    try:
        with open_input(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > count * SAMPLE.itemsize + LONGEST_HEADER:  # which may take hours to read
                raise DataError(f"{path}: not the table that was packed ({size:,} bytes are too many); {remedy}")
            unchanged = file_sha256(file.fileno()) == index.table_sha256
        if not unchanged:
            raise DataError(f"{path}: not the table that was packed (sha256 differs); {remedy}")
        samples: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except DataError as error:
        raise DataError(f"{error}; {remedy}" if remedy not in str(error) else str(error)) from None
    except Exception as error:  # numpy evaluates the header's text: damage there raises nearly any type
        raise DataError(f"{path}: sample table missing or damaged ({error}); {remedy}") from None
    if samples.dtype != SAMPLE or samples.shape != (count,):
        raise DataError(f"{path}: sample table does not belong to {INDEX_NAME}; {remedy}")
    _check_table(path, samples, index, remedy)
    return samples


def _check_table(path: Path, samples: np.ndarray, index: Index, remedy: str) -> None:
    """Raises DataError where a row names a shard, bytes, a class, events or a key that cannot be."""
    shards = np.repeat(np.arange(len(index.shards)), [shard.nsamples for shard in index.shards])
    ends = np.array([shard.filesize for shard in index.shards], np.uint64)
    for start in range(0, len(samples), TABLE_CHUNK):
        rows, shard = np.asarray(samples[start : start + TABLE_CHUNK]), shards[start : start + TABLE_CHUNK]
        fits = (rows["shard"] == shard) & (rows["category"] >= -1) & (rows["category"] < len(index.categories))
        fits &= rows["events"] <= index.fields["label"].shape[0]
        end = ends[shard]
        for name in ARRAY_FIELDS:
            fits &= (rows[name] <= end) & (end - rows[name] >= index.fields[name].nbytes)
        keys = np.ascontiguousarray(rows["key"]).view(np.uint8).reshape(len(rows), -1)
        fits &= (((keys >= 32) & (keys < 127)) | (keys == 0)).all(axis=1)  # in ASCII, and none for a terminal
        fits &= (rows["json"] <= end) & (end - rows["json"] >= rows["json_size"])
        if not fits.all():
            row = start + int(np.argmin(fits))
            raise DataError(
                f"{path}: row {row} is of another shard, or has bytes, a class or a key that cannot be; {remedy}"
            )
