"""HDF5 files keyed by video id: `file[id]` is the array, or a group with `visual`, `audio` and `labels` in it.

So the three may be three files, or one given three times. Csv and shapes: see `per_video.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import h5py
import numpy as np

from cpsp_dist.packing import h5
from cpsp_dist.packing.per_video import PerVideo
from cpsp_dist.utils.errors import DataError

MEMBERS = {"visual": ("visual", "video"), "audio": ("audio",), "labels": ("labels", "label")}  # names in a group


class H5ById:
    def __init__(self, path: Path, kind: str):
        self.path, self.kind = path, kind
        try:
            self._file = h5.open_file(path)
        except DataError as error:
            raise DataError(f"--{kind} {error}") from None

    def ids(self) -> set[str]:
        try:
            return set(self._file)
        except Exception as error:
            raise h5.damaged(self.path, error) from None

    def file(self, video_id: str) -> Path:
        return self.path

    def load(self, video_id: str) -> np.ndarray:
        found = h5.find(self._file, (video_id,))
        if isinstance(found, h5py.Group):
            found = h5.find(found, MEMBERS[self.kind])
        if not isinstance(found, h5py.Dataset):
            raise DataError(f"{self.path}: '{video_id}' has no array of numbers '{self.kind}'")
        return h5.read(found, ..., f"'{video_id}'")


class H5Files(PerVideo):
    store = H5ById
    names: ClassVar = {
        "visual": ("video*.h5", "visual*.h5", "*.h5"),
        "audio": ("audio*.h5", "*.h5"),
        "labels": ("label*.h5", "*labels.json", "*annos.json", "*.h5"),
    }
