"""What `index.json` says of a folder of shards, read strictly.

What can be derived has to agree with the rest, names have to be plain, urls may not leave the folder.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from cpsp_dist.data.encoders import UNKNOWN, Encoders
from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.hashing import text_sha256
from cpsp_dist.utils.strict_json import load_json
from cpsp_dist.utils.text import is_plain, quoted

#: Version 2 records the encoders; of version 1 they are unknown.
FORMAT_VERSION, READ_VERSIONS = 2, (1, 2)
INDEX_NAME = "index.json"
SPLITS = ("train", "val", "test")
ARRAY_FIELDS = ("visual", "audio", "label")
MAX_INDEX_BYTES = 512 * 2**20  # a million shards
MAX_NAME = 500  # characters
MAX_SAMPLE_BYTES = 64 * 2**20  # of one array


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
class Index:
    """What `index.json` says."""

    fields: dict[str, Field]
    categories: list[str]
    shards: list[Shard]
    table_sha256: Any
    encoders: Encoders = UNKNOWN

    @staticmethod
    def parse(content: bytes, path: str) -> Index:
        try:
            index = load_json(content)
            if (version := index.get("cpsp_version")) not in READ_VERSIONS or isinstance(version, bool):
                raise DataError(
                    f"{path}: shards of format {version}, this program reads format {FORMAT_VERSION}; use the program "
                    "that packed them, or pack them again (`cpsp-dist shards index` takes tars of others)"
                )
            fields = {name: _parse_field(f) for name, f in index["fields"].items()}
            shards = [Shard(**shard) for shard in index["shardlist"]]
            categories = list(index["categories"])
            _check_names(categories)
            _check_shards(shards)
            if set(fields) != set(ARRAY_FIELDS):
                raise ValueError(f"fields {', '.join(fields)}")
            encoders = Encoders.parse(index.get("encoders"))
            recorded = index["fingerprint"]
            found = Index(fields, categories, shards, index["table"]["sha256"], encoders)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            text = str(error) if isinstance(error, ValueError) else repr(error)
            raise DataError(f"{path}: not a readable shard index ({text[:200]}); pack the shards again") from None
        if recorded != fingerprint(fields, categories, shards, encoders):
            raise DataError(f"{path}: changed by hand or damaged (fingerprint differs); pack the shards again")
        return found


def _parse_field(entry: Any) -> Field:
    """Raises ValueError, KeyError, TypeError."""
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if not (isinstance(dtype, str) and re.fullmatch(r"[<>|=]?[fiub][1248]", dtype)):
        raise ValueError(f"type {dtype!r:.40}")
    if not all(type(n) is int and 1 <= n <= MAX_SAMPLE_BYTES for n in shape) or math.prod(shape) > MAX_SAMPLE_BYTES:
        raise ValueError(f"shape {shape!r:.60}")
    return Field(dtype, shape)


def _check_names(categories: list[Any]) -> None:
    """Raises ValueError."""
    if not all(isinstance(name, str) and is_plain(name) and len(name) <= MAX_NAME for name in categories):
        raise ValueError("a class name that is no text, too long, or holds control characters")
    if len({*categories}) < len(categories):
        raise ValueError(f"class {quoted(Counter(categories).most_common(1)[0][0])} is there twice")


def is_visual_shape(shape: tuple[int, ...]) -> bool:
    """Vectors [T, C], or maps [T, H, W, C] with channels last: not [T, C, H, W] with H = W, whatever C."""
    return len(shape) == 2 or (len(shape) == 4 and not shape[1] != shape[2] == shape[3])


def is_split_name(name: str) -> bool:
    """Splits are parts of file names and of settings."""
    return re.fullmatch(r"\w[\w.-]{0,63}", name) is not None


def is_inside(url: str) -> bool:
    """Whether a shard's url is a path of plain names below its folder."""
    return len(url) <= MAX_NAME // 2 and is_plain(url) and not any(part in ("", ".", "..") for part in url.split("/"))


def _check_shards(shards: list[Shard]) -> None:
    """What no fingerprint covers: where a shard's rows begin follows from the shards before it. Raises ValueError."""
    first, finished, split = 0, set(), ""
    for shard in shards:
        types = (type(shard.url), type(shard.split), type(shard.sha256))
        numbers = (type(shard.first), type(shard.filesize), type(shard.nsamples))
        if {*types} != {str} or {*numbers} != {int} or not 0 < shard.nsamples <= shard.filesize:
            raise ValueError(f"shard {str(shard.url)[:60]!r}: values of other types or sizes")
        if not re.fullmatch("[0-9a-f]{64}", shard.sha256):
            raise ValueError(f"{quoted(shard.url)}: no sha256")
        if not is_inside(shard.url):
            raise ValueError(f"shard {quoted(shard.url)} does not lie in this folder")
        if not is_split_name(shard.split):
            raise ValueError(f"{shard.url}: split {quoted(shard.split)}")
        if shard.first != first:
            raise ValueError(f"{shard.url}: 'first' is {shard.first}, but the shards before it hold {first} samples")
        if shard.split != split:
            finished.add(split)
            split = shard.split
        if split in finished:
            raise ValueError(f"{shard.url}: the shards of split {split} are apart")
        first += shard.nsamples


def fingerprint(
    fields: dict[str, Field], categories: list[str], shards: list[Shard], encoders: Encoders = UNKNOWN
) -> str:
    """Of what the data are; without a known encoder, as version 1 has it."""
    content: list[Any] = [
        {name: [f.dtype, list(f.shape)] for name, f in sorted(fields.items())},
        categories,
        [[s.split, s.nsamples, s.sha256] for s in shards],
    ]
    if encoders.known:
        content.append(encoders.as_json())
    return text_sha256(json.dumps(content, ensure_ascii=False, sort_keys=True))
