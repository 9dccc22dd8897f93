"""What is to be extracted: the listed videos with their labels and files, and what is wrong with the others."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpsp_dist.extraction.decoders import ClipJob
from cpsp_dist.extraction.options import ExtractOptions
from cpsp_dist.extraction.video_list import ListedVideo, VideoFolder, read_list
from cpsp_dist.packing.avel100k_zip import ZipFolder
from cpsp_dist.packing.npy_files import NpyFolder
from cpsp_dist.packing.per_video import ArrayStore, JsonLabels
from cpsp_dist.packing.text import read_categories
from cpsp_dist.utils import files
from cpsp_dist.utils.errors import DataError, UserError
from cpsp_dist.utils.text import quoted

#: Of folders of labels, a file a video.
FOLDERS: dict[str, type[ArrayStore]] = {".zip": ZipFolder, ".npy": NpyFolder}


@dataclass(frozen=True)
class Work:
    """Attributes:
    listed: all videos, in the list's order; those of which the list is right have their labels, where these are given.
    categories: names in class order.
    jobs: what to decode, by video id. A video may be in several rows.
    wrong: a problem of each other row, by its line: what the list or the labels say of it.
    missing: a problem of each video id without a file.
    """

    listed: list[ListedVideo]
    categories: list[str]
    jobs: dict[str, ClipJob]
    wrong: dict[int, str]
    missing: dict[str, str]

    @property
    def right(self) -> list[ListedVideo]:
        """The rows whose videos are to be extracted, if they can be."""
        return [video for video in self.listed if video.line not in self.wrong]

    def problems(self, failed: dict[str, str]) -> dict[int, str]:
        """By line: of all rows without features. failed: videos that could not be decoded, by id."""
        found = {video.line: text for video in self.right if (text := (self.missing | failed).get(video.video_id))}
        return dict(sorted((self.wrong | found).items()))

    def write_report(self, path: Path, problems: dict[int, str], notes: dict[int, list[str]]) -> None:
        """A line of JSON for each row that is left out or has notes."""
        lines = []
        for video in self.listed:
            about: dict[str, Any] = {"video_id": video.video_id, "line": video.line}
            if video.line in problems:
                lines.append(about | {"problem": problems[video.line]})
            elif notes.get(video.line):
                lines.append(about | {"notes": notes[video.line]})
        files.write_text(path, "".join(f"{json.dumps(line)}\n" for line in lines))


def find_work(options: ExtractOptions) -> Work:
    """Read the list, the labels and the folder's names.

    Raises:
        UserError: one of them cannot be read or is of no known form; with labels by id, an id of several rows.
    """
    found = read_list(options.csv, options.segments, options.segment_seconds)
    categories = found.categories if options.categories is None else read_categories(options.categories)
    listed, wrong = found.videos, {}
    if options.labels is not None:
        _check_one_row_each(options.csv, listed)
        labels = read_labels(options.labels, {video.video_id for video in listed}, options.segments)
        given = {name: label for name, label in labels.items() if not isinstance(label, str)}
        listed = [replace(video, label=given.get(video.video_id)) for video in listed]
        bad = {name: label for name, label in labels.items() if isinstance(label, str)}
    else:
        bad = {}
    folder = VideoFolder(options.videos, {video.video_id for video in listed})
    jobs: dict[str, ClipJob] = {}
    missing: dict[str, str] = {}
    for video in listed:
        problem = video.problem or bad.get(video.video_id)
        if problem is None and video.category not in categories:
            problem = f"category {quoted(video.category)} is not in {options.categories}"
        if problem is not None:
            wrong[video.line] = f"{options.csv}: line {video.line}: {problem}"
        elif video.video_id not in jobs and video.video_id not in missing:
            try:
                jobs[video.video_id] = _job(options.videos, folder, video)
            except DataError as error:
                missing[video.video_id] = str(error)
    return Work(listed, categories, jobs, wrong, missing)


def _check_one_row_each(path: Path, listed: list[ListedVideo]) -> None:
    """Labels by id are the same in each row of a video, even in two splits. Raises DataError."""
    first: dict[str, int] = {}
    for video in listed:
        before = first.setdefault(video.video_id, video.line)
        if before != video.line:
            raise DataError(
                f"{path}: line {video.line}: {quoted(video.video_id)} is there twice, first in line {before}; --labels "
                "has one label of a video: leave one of the lines out, or --labels where the list has labels"
            )


def _job(videos: Path, folder: VideoFolder, video: ListedVideo) -> ClipJob:
    """Raises DataError: no such file, or it cannot be read: a dangling link, or removed since the folder was listed."""
    name, start = folder.find(video)
    try:
        stat = os.stat(videos / name)
    except OSError as error:
        raise DataError(f"{videos / name}: cannot be read ({error.strerror})") from None
    return ClipJob(video.video_id, videos / name, start, (stat.st_size, stat.st_mtime_ns))


def read_labels(path: Path, video_ids: Iterable[str], segments: int) -> dict[str, tuple[int, ...] | str]:
    """Each video's label, of 0 and 1 a segment, or what is wrong with it.

    path: the published forms: a json file, or a folder of `ID.zip`, each with a pickled array; or of `ID.npy`.

    Raises:
        UserError: it is of none of these forms; DataError: a json file that is damaged.
    """
    store = _label_store(path)
    there = store.ids()
    return {name: _label(store, name, there, segments) for name in sorted(video_ids)}


def _label_store(path: Path) -> ArrayStore:
    if not path.is_dir():
        return JsonLabels(path)
    suffixes = {entry.name[-4:] for entry in os.scandir(path)} & FOLDERS.keys()
    if len(suffixes) != 1:
        raise UserError(f"--labels {path}: a folder of ID.zip files, or one of ID.npy files, is read")
    return FOLDERS[suffixes.pop()](path, "labels")


def _label(store: ArrayStore, name: str, there: set[str], segments: int) -> tuple[int, ...] | str:
    if name not in there:
        return (
            f"video {quoted(name)} is not in {store.file(name)}"
            if isinstance(store, JsonLabels)
            else f"no file {store.file(name)}"
        )
    try:
        label = store.load(name)
    except DataError as error:
        return str(error)
    if label.shape not in ((segments,), (1, segments)):
        return f"{store.file(name)}: label of shape {list(label.shape)}, expected [1, {segments}] or [{segments}]"
    values = label.ravel().tolist()
    if not {*values} <= {0, 1}:
        return f"{store.file(name)}: label with values other than 0 and 1"
    return tuple(int(value) for value in values)
