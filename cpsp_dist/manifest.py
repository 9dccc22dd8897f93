"""The manifest of a folder of shards: `index.json`, and beside it the table of samples, memory-mapped.

`index.json` is a superset of the wids v1 index, so wids tools read it. `samples.npy` has a row for each sample (dtype
`SAMPLE`), the splits one after the other, in the order of the shards: what the reader needs to fetch any sample with
one positioned read. About 100 bytes a sample.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from cpsp_dist.errors import DataError

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
TABLE_NAME = "samples.npy"
SPLITS = ("train", "val", "test")
ARRAY_FIELDS = ("visual", "audio", "label")

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
class Field:
    """One array of a sample: the same type and shape in every sample."""

    dtype: str
    shape: tuple[int, ...]

    @cached_property
    def nbytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Shard:
    """One tar file. `first` is its first row in the sample table; `histogram` counts its videos by category name."""

    url: str
    split: str
    first: int
    nsamples: int
    filesize: int
    sha256: str
    histogram: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """Everything about a folder of shards but the features.

    Attributes:
        folder: where `index.json` lies; shard urls are relative to it.
        fields: `visual` [T, 7, 7, C], `audio` [T, A], `label` [T] (uint8, 1 in event segments).
        categories: names, in class order.
        shards: in table order.
        samples: the table, [N] of dtype `SAMPLE`, read-only memory map.
    """

    folder: Path
    fields: dict[str, Field]
    categories: list[str]
    shards: list[Shard]
    samples: np.ndarray

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
        """Hash over schema, categories and the shards' hashes: the same exactly when the data are the same."""
        return _fingerprint(self.fields, self.categories, self.shards)

    def rows(self, split: str) -> range:
        """Rows of `split`; raises DataError naming the splits there are."""
        if split not in self.splits:
            raise DataError(f"{self.folder}: no split '{split}' in these shards; there are: {', '.join(self.splits)}")
        return self.splits[split]

    def path(self, shard: Shard) -> Path:
        return self.folder / shard.url

    def save(self) -> None:
        """Write the table, then `index.json`: a folder with an index is complete."""
        table = self.folder / TABLE_NAME
        part = self.folder / (TABLE_NAME + ".part")
        with open(part, "wb") as file:
            np.save(file, np.asarray(self.samples))
        part.replace(table)
        index = {
            "__kind__": "wids-shard-index-v1",
            "wids_version": 1,
            "name": self.folder.name.removesuffix(".part"),
            "cpsp_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "table": {"url": TABLE_NAME, "sha256": hashlib.sha256(table.read_bytes()).hexdigest()},
            "fields": {name: {"dtype": f.dtype, "shape": list(f.shape)} for name, f in self.fields.items()},
            "categories": self.categories,
            "splits": {name: len(rows) for name, rows in self.splits.items()},
            "shardlist": [asdict(shard) for shard in self.shards],
        }
        part = self.folder / (INDEX_NAME + ".part")
        part.write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(self.folder / INDEX_NAME)

    @staticmethod
    def load(folder: str | Path) -> Manifest:
        """Read a manifest.

        Raises:
            DataError: no such folder, no or a damaged index, a table that does not belong to it, missing or
                truncated shards (by file size; `shards verify` reads every byte).
        """
        folder = Path(folder)
        index_path = folder / INDEX_NAME
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder of shards; pack one with `cpsp-dist shards pack`")
        if not index_path.is_file():
            raise DataError(f"{folder}: no {INDEX_NAME} here, so no finished shards; run `cpsp-dist shards pack`")
        try:
            index = json.loads(index_path.read_text(encoding="utf-8"))
            if index.get("cpsp_version") != FORMAT_VERSION:
                raise DataError(
                    f"{index_path}: format version {index.get('cpsp_version')!r}, this program reads {FORMAT_VERSION}"
                )
            fields = {name: Field(f["dtype"], tuple(f["shape"])) for name, f in index["fields"].items()}
            shards = [Shard(**shard) for shard in index["shardlist"]]
            categories = list(index["categories"])
            recorded = index["fingerprint"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{index_path}: not a readable shard index ({error!r}); pack the shards again") from None
        if recorded != _fingerprint(fields, categories, shards):
            raise DataError(f"{index_path}: changed by hand or damaged (fingerprint differs); pack the shards again")
        manifest = Manifest(folder, fields, categories, shards, _load_table(folder, sum(s.nsamples for s in shards)))
        for shard in shards:
            path = manifest.path(shard)
            size = path.stat().st_size if path.is_file() else None
            if size != shard.filesize:
                state = "missing" if size is None else f"{size} bytes long, not {shard.filesize}"
                raise DataError(f"{path}: shard is {state}; copy or pack it again")
        return manifest


def _fingerprint(fields: dict[str, Field], categories: list[str], shards: list[Shard]) -> str:
    content = [
        {name: [f.dtype, list(f.shape)] for name, f in sorted(fields.items())},
        categories,
        [[s.split, s.nsamples, s.sha256] for s in shards],
    ]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def _load_table(folder: Path, expected: int) -> np.ndarray:
    path = folder / TABLE_NAME
    try:
        samples = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: sample table missing or damaged ({error}); pack the shards again") from None
    if samples.dtype != SAMPLE or samples.shape != (expected,):
        raise DataError(f"{path}: sample table does not belong to {INDEX_NAME}; pack the shards again")
    return samples
