"""The AVE layout: one HDF5 file for each of visual features, audio features and labels, a row for each video.

- `visual_feature.h5` [N, T, H, W, C] (or channels first) or [N, T, C], `audio_feature.h5` [N, T, A], `right_labels.h5`
  or `labels.h5` [N, T, K+1] one-hot with background last. Key `avadataset` or `dataset`; any float type.
- Splits from `{train,val,test}_order.h5` (key `order`, row numbers), else from `{train,val,test}Set.txt`, whose lines
  are looked up in `Annotations.txt`.
- `Annotations.txt` (`Category&VideoID&Quality&StartTime&EndTime`, with or without that header) names row 0, 1, …; a row
  beyond its last line has no id and is called `row000222`. Class names: `categories.txt`, else Annotations.
- `mil_labels.h5` [N, K+1] gives the category of a video without any event; else Annotations does; else it is -1.

A source with `mil_labels.h5` alone is refused: evaluation needs a label for each second also where training does not.
The `*_noisy.h5` files, background videos that weakly supervised work adds to training, are of no split; they are read
with `noisy` (`ave_noisy.py`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np

from cpsp_dist.packing import h5
from cpsp_dist.packing.annotations import read_annotations, read_splits
from cpsp_dist.packing.ave_noisy import ARRAYS, NoisyVideos
from cpsp_dist.packing.source import (
    Entry,
    Features,
    SourceOptions,
    channels_last,
    find_files,
    is_channels_first,
)
from cpsp_dist.packing.text import read_categories
from cpsp_dist.utils.errors import DataError, UserError
from cpsp_dist.utils.text import quoted

FILES = {
    "audio": ("audio_feature.h5", "audio_features.h5"),
    "labels": ("right_labels.h5", "labels.h5"),
    "mil": ("mil_labels.h5",),
    "annotations": ("Annotations.txt",),
    "categories": ("categories.txt",),
}
CHUNK_BYTES = 4 * 2**20  # of labels, read at once


class AveH5:
    visual_names: tuple[str, ...] = ("visual_feature.h5", "visual_features.h5")
    has_noisy = True

    def __init__(self, options: SourceOptions):
        if options.source is None:
            raise UserError(f"the {options.layout} layout needs --source, the folder of *_order.h5 or *Set.txt files")
        names = {"visual": self.visual_names} | FILES
        files = find_files(options, names, optional={"mil", "annotations", "categories"})
        self.options = options
        self.problems: list[str] = []
        self.notes: list[str] = []
        visual, audio, labels = (path for name in ("visual", "audio", "labels") if (path := files[name]))
        self._files = [audio, labels]
        self._audio, label_data = _open(audio), _open(labels)
        self._check_shapes(label_data)
        self._open_visual(visual)
        self._events, of_events, bad_rows = _read_labels(label_data)
        videos, classes = len(self._events), label_data.shape[2] - 1
        annotations = _annotations(files["annotations"], videos)
        if annotations and len(annotations) < videos:
            self.notes.append(
                f"{files['annotations']} names rows 0 to {len(annotations) - 1} of {videos}; no ids after"
            )
        self.ids = [a[1] for a in annotations] + [f"row{row:06d}" for row in range(len(annotations), videos)]
        self.categories = _class_names(files["categories"], annotations, of_events, classes)
        bad_rows = _disagreements(self.categories, annotations, of_events) | bad_rows
        category = self._categories_by_row(files["mil"], annotations, of_events, classes)
        self.entries = []
        splits = read_splits(options.source, annotations, self.ids)
        self.problems += splits.problems
        if unused := videos - len(splits.of_row):
            self.notes.append(f"{unused} of {videos} videos are in no split and are not packed")
        for row, split in sorted(splits.of_row.items()):
            entry = Entry(row, self.ids[row], split, category[row])
            if row in bad_rows:
                self.problems.append(f"{entry.name}: {bad_rows[row]}")
            else:
                self.entries.append(entry)
        self._note_repeated_ids()
        self._noisy_from = videos
        if options.noisy:
            self._add_noisy(options.source)
        if self.entries and not (self._events.any(axis=1) & ~self._events.all(axis=1)).any():
            self.notes.append(f"{labels}: no video has segments of both kinds; are these labels with background last?")

    def read(self, entry: Entry) -> Features:
        if entry.row >= self._noisy_from:
            found, where = self._noisy.read(entry)
            return replace(found, visual=channels_last(found.visual, self.options.visual_order, where))
        visual, where = self._visual_map(entry)
        visual = channels_last(visual, self.options.visual_order, where)
        return Features(visual, h5.read(self._audio, entry.row), self._events[entry.row].astype(np.uint8))

    def files(self, entry: Entry) -> list[Path]:
        return self._noisy.paths if entry.row >= self._noisy_from else self._files

    def _add_noisy(self, folder: Path) -> None:
        self._noisy = NoisyVideos(folder, self._noisy_from, (self._visual, self._audio))
        for number, entry in enumerate(self._noisy.entries()):
            if number in self._noisy.problems:
                self.problems.append(f"{entry.name}: {self._noisy.problems[number]}")
            else:
                self.entries.append(entry)

    def _open_visual(self, path: Path) -> None:
        """Get ready to read visual maps from `--visual`."""
        self._files.append(path)
        self._visual = _open(path)
        if self._visual.ndim not in (3, 5):
            raise DataError(f"{path}: shape {list(self._visual.shape)}, expected [N, T, H, W, C] or [N, T, C]")
        is_channels_first(self._visual.shape[1:], self.options.visual_order, f"{path} (after the video axis)")
        _same_videos(self._visual, self._audio)

    def _visual_map(self, entry: Entry) -> tuple[np.ndarray, str]:
        """A video's map in either axis order, and the file it comes from."""
        return h5.read(self._visual, entry.row), self._visual.file.filename

    def _check_shapes(self, labels: h5py.Dataset) -> None:
        for data, wanted in ((self._audio, "[N, T, A]"), (labels, "[N, T, K+1]")):
            if data.ndim != 3:
                raise DataError(f"{data.file.filename}: shape {list(data.shape)}, expected {wanted}")
        _same_videos(self._audio, labels)

    def _categories_by_row(
        self, mil: Path | None, annotations: list[list[str]], of_events: np.ndarray, classes: int
    ) -> list[int]:
        """The class of each video: by its events, else mil_labels, else Annotations, else -1."""
        known = of_events
        if mil is not None:
            known = np.where(of_events >= 0, of_events, _read_mil(_open(mil), len(of_events), classes))
        number = {name: k for k, name in enumerate(self.categories)}
        named = [number.get(a[0], -1) for a in annotations] + [-1] * (len(known) - len(annotations))
        return [int(k) if k >= 0 else name for k, name in zip(known, named, strict=True)]

    def _note_repeated_ids(self) -> None:
        # AVE cuts several rows from one video, some into different splits: its published splits, so no mistake here.
        splits_of = defaultdict(set)
        for entry in self.entries:
            splits_of[entry.video_id].add(entry.split)
        if (repeated := len(self.entries) - len(splits_of)) > 0:
            across = sum(len(splits) > 1 for splits in splits_of.values())
            self.notes.append(
                f"{len(self.entries)} rows are cut from {len(splits_of)} videos ({repeated} repeat an id); "
                f"{across} videos are in more than one split"
            )


