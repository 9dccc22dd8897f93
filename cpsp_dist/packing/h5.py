"""HDF5 files of others: plain arrays of numbers that lie in the file itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.input_files import open_input
from cpsp_dist.utils.text import one_line, quoted

MAX_ROW_BYTES = 64 * 2**20  # of one video; [10, 2048, 7, 7] in float64 has 8 MB; one array of a file by id
MAX_CHUNK_BYTES = 256 * 2**20  # HDF5 unpacks a chunk as one
MAX_RATIO = 1100  # gzip's best is 1030 to 1
KINDS = "fiub"


def open_file(path: Path) -> h5py.File:
    """Raises DataError."""
    open_input(path).close()
    try:
        return h5py.File(path, "r")
    except Exception as error:
        raise damaged(path, error, "not a readable HDF5 file, or cut short") from None


def find(group: h5py.Group, names: Sequence[str]) -> h5py.Dataset | h5py.Group | None:
    """What the first of `names` that is there stands for.

    Raises:
        DataError: it is a link to another file, or an array that is not of numbers or of no size that can be.
    """
    path = group.file.filename
    try:
        for name in names:
            if isinstance(group.get(name, getlink=True), h5py.ExternalLink):
                raise DataError(f"{path}: {quoted(name)} is a link to another file; copy the array into this one")
            if name in group:
                found = group.get(name)  # None where a link leads nowhere
                if isinstance(found, h5py.Dataset):
                    _check(found, path)
                return found
        return None
    except DataError:
        raise
    except Exception as error:
        raise damaged(path, error) from None


def find_array(file: h5py.File, names: Sequence[str]) -> h5py.Dataset:
    """The array of the first of `names` that is there. Raises DataError, as `find`, and where none is an array."""
    found = find(file, names)
    if isinstance(found, h5py.Dataset):
        return found
    try:
        there = ", ".join(name[:60] for _, name in zip(range(10), file, strict=False))
    except Exception as error:
        raise damaged(file.filename, error) from None
    expected = " or ".join(f"'{name}'" for name in names)
    raise DataError(f"{file.filename}: no array {expected} in it; there are: {there or 'none'}")


def _check(data: h5py.Dataset, path: str) -> None:
    """Raises DataError unless it is an array of numbers, stored in the file `path` with a size that can be."""
    name = quoted(data.name.removeprefix("/"))
    if data.file.filename != path or data.is_virtual or data.external:
        raise DataError(f"{path}: {name} lies in another file; copy the array into this one")
    if data.dtype.kind not in KINDS or data.shape is None:
        raise DataError(f"{path}: {name} holds {data.dtype}, not numbers")
    size, stored = data.nbytes, data.id.get_storage_size()
    chunk = math.prod(data.chunks) * data.dtype.itemsize if data.chunks else 0
    row = size // max(1, data.shape[0]) if data.shape else size
    if row > MAX_ROW_BYTES or chunk > MAX_CHUNK_BYTES or size > max(MAX_RATIO * stored, 2**16):
        raise DataError(
            f"{path}: {name} of shape {list(data.shape)} in {stored:,} bytes; damaged, or not features of videos"
        )


def read(data: h5py.Dataset, what: Any, label: str = "row") -> np.ndarray:
    """`data[what]`; raises DataError where the file is damaged."""
    try:
        found: np.ndarray = data[what]
        return found
    except Exception as error:
        raise damaged(data.file.filename, error, f"{label} cannot be read, damaged file?") from None


def read_all(data: h5py.Dataset, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, values) of `rows` rows at a time; raises DataError."""
    for start in range(0, len(data), rows):
        yield start, read(data, slice(start, start + rows))


def damaged(path: str | Path, error: Exception, what: str = "damaged HDF5 file") -> DataError:
    """HDF5 and h5py raise nearly any type for damaged bytes, some with texts of many lines."""
    text = one_line(error)
    return DataError(f"{path}: {what} ({text[:200] or type(error).__name__})")
