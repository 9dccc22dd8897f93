"""Folders of `{video_id}.npy`, one folder for each of visual, audio and labels. Csv and shapes: see `per_video.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cpsp_dist.errors import DataError
from cpsp_dist.packing.per_video import PerVideo, folder_ids


class NpyFolder:
    def __init__(self, path: Path, kind: str):
        self.folder, self._ids = path, folder_ids(path, ".npy", kind)

    def ids(self) -> set[str]:
        return self._ids

    def file(self, video_id: str) -> Path:
        return self.folder / f"{video_id}.npy"

    def load(self, video_id: str) -> np.ndarray:
        path = self.file(video_id)
        try:
            array = np.load(path, allow_pickle=False)
        except Exception as error:  # numpy evaluates the header's text: damage there raises nearly any type
            raise DataError(f"{path}: not a readable .npy file, damaged or cut short ({error})") from None
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
            raise DataError(f"{path}: not an array of numbers")
        return array


class NpyFiles(PerVideo):
    store = NpyFolder
