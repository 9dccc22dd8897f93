"""AVE's `Annotations.txt`, and which of its rows belong to which split.

A line is `Category&VideoID&Quality&StartTime&EndTime`, seconds within the clip; the first may be that header. Splits
are `{train,val,test}_order.h5` (key `order`, row numbers) or `{train,val,test}Set.txt`, lines of the Annotations. A
video may be in several rows, and rows of one video in several splits.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cpsp_dist.data.manifest import SPLITS
from cpsp_dist.data.shard_index import MAX_NAME
from cpsp_dist.packing.source import Entry
from cpsp_dist.packing.text import read_lines
from cpsp_dist.utils.errors import DataError, UserError
from cpsp_dist.utils.text import is_plain, quoted

HEADER = "Category&VideoID&Quality&StartTime&EndTime"


@dataclass
class Splits:
    """The split of each row, and a line for each that is out of range, unknown or listed twice."""

    of_row: dict[int, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def is_annotations(first_line: str) -> bool:
    """Whether a file that begins so is an Annotations file."""
    parts = _split_line(first_line)
    return first_line.strip().casefold() == HEADER.casefold() or _is_row(parts)


def read_annotations(path: Path) -> list[tuple[int, list[str]]]:
    """(line, [Category, VideoID, Quality, StartTime, EndTime]) of row 0, 1, … Raises DataError, naming the line."""
    lines = read_lines(path)
    if lines and lines[0][1].casefold() == HEADER.casefold():
        lines = lines[1:]
    rows = []
    for number, line in lines:
        parts = _split_line(line)
        if not _is_row(parts):
            raise DataError(f"{path}: line {number}: {quoted(line)} is not of the form {HEADER}")
        if not is_plain(line) or len(line) > 3 * MAX_NAME:
            raise DataError(f"{path}: line {number}: {quoted(line)} is too long, or holds control characters")
        rows.append((number, parts))
    return rows


def read_splits(folder: Path, annotations: list[list[str]], ids: list[str]) -> Splits:
    """Of the files in `folder`. ids: of each row.

    Raises:
        UserError: there are none, or they need Annotations; DataError: one is damaged.
    """
    orders = {split: folder / f"{split}_order.h5" for split in SPLITS}
    texts = {split: folder / f"{split}Set.txt" for split in SPLITS}
    found = Splits()
    if any(os.path.lexists(path) for path in orders.values()):
        rows = {split: _read_order(path) for split, path in orders.items() if os.path.lexists(path)}
    elif any(os.path.lexists(path) for path in texts.values()):
        if not annotations:
            raise DataError(f"{folder}: the *Set.txt files need Annotations.txt, which gives the row numbers")
        rows = _rows_of_texts(texts, annotations, found.problems)
    else:
        raise UserError(f"{folder}: no train_order.h5 (val, test) and no trainSet.txt (val, test): no splits")
    for split, numbers in rows.items():
        _add(found, split, numbers, ids)
    return found


def _add(found: Splits, split: str, rows: Iterable[int], ids: list[str]) -> None:
    for row in rows:
        if not 0 <= row < len(ids):
            found.problems.append(f"split {split}: row {row} is out of range, there are {len(ids)} videos")
        elif row in found.of_row:
            name = Entry(row, ids[row], split, -1).name
            found.problems.append(f"{name}: listed in {found.of_row[row]} and again in {split}")
        else:
            found.of_row[row] = split


def _read_order(path: Path) -> list[int]:
    """The rows of a split, in order."""
    import numpy as np

    from cpsp_dist.packing import h5

    values = h5.read(h5.find_array(h5.open_file(path), ("order",)), ...).ravel()
    wrong = ~np.isfinite(values) | (values != np.round(values)) | (np.abs(values) > 2**53)
    if wrong.any():
        raise DataError(f"{path}: {values[wrong][0]:g} is not a row number")
    return [int(row) for row in values]


def _rows_of_texts(texts: dict[str, Path], annotations: list[list[str]], problems: list[str]) -> dict[str, list[int]]:
    """Rows by split: those of equal lines of Annotations.txt in the order in which the lines come."""
    rows_of: dict[tuple[str, ...], deque[int]] = defaultdict(deque)
    for row, parts in enumerate(annotations):
        rows_of[_line_key(parts)].append(row)
    rows: dict[str, list[int]] = {}
    for split, path in texts.items():
        rows[split] = []
        for number, line in read_lines(path) if os.path.lexists(path) else []:
            if line == HEADER:
                continue
            if found := rows_of.get(_line_key(_split_line(line))):
                rows[split].append(found.popleft() if len(found) > 1 else found[0])
            else:
                problems.append(f"{path}: line {number}: {quoted(line)} is not in Annotations.txt")
    return rows


def _is_row(parts: list[str]) -> bool:
    return len(parts) == 5 and all(re.fullmatch(r"\d+(\.\d*)?", part) for part in parts[3:])


def _split_line(line: str) -> list[str]:
    return [part.strip() for part in line.split("&")]


def _line_key(parts: list[str]) -> tuple[str, ...]:
    return (parts[0], parts[1], *parts[3:]) if len(parts) == 5 else tuple(parts)
