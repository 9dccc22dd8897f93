"""One shard: the videos of its plan, read, checked, and written as a tar."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from cpsp_dist.data.manifest import Field
from cpsp_dist.errors import DataError
from cpsp_dist.packing.index import KEY_BYTES
from cpsp_dist.packing.plan import ShardPlan
from cpsp_dist.packing.source import Entry, Features, Source


def write_shard(
    path: Path, source: Source, planned: ShardPlan, fields: dict[str, Field], done: Callable[[], None]
) -> tuple[int, list[str]]:
    """Write one shard, calling `done` after each video; how many samples it has, and what is wrong with the others."""
    problems: list[str] = []
    # Everything that could differ between two runs or users is pinned. With a whole number as time and short names in
    # ASCII, what Python's tarfile writes are plain USTAR headers.
    pinned: dict[str, Any] = {"user": "", "group": "", "mode": 0o444, "mtime": 0}
    with (
        open(path, "wb") as file,
        webdataset.TarWriter(file, encoder=False, compress=False, **pinned) as writer,
    ):
        for entry in planned.entries:
            try:
                writer.write(encode(entry, source.read(entry), fields, source.categories))
            except DataError as error:
                problems.append(f"{entry.name}: {error}")
            done()
    return len(planned.entries) - len(problems), problems


def encode(entry: Entry, features: Features, fields: dict[str, Field], categories: list[str]) -> dict[str, str | bytes]:
    """A webdataset sample of bytes; raises DataError for what does not fit `fields` or is not finite."""
    sample: dict[str, str | bytes] = {"__key__": sample_key(entry)}
    for name, field in fields.items():
        array = getattr(features, name)
        if array.shape != field.shape:
            raise DataError(f"{name} is of shape {list(array.shape)}, the other videos' {list(field.shape)}")
        if name == "label" and not np.isin(array, (0, 1)).all():
            raise DataError(f"label has values other than 0 and 1: {np.unique(array)[:5].tolist()}")
        sample[f"{name}.npy"] = npy(_cast(array, field, name))
    info = {
        "video_id": entry.video_id,
        "category": entry.category,
        "category_name": categories[entry.category] if entry.category >= 0 else None,
    }
    sample["json"] = json.dumps(info | {"split": entry.split, "row": entry.row}).encode()
    return sample


def sample_key(entry: Entry) -> str:
    """The row number keeps it unique, whatever becomes of the id: at most 48 bytes, no dot, slash or blank."""
    return f"{entry.row:06d}-{re.sub(r'[^A-Za-z0-9_-]', '_', entry.video_id)}"[:KEY_BYTES]


def npy(array: np.ndarray) -> bytes:
    """`array` as the content of a .npy file."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def _cast(array: np.ndarray, field: Field, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(array, dtype=field.dtype)
    if not np.isfinite(cast).all():
        if not np.isfinite(array).all():
            raise DataError(f"{name} holds {int((~np.isfinite(array)).sum())} values that are NaN or infinite")
        hint = "; pack with --visual-dtype float32" if field.dtype == "<f2" else ""
        raise DataError(f"{name} holds {np.abs(array).max():g}, too large for {np.dtype(field.dtype).name}{hint}")
    return cast
