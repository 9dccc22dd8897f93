"""What the layouts with a csv of videos, and arrays of their own for each video, have in common.

- `--csv`: `category,video_id,split` (that header, any order of columns); `--categories`: names, in class order.
- Visual [10, 7, 7, C] or [10, C, 7, 7], audio [t, A], label [1, 10] or [10] of 0 and 1. With audio of other than ten
  rows the last one is repeated, or what is beyond ten is cut, as the published loader does.
- `--labels` may also be a json file: `{id: {"label": […]}}`, `{id: […]}`, or a list of such; lists also as text.

A layout says, as an `ArrayStore`, where the array of a video id lies.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from cpsp_dist.data.manifest import SPLITS
from cpsp_dist.errors import DataError
from cpsp_dist.packing.source import Entry, Features, SourceOptions, channels_last, find_files
from cpsp_dist.packing.text import COLUMNS, as_mask, read_categories, read_csv, read_label_file
from cpsp_dist.utils.text import quoted

SEGMENTS = 10


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
        files = {k: v for k, v in find_files(options, common | self.names, optional=set()).items() if v is not None}
        self.options = options
        self._label_file = files["labels"]
        self._json = read_label_file(self._label_file) if self._label_file.suffix == ".json" else None
        kinds = ("visual", "audio") if self._json is not None else ("visual", "audio", "labels")
        self._stores = {kind: self.store(files[kind], kind) for kind in kinds}
        self.categories = read_categories(files["categories"])
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.entries = self._read_csv(files["csv"])

    def read(self, entry: Entry) -> Features:
        visual, audio = (self._stores[kind].load(entry.video_id) for kind in ("visual", "audio"))
        if audio.ndim != 2 or not len(audio):
            raise DataError(f"{self._where('audio', entry)}: shape {list(audio.shape)}, expected [t, A]")
        note = ""
        if len(audio) != SEGMENTS:
            change = "repeats the last one" if len(audio) < SEGMENTS else f"is cut to {SEGMENTS}"
            note = f"audio of {len(audio)} rows {change}"
        audio = audio[np.minimum(np.arange(SEGMENTS), len(audio) - 1)]
        if self._json is None:
            label = self._stores["labels"].load(entry.video_id)
        else:
            label = as_mask(self._json[entry.video_id], self._label_file)
        if label.shape not in ((SEGMENTS,), (1, SEGMENTS)):
            expected = f"expected [1, {SEGMENTS}] or [{SEGMENTS}]"
            raise DataError(f"{self._where('labels', entry)}: label of shape {list(label.shape)}, {expected}")
        visual = channels_last(visual, self.options.visual_order, self._where("visual", entry))
        return Features(visual, audio, label.reshape(SEGMENTS), note)

    def files(self, entry: Entry) -> list[Path]:
        files = [store.file(entry.video_id) for store in self._stores.values()]
        return files if self._json is None else [*files, self._label_file]

    def _where(self, kind: str, entry: Entry) -> str:
        return str(self._stores[kind].file(entry.video_id) if kind in self._stores else self._label_file)

    def _read_csv(self, path: Path) -> list[Entry]:
        """The videos that can be read; a problem for each of the others."""
        present = {kind: store.ids() for kind, store in self._stores.items()}
        class_of = {name: k for k, name in enumerate(self.categories)}
        first: dict[str, Entry] = {}
        for row, (number, fields) in enumerate(read_csv(path)):
            category, video_id, split = (fields[name] for name in COLUMNS)
            entry = Entry(row, video_id, split, class_of.get(category, -1))
            missing = [self._where(kind, entry) for kind, ids in present.items() if video_id not in ids]
            if not entry.names_a_file:
                problem = "not a video id"
            elif entry.category < 0:
                problem = f"category {quoted(category)} is not in the categories file"
            elif split not in SPLITS:
                problem = f"split {quoted(split)} is not one of {', '.join(SPLITS)}"
            elif video_id in first:
                problem = f"listed in row {first[video_id].row} ({first[video_id].split}) and again in {split}"
            elif missing:
                problem = f"missing: {', '.join(missing)}"
            elif self._json is not None and video_id not in self._json:
                problem = f"not in {self._label_file}"
            else:
                first[video_id] = entry
                continue
            self.problems.append(f"{path}: line {number}: {entry.name}: {problem}")
        return list(first.values())


def folder_ids(folder: Path, suffix: str, kind: str) -> set[str]:
    """Names of the files with `suffix` in `folder`, without it; raises DataError if it is no folder."""
    if not folder.is_dir():
        raise DataError(f"--{kind} {folder}: not a folder of {suffix} files")
    return {path.name.removesuffix(suffix) for path in folder.iterdir() if path.name.endswith(suffix)}
