"""Lists as text files: lines, class names, the csv of videos. Every error names the file and the line."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cpsp_dist.data.shard_index import MAX_NAME
from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.input_files import read_input
from cpsp_dist.utils.strict_json import load_json
from cpsp_dist.utils.text import is_plain, quoted

MAX_BYTES = 256 * 2**20  # a list of a few million videos
MAX_JSON_BYTES = 128 * 2**20
MAX_CLASSES = 65_536
COLUMNS = ("category", "video_id", "split")
LABEL = "label"  # a column that may be there beside them


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark; lines end with a line feed alone."""
    data = read_input(path, MAX_BYTES)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}: line 1: UTF-16; save it as UTF-8")
    if (place := data.find(b"\0")) >= 0:
        raise DataError(f"{path}: line {_line(data, place)}: a zero byte; not a text file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: line {_line(data, error.start)}: not UTF-8; save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(number from 1, text without blanks around it) of the lines that are not empty; raises DataError."""
    lines = ((number, line.strip()) for number, line in enumerate(read_text(path).split("\n"), 1))
    return [(number, line) for number, line in lines if line]


def read_categories(path: Path) -> list[str]:
    """Class names, one a line, in class order. Raises DataError: none, a name twice, a name no terminal can show."""
    names: dict[str, int] = {}
    for number, name in read_lines(path):
        if name in names:
            raise DataError(f"{path}: line {number}: class {quoted(name)} is there twice, first in line {names[name]}")
        if not is_plain(name) or len(name) > MAX_NAME:
            raise DataError(f"{path}: line {number}: {quoted(name)} is too long, or holds control characters")
        names[name] = number
        if len(names) > MAX_CLASSES:
            raise DataError(f"{path}: more than {MAX_CLASSES} lines; not a file of class names")
    if not names:
        raise DataError(f"{path}: no class names in it, one a line")
    return [*names]


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, fields) of each row after the header, which names `COLUMNS` in any order, perhaps among others.

    Raises:
        DataError: another header, a row of another length, quotes that do not fit.
    """
    reader = csv.reader(read_text(path).split("\n"), strict=True, skipinitialspace=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            at = f"s {start} to {reader.line_num}" if reader.line_num > start else f" {start}"
            raise DataError(f"{path}: line{at}: {error}; is a quotation mark missing?") from None
        if header is None:
            header = [name.strip().lower() for name in row or ()]
            while header and not header[-1]:  # commas at the end
                header.pop()
            if not {*COLUMNS} <= {*header} or len({*header}) < len(header):
                raise DataError(f"{path}: its first line has to name the columns {','.join(COLUMNS)}, each once")
            continue
        if row is None:
            return
        while len(row) > len(header) and not row[-1].strip():
            row.pop()
        if not any(field.strip() for field in row):
            continue
        if len(row) != len(header):
            raise DataError(
                f"{path}: line {start}: {len(row)} fields, the header has {len(header)}; a name with a comma in it"
                " needs quotation marks"
            )
        yield start, {name: field.strip() for name, field in zip(header, row, strict=True)}


def read_label_file(path: Path) -> dict[str, Any]:
    """{video id: label, as it stands there} of a json file; see `per_video` for its forms."""
    try:
        content = load_json(read_input(path, MAX_JSON_BYTES), str(path))
    except ValueError as error:
        raise DataError(str(error)) from None
    labels: dict[str, Any] = {}
    for number, part in enumerate(content if isinstance(content, list) else [content]):
        if not isinstance(part, dict) or "label" in part:  # the latter is one video's, whose id is elsewhere
            raise DataError(f'{path}: not a label file of the form {{id: {{"label": […]}}}} or {{id: […]}}')
        for video_id, value in part.items():
            where = f"{path}: {f'item {number}, ' if isinstance(content, list) else ''}video {quoted(video_id)}"
            if video_id in labels:
                raise DataError(f"{where} is in it twice")
            if isinstance(value, dict) and "label" not in value:
                raise DataError(f"{where}: no key 'label' in it")
            labels[video_id] = value["label"] if isinstance(value, dict) else value
    return labels


def as_mask(value: Any, path: Path | str) -> np.ndarray:
    """A label of `read_label_file` as an array; raises DataError."""
    try:
        return np.array(load_json(value) if isinstance(value, str) else value, dtype=np.float64)
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise DataError(f"{path}: label {quoted(str(value))} is not a list of numbers") from None


def _line(data: bytes, place: int) -> int:
    return data.count(b"\n", 0, place) + 1
