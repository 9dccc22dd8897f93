"""Which videos to extract: the published lists, and the file of each video in a folder."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from cpsp_dist.data.manifest import SPLITS
from cpsp_dist.errors import DataError, UserError
from cpsp_dist.packing.source import Entry
from cpsp_dist.packing.text import COLUMNS, read_csv, read_text
from cpsp_dist.utils.text import quoted

SUFFIXES = (".mp4", ".mkv", ".webm")
START_COLUMNS = ("start", "start_second", "start_seconds")


@dataclass(frozen=True)
class ListedVideo:
    """A line of a list of videos. `start`: the clip's first second, where the list names it."""

    line: int
    video_id: str
    category: str
    split: str
    start: float | None = None

    @property
    def problem(self) -> str | None:
        """Why it cannot be extracted."""
        if not Entry(0, self.video_id, self.split, 0).names_a_file:
            return f"{quoted(self.video_id)} is not a video id"
        if self.split not in SPLITS:
            return f"split {quoted(self.split)} is not one of {', '.join(SPLITS)}"
        return None if self.category else "no category"


def read_list(path: Path) -> list[ListedVideo]:
    """The videos of a csv with the header `category,video_id,split` (and perhaps `start`), or in VGGSound's own form.

    That one has no header, and the columns `video_id,start second,category,split`.

    Raises:
        DataError: neither form, a start that is no second, no videos, an id that is there twice; names file and line.
    """
    first = read_text(path).split("\n", 1)[0].lower()
    rows = _with_header(path) if {*COLUMNS} <= {name.strip(' "') for name in first.split(",")} else _vggsound(path)
    found: dict[str, ListedVideo] = {}
    for row in rows:
        if row.video_id in found:
            before = found[row.video_id].line
            raise DataError(f"{path}: line {row.line}: {quoted(row.video_id)} is there twice, first in line {before}")
        found[row.video_id] = row
    if not found:
        raise DataError(f"{path}: no videos in it")
    return [*found.values()]


def _with_header(path: Path) -> Iterator[ListedVideo]:
    for line, fields in read_csv(path):
        start = next((fields[name] for name in START_COLUMNS if name in fields), "")
        seconds = _second(start, f"{path}: line {line}") if start else None
        yield ListedVideo(line, fields["video_id"], fields["category"], fields["split"], seconds)


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
