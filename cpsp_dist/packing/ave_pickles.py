"""AVE with visual maps as pickles, `{split}/{video_id}.pkl` in the folder `--visual`; all else as in `ave_h5.py`.

This is how the published CPSP code stores ResNet maps of AVE ([10, 1024, 7, 7]). An id has one pickle in a split's
folder, so rows of one id and split share their visual map. Pickles are read by `safe_pickle`, which runs nothing.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from cpsp_dist.packing.ave_h5 import AveH5
from cpsp_dist.packing.safe_pickle import load_array
from cpsp_dist.packing.source import Entry, SourceOptions
from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.input_files import read_input

MAX_BYTES = 64 * 2**20


class AvePickles(AveH5):
    visual_names = ("visual", "vis_maps", "video")
    has_noisy = False

    def __init__(self, options: SourceOptions):
        super().__init__(options)
        complete = []
        for entry in self.entries:
            if not entry.names_a_file:
                self.problems.append(f"{entry.name}: not a video id")
            elif not (path := self._path(entry)).is_file():
                self.problems.append(f"{entry.name}: missing: {path}")
            else:
                complete.append(entry)
        self.entries = complete
        uses = Counter(self._path(entry) for entry in complete)
        if shared := sum(n for n in uses.values() if n > 1):
            self.notes.append(f"{shared} rows share their visual map with another row of the same video and split")

    def files(self, entry: Entry) -> list[Path]:
        return [*super().files(entry), self._path(entry)]

    def _open_visual(self, path: Path) -> None:
        if not path.is_dir():
            raise DataError(f"--visual {path}: not a folder of train/, val/ and test/ with .pkl files")
        self._folder = path

    def _visual_map(self, entry: Entry) -> tuple[np.ndarray, str]:
        path = self._path(entry)
        return load_array(read_input(path, MAX_BYTES), str(path)), str(path)

    def _path(self, entry: Entry) -> Path:
        return self._folder / entry.split / f"{entry.video_id}.pkl"
