"""One shard: the videos of its plan, read, checked, and written as a tar."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cpsp_dist.data.manifest import Field
from cpsp_dist.packing.index import KEY_BYTES
from cpsp_dist.packing.plan import ShardPlan
from cpsp_dist.packing.source import Entry, Features, Source
from cpsp_dist.utils.errors import DataError


def write_shard(
    path: Path, source: Source, planned: ShardPlan, fields: dict[str, Field], done: Callable[[], None]
) -> tuple[int, list[str], list[str]]:
    """Write one shard, calling `done` after each video; how many samples it has, what is wrong with the others, and
    notes on what was made fit."""
    problems: list[str] = []
    notes: list[str] = []
    with open(path, "wb") as file, tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
        for entry in planned.entries:
            try:
                features = source.read(entry)
                _add(tar, sample_key(entry), encode(entry, features, fields, source.categories))
                if features.note:
                    notes.append(f"{entry.name}: {features.note}")
            except DataError as error:
                problems.append(f"{entry.name}: {error}")
            done()
    return len(planned.entries) - len(problems), problems, notes


def _add(tar: tarfile.TarFile, key: str, sample: dict[str, bytes]) -> None:
    """Files `key.name`, as webdataset writes them; its own writer would import torch into every packing process.

    Everything that could differ between two runs or users is pinned. With an integer as time and short names in
    ASCII, what Python's tarfile writes are plain USTAR headers.
    """
    for name in sorted(sample):
        info = tarfile.TarInfo(f"{key}.{name}")  # of time 0, of no user
        info.size, info.mode = len(sample[name]), 0o444
        tar.addfile(info, io.BytesIO(sample[name]))


def encode(entry: Entry, features: Features, fields: dict[str, Field], categories: list[str]) -> dict[str, bytes]:
    """A webdataset sample without its key; raises DataError for what does not fit `fields` or is not finite."""
    sample: dict[str, bytes] = {}
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
    return f"{entry.row:06d}-{id_in_key(entry.video_id)}"[:KEY_BYTES]


def id_in_key(video_id: str) -> str:
    """A video id as keys have it."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", video_id)


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
