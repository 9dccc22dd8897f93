"""AVE's background videos, `*_noisy.h5`: more training videos for weak supervision, each background throughout.

- `visual_feature_noisy.h5` [M, T, H, W, C] (or channels first) or [M, T, C], `audio_feature_noisy.h5` [M, T, A]: as
  `visual_feature.h5` and `audio_feature.h5`, of which no split and no annotation knows these videos.
- `labels_noisy.h5` [M, K+1], where it is there: one-hot, and background, the last class, for each of them.

The weakly supervised code of AVE (Tian et al., ECCV 2018) trains on them beside the training split.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from cpsp_dist.packing import h5
from cpsp_dist.packing.source import Entry, Features
from cpsp_dist.utils.errors import DataError, UserError

ARRAYS = ("avadataset", "dataset")
VISUAL, AUDIO, LABELS = "visual_feature_noisy.h5", "audio_feature_noisy.h5", "labels_noisy.h5"


class NoisyVideos:
    """Those in `folder`, as rows from `first` on of a source whose visual and audio arrays are `like`.

    Raises:
        UserError: files are missing; DataError: they do not fit each other, or `like`.
    """

    def __init__(self, folder: Path, first: int, like: tuple[h5py.Dataset, h5py.Dataset]):
        if missing := [name for name in (VISUAL, AUDIO) if not (folder / name).exists()]:
            raise UserError(f"{folder}: no {' and no '.join(missing)} here, which --noisy asks for")
        self.paths = [folder / VISUAL, folder / AUDIO]
        self._visual, self._audio = (h5.find_array(h5.open_file(path), ARRAYS) for path in self.paths)
        self._first = first
        for ours, others in zip((self._visual, self._audio), like, strict=True):
            if ours.shape[1:] != others.shape[1:]:
                raise DataError(
                    f"{ours.file.filename}: videos of shape {list(ours.shape[1:])}, but {others.file.filename} has "
                    f"{list(others.shape[1:])}"
                )
        if len(self._visual) != len(self._audio):
            raise DataError(f"{self.paths[0]}: {len(self._visual)} videos, but {self.paths[1]} has {len(self._audio)}")
        labels = folder / LABELS
        self.problems: dict[int, str] = _not_background(labels, len(self._audio)) if labels.exists() else {}

    def entries(self) -> list[Entry]:
        """Training videos without a category, called `noisy000000`, …"""
        return [Entry(self._first + i, f"noisy{i:06d}", "train", -1) for i in range(len(self._audio))]

    def read(self, entry: Entry) -> tuple[Features, str]:
        """The features of one, its map in either axis order, and the file that this comes from."""
        place = entry.row - self._first
        audio = h5.read(self._audio, place)
        visual = h5.read(self._visual, place)
        return Features(visual, audio, np.zeros(len(audio), np.uint8)), str(self.paths[0])


def _not_background(path: Path, videos: int) -> dict[int, str]:
    """By number, what is wrong with a video's label."""
    labels = h5.find_array(h5.open_file(path), ARRAYS)
    if labels.ndim != 2 or len(labels) != videos:
        raise DataError(f"{path}: shape {list(labels.shape)}, expected [{videos}, K+1]")
    values = h5.read(labels, ..., "array")
    right = np.zeros_like(values)
    right[:, -1] = 1
    return {int(i): f"{path}: its label is not background alone" for i in np.flatnonzero((values != right).any(axis=1))}
