"""Folders of `{video_id}.npy`, one folder for each of visual, audio and labels. Csv and shapes: see `per_video.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cpsp_dist.packing.npy import parse_npy
from cpsp_dist.packing.per_video import PerVideo, folder_ids
from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.input_files import read_input

MAX_BYTES = 64 * 2**20  # of one array; [10, 2048, 7, 7] in float64 has 8 MB


class NpyFolder:
    def __init__(self, path: Path, kind: str):
        self.folder, self._ids = path, folder_ids(path, ".npy", kind)

    def ids(self) -> set[str]:
        return self._ids

    def file(self, video_id: str) -> Path:
        return self.folder / f"{video_id}.npy"

    def load(self, video_id: str) -> np.ndarray:
        path = self.file(video_id)
        data = read_input(path, MAX_BYTES)
        try:
            array = parse_npy(data)[0]
        except ValueError as error:
            raise DataError(f"{path}: not a readable .npy file, damaged or cut short ({error})") from None
        if array.dtype.kind not in "fiub":
            raise DataError(f"{path}: not an array of numbers")
        return array


class NpyFiles(PerVideo):
    store = NpyFolder
