"""What the layouts with a csv of videos, and arrays of their own for each video, have in common.

- `--csv`: `category,video_id,split` (that header, any order of columns); `--categories`: names, in class order.
- Visual [T, H, W, C], [T, C, H, W] or vectors [T, C] (the published ones of T = 10, 7 by 7), audio [t, A], label [1, T]
  or [T] of 0 and 1. With audio of other than T rows the last one is repeated, or what is beyond T is cut, as the
  published loader does.
- `--labels` may also be a json file: `{id: {"label": […]}}`, `{id: […]}`, or a list of such; lists also as text.
- Or the csv has a column `label` (`"[0, 1, …]"`). Then a video may be in several rows, each with its label, as AVE has
  them.

A layout says, as an `ArrayStore`, where the array of a video id lies.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from cpsp_dist.data.manifest import SPLITS
from cpsp_dist.packing.source import Entry, Features, SourceOptions, channels_last, find_files
from cpsp_dist.packing.text import COLUMNS, LABEL, as_mask, read_categories, read_csv, read_label_file
from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.text import quoted


class ArrayStore(Protocol):
    """One kind of array of all videos, at the path that `--visual`, `--audio` or `--labels` gives."""

    def __init__(self, path: Path, kind: str):
        """Raises DataError if `path` is not of this layout; `kind` is visual, audio or labels."""

    def ids(self) -> set[str]:
        """The videos that there is an array of."""

    def file(self, video_id: str) -> Path:
        """The file that a video's array lies in, for messages too."""

    def load(self, video_id: str) -> np.ndarray:
        """Raises DataError naming the file."""


class PerVideo:
    """A `Source`; each layout sets `store`, and `names` (of files that no flag gives) where they are others."""

    store: ClassVar[type[ArrayStore]]
    names: ClassVar[dict[str, tuple[str, ...]]] = {
        "visual": ("video", "visual"),
        "audio": ("audio",),
        "labels": ("label", "labels", "*labels.json", "*annos.json"),
    }

    def __init__(self, options: SourceOptions):
        common = {"csv": ("*.csv",), "categories": ("categories.txt", "*Categories.txt")}
        files = {k: v for k, v in find_files(options, common | self.names, {"labels"}).items() if v is not None}
        rows = [*read_csv(files["csv"])]
        #: Of the csv's column `label`, as they stand there.
        self._labels = {row: fields[LABEL] for row, (_, fields) in enumerate(rows) if LABEL in fields}
        if options.labels is not None:
            self._labels = {}
        if not self._labels and "labels" not in files:
            find_files(options, {"labels": self.names["labels"]}, set())  # raises
        self.options, self._csv = options, files["csv"]
        self._stores: dict[str, ArrayStore] = {kind: self.store(files[kind], kind) for kind in ("visual", "audio")}
        if not self._labels:
            of_json = files["labels"].suffix == ".json"
            self._stores["labels"] = JsonLabels(files["labels"]) if of_json else self.store(files["labels"], "labels")
        self.categories = read_categories(files["categories"])
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.entries = self._read_rows(rows)
        if repeated := len(self.entries) - len({entry.video_id for entry in self.entries}):
            self.notes.append(f"{repeated} of {len(self.entries)} rows repeat a video, each with its own label")

    def read(self, entry: Entry) -> Features:
        visual, audio = (self._stores[kind].load(entry.video_id) for kind in ("visual", "audio"))
        visual = channels_last(visual, self.options.visual_order, self._where("visual", entry))
        if audio.ndim != 2 or not len(audio):
            raise DataError(f"{self._where('audio', entry)}: shape {list(audio.shape)}, expected [t, A]")
        segments, note = len(visual), ""
        if len(audio) != segments:
            change = "repeats the last one" if len(audio) < segments else f"is cut to {segments}"
            note = f"audio of {len(audio)} rows {change}"
            audio = audio[np.minimum(np.arange(segments), len(audio) - 1)]
        label = self._label(entry)
        if label.shape not in ((segments,), (1, segments)):
            expected = f"expected [1, {segments}] or [{segments}] as the visual features have {segments} segments"
            raise DataError(f"{self._where('labels', entry)}: label of shape {list(label.shape)}, {expected}")
        return Features(visual, audio, label.reshape(segments), note)

    def files(self, entry: Entry) -> list[Path]:
        files = [store.file(entry.video_id) for store in self._stores.values()]
        return [*files, self._csv] if self._labels else files

    def _label(self, entry: Entry) -> np.ndarray:
        if self._labels:
            return as_mask(self._labels[entry.row], self._csv)
        return self._stores["labels"].load(entry.video_id)

    def _where(self, kind: str, entry: Entry) -> str:
        return str(self._stores[kind].file(entry.video_id) if kind in self._stores else self._csv)

    def _read_rows(self, rows: list[tuple[int, dict[str, str]]]) -> list[Entry]:
        """The videos that can be read; a problem for each of the others."""
        present = {kind: store.ids() for kind, store in self._stores.items()}
        class_of = {name: k for k, name in enumerate(self.categories)}
        first: dict[str, Entry] = {}
        found = []
        for row, (number, fields) in enumerate(rows):
            category, video_id, split = (fields[name] for name in COLUMNS)
            entry = Entry(row, video_id, split, class_of.get(category, -1))
            missing = [kind for kind, ids in present.items() if video_id not in ids]
            if not entry.names_a_file:
                problem = "not a video id"
            elif entry.category < 0:
                problem = f"category {quoted(category)} is not in the categories file"
            elif split not in SPLITS:
                problem = f"split {quoted(split)} is not one of {', '.join(SPLITS)}"
            elif video_id in first and not self._labels:
                problem = f"listed in row {first[video_id].row} ({first[video_id].split}) and again in {split}"
            elif missing == ["labels"] and isinstance(self._stores["labels"], JsonLabels):
                problem = f"not in {self._where('labels', entry)}"
            elif missing:
                problem = f"missing: {', '.join(self._where(kind, entry) for kind in missing)}"
            else:
                first[video_id] = entry
                found.append(entry)
                continue
            self.problems.append(f"{self._csv}: line {number}: {entry.name}: {problem}")
        return found


class JsonLabels:
    """Labels of all videos in one json file; an `ArrayStore`."""

    def __init__(self, path: Path, kind: str = "labels"):
        self._path, self._labels = path, read_label_file(path)

    def ids(self) -> set[str]:
        return {*self._labels}

    def file(self, video_id: str) -> Path:
        return self._path

    def load(self, video_id: str) -> np.ndarray:
        return as_mask(self._labels[video_id], self._path)


def folder_ids(folder: Path, suffix: str, kind: str) -> set[str]:
    """Names of the files with `suffix` in `folder`, without it; raises DataError if it is no folder."""
    if not folder.is_dir():
        raise DataError(f"--{kind} {folder}: not a folder of {suffix} files")
    return {path.name.removesuffix(suffix) for path in folder.iterdir() if path.name.endswith(suffix)}