def _open(path: Path | None, names: tuple[str, ...] = ARRAYS) -> h5py.Dataset:
    """The one array of an HDF5 file."""
    assert path is not None
    return h5.find_array(h5.open_file(path), names)


def _annotations(path: Path | None, videos: int) -> list[list[str]]:
    """[Category, VideoID, Quality, StartTime, EndTime] of row 0, 1, …"""
    rows = [parts for _, parts in read_annotations(path)] if path is not None else []
    if len(rows) > videos:
        raise DataError(f"{path}: {len(rows)} rows, but the labels are of {videos} videos; not of one data set")
    return rows


def _read_labels(labels: h5py.Dataset) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Events [N, T] bool, the category [N] of each video's events (-1 without any), and what is wrong by row."""
    events, categories, bad = [], [], {}
    rows = max(1, CHUNK_BYTES // max(1, labels.nbytes // max(1, len(labels))))
    for start, chunk in h5.read_all(labels, rows):
        seen = np.any(chunk[..., :-1], axis=1)  # [n, K]
        one_hot = np.isin(chunk, (0, 1)).all(axis=(1, 2)) & (chunk.sum(axis=2) == 1).all(axis=1)
        for i in np.flatnonzero(~one_hot):
            bad[start + int(i)] = f"label is not one-hot over {labels.shape[2] - 1} classes and background"
        for i in np.flatnonzero(one_hot & (seen.sum(axis=1) > 1)):
            bad[start + int(i)] = f"label has events of several classes: {np.flatnonzero(seen[i]).tolist()}"
        events.append(chunk[..., :-1].any(axis=2))
        categories.append(np.where(seen.any(axis=1), seen.argmax(axis=1), -1))
    if not events:
        raise DataError(f"{labels.file.filename}: no videos in it")
    return np.concatenate(events), np.concatenate(categories), bad


def _read_mil(mil: h5py.Dataset, videos: int, classes: int) -> np.ndarray:
    """[N]: each video's class, -1 for background."""
    if mil.shape != (videos, classes + 1):
        raise DataError(f"{mil.file.filename}: shape {list(mil.shape)}, expected [{videos}, {classes + 1}]")
    values = h5.read(mil, ..., "array")
    if not np.isfinite(values).all():
        raise DataError(f"{mil.file.filename}: holds values that are NaN or infinite")
    return np.where(values[:, :-1].any(axis=1), values[:, :-1].argmax(axis=1), -1)


def _class_names(path: Path | None, annotations: list[list[str]], of_events: np.ndarray, classes: int) -> list[str]:
    """Names in class order: of the categories file, else what the annotations call the videos of each class."""
    if path is not None:
        names = read_categories(path)
        if len(names) != classes:
            raise DataError(f"{path}: {len(names)} different names, but the labels have {classes} classes")
        return names
    votes: dict[int, Counter[str]] = defaultdict(Counter)
    for parts, k in zip(annotations, of_events, strict=False):
        votes[int(k)][parts[0]] += 1
    names = [votes[k].most_common(1)[0][0] if k in votes else f"class {k}" for k in range(classes)]
    for name, count in Counter(names).items():
        if count > 1:
            where = " and ".join(str(k) for k, other in enumerate(names) if other == name)
            raise DataError(f"Annotations.txt calls classes {where} of the labels '{name}'; give --categories")
    return names


def _disagreements(names: list[str], annotations: list[list[str]], of_events: np.ndarray) -> dict[int, str]:
    """Rows whose annotation contradicts their label: of a shifted or a foreign file, mostly."""
    return {
        row: f"Annotations.txt says {quoted(parts[0])}, its label says {quoted(names[k])}; is it the right"
        " Annotations file?"
        for row, (parts, k) in enumerate(zip(annotations, of_events, strict=False))
        if k >= 0 and parts[0] != names[k]
    }


def _same_videos(data: h5py.Dataset, other: h5py.Dataset) -> None:
    if data.shape[:2] != other.shape[:2]:
        raise DataError(
            f"{data.file.filename}: {data.shape[0]} videos of {data.shape[1]} segments, but "
            f"{other.file.filename} has {other.shape[0]} of {other.shape[1]}"
        )
