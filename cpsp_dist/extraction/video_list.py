"""Which videos to extract: the published lists, and the file of each video in a folder."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cpsp_dist.data.manifest import SPLITS
from cpsp_dist.packing.annotations import is_annotations, read_annotations, read_splits
from cpsp_dist.packing.source import Entry
from cpsp_dist.packing.text import COLUMNS, LABEL, as_mask, read_csv, read_text
from cpsp_dist.utils.errors import DataError, UserError
from cpsp_dist.utils.text import quoted

logger = logging.getLogger(__name__)

SUFFIXES = (".mp4", ".mkv", ".webm")
START_COLUMNS = ("start", "start_second", "start_seconds")


@dataclass(frozen=True)
class ListedVideo:
    """A line of a list of videos.

    Attributes:
        start: the clip's first second, where the list names it.
        label: 0 or 1 a segment, where the list has it; several lines may then be of one video.
    """

    line: int
    video_id: str
    category: str
    split: str
    start: float | None = None
    label: tuple[int, ...] | None = None

    @property
    def problem(self) -> str | None:
        """Why it cannot be extracted."""
        if not Entry(0, self.video_id, self.split, 0).names_a_file:
            return f"{quoted(self.video_id)} is not a video id"
        if self.split not in SPLITS:
            return f"split {quoted(self.split)} is not one of {', '.join(SPLITS)}"
        return None if self.category else "no category"


@dataclass(frozen=True)
class VideoList:
    """categories: in the order in which classes are numbered where no file gives it."""

    videos: list[ListedVideo]
    categories: list[str]


def read_list(path: Path, segments: int = 10, segment_seconds: float = 1.0) -> VideoList:
    """The videos of a list in one of three forms.

    - A csv with the header `category,video_id,split`, and perhaps `start` and `label` (`"[0, 1, …]"`).
    - VGGSound's own: no header, and the columns `video_id,start second,category,split`.
    - AVE's `Annotations.txt`, with the files of its splits beside it (see `packing/annotations.py`). Its categories are
      in the order in which they come, which is that of AVE's labels; those of the others are sorted.

    Raises:
        DataError: none of these forms, a start that is no second, no videos, an id that is there twice (without labels
            of its own); names file and line. UserError: Annotations without splits.
    """
    first = read_text(path).split("\n", 1)[0]
    if {*COLUMNS} <= {name.strip(' "') for name in first.lower().split(",")}:
        rows = [*_with_header(path, segments)]
    elif is_annotations(first):
        rows = [*_annotations(path, segments, segment_seconds)]
    else:
        rows = [*_vggsound(path)]
    found: dict[str, ListedVideo] = {}
    for row in rows:
        before = found.setdefault(row.video_id, row)
        if before is not row and (row.label is None or before.label is None or row.start != before.start):
            raise DataError(
                f"{path}: line {row.line}: {quoted(row.video_id)} is there twice, first in line {before.line}"
            )
    if not found:
        raise DataError(f"{path}: no videos in it")
    names = [*dict.fromkeys(row.category for row in rows if row.category)]
    return VideoList(rows, names if is_annotations(first) else sorted(names))


def _with_header(path: Path, segments: int) -> Iterator[ListedVideo]:
    for line, fields in read_csv(path):
        start = next((fields[name] for name in START_COLUMNS if name in fields), "")
        seconds = _second(start, f"{path}: line {line}") if start else None
        label = _label(fields[LABEL], segments, f"{path}: line {line}") if LABEL in fields else None
        yield ListedVideo(line, fields["video_id"], fields["category"], fields["split"], seconds, label)


def _label(text: str, segments: int, where: str) -> tuple[int, ...]:
    label = as_mask(text, where)
    if label.shape not in ((segments,), (1, segments)) or not np.isin(label, (0, 1)).all():
        raise DataError(f"{where}: label {quoted(text)} is not a list of {segments} numbers 0 and 1")
    return tuple(int(value) for value in label.ravel())


def _annotations(path: Path, segments: int, seconds: float) -> Iterator[ListedVideo]:
    """A segment is one of the event where its middle lies within."""
    rows = read_annotations(path)
    splits = read_splits(path.parent, [parts for _, parts in rows], [parts[1] for _, parts in rows])
    if splits.problems:
        more = f" (and {len(splits.problems) - 1:,} more problems)" if len(splits.problems) > 1 else ""
        raise DataError(f"{splits.problems[0]}{more}")
    if unused := len(rows) - len(splits.of_row):
        logger.info(f"note: {unused:,} of {len(rows):,} rows of {path} are in no split and are left out")
    middles = (np.arange(segments) + 0.5) * seconds
    for row, (line, (category, video_id, _, start, end)) in enumerate(rows):
        if row in splits.of_row:
            label = (float(start) <= middles) & (middles < float(end))
            yield ListedVideo(line, video_id, category, splits.of_row[row], label=tuple(map(int, label)))


def _vggsound(path: Path) -> Iterator[ListedVideo]:
    import csv

    reader = csv.reader(read_text(path).split("\n"), skipinitialspace=True)
    for row in reader:
        if not any(row):
            continue
        where = f"{path}: line {reader.line_num}"
        if len(row) != 4:
            raise DataError(
                f"{where}: {len(row)} fields; the lines of a list without the header {','.join(COLUMNS)} "
                "are video_id,start,category,split"
            )
        video_id, start, category, split = (field.strip() for field in row)
        yield ListedVideo(reader.line_num, video_id, category, split, _second(start, where))


def _second(text: str, where: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        raise DataError(f"{where}: start {quoted(text)} is not a second from 0 on")
    return seconds


class VideoFolder:
    """The video files of a folder: `ID.mp4|mkv|webm`, or `ID_START.ext`, as VGGSound's tools name cut clips.

    listed: all video ids of the list. A file that bears one of them complete (`abc_12.mp4` of `abc_12`) is that video's
    alone, and no cut of `abc` from second 12 on.

    Raises:
        UserError: no such folder, or nothing in it has one of the suffixes.
    """

    def __init__(self, folder: Path, listed: Collection[str] = ()):
        self.folder = folder
        self._files: dict[str, list[str]] = defaultdict(list)  # by the name without suffix
        self._starts: dict[str, list[tuple[float, str]]] = defaultdict(list)  # by the id: (start, name)
        try:
            names = sorted(entry.name for entry in os.scandir(folder))
        except OSError as error:
            raise UserError(f"--videos {folder}: cannot be read ({error.strerror})") from None
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() not in SUFFIXES:
                continue
            self._files[stem].append(name)
            video_id, _, start = stem.rpartition("_")
            if video_id and stem not in listed and start.isascii() and start.replace(".", "", 1).isdigit():
                self._starts[video_id].append((float(start), stem))
        if not self._files:
            raise UserError(f"--videos {folder}: no {', '.join(SUFFIXES)} files in it")

    def find(self, video: ListedVideo) -> tuple[str, float | None]:
        """(the file's name, the second in it where the clip begins; None: the file is the clip).

        Of a video with a start second that is `ID_START.ext`, else `ID.ext`; of one without, `ID.ext`, else the file
        with the larger start, as VGGSound-AVEL100k's authors chose.

        Raises:
            DataError: there is none, or several are named alike.
        """
        cut = [stem for start, stem in sorted(self._starts.get(video.video_id, ())) if video.start in (None, start)]
        if video.start is not None and cut:
            return self._one(cut[-1]), None
        if video.video_id in self._files:
            return self._one(video.video_id), video.start
        if cut:
            return self._one(cut[-1]), None
        start = "START" if video.start is None else f"{video.start:g}"
        raise DataError(f"{self.folder}: no file {video.video_id}.mp4, .mkv or .webm, nor {video.video_id}_{start}.mp4")

    def _one(self, stem: str) -> str:
        names = self._files[stem]
        if len(names) > 1:
            raise DataError(f"{self.folder}: {' and '.join(names)} are there; keep one of them")
        return names[0]
