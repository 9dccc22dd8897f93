"""The VGGSound-AVEL100k layout: folders of `{video_id}.zip`, each with one `.pkl` of a numpy array.

Csv and shapes: see `per_video.py`. Pickles are read by `safe_pickle`, which runs nothing; names inside a zip are never
used as paths, and what unpacks to far too much is refused.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np

from cpsp_dist.packing.per_video import PerVideo, folder_ids
from cpsp_dist.packing.safe_pickle import load_array
from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.input_files import read_input
from cpsp_dist.utils.text import one_line

MAX_BYTES = 64 * 2**20  # of one unpacked array; [10, 2048, 7, 7] in float64 has 8 MB


class ZipFolder:
    def __init__(self, path: Path, kind: str):
        self.folder, self._ids = path, folder_ids(path, ".zip", kind)

    def ids(self) -> set[str]:
        return self._ids

    def file(self, video_id: str) -> Path:
        return self.folder / f"{video_id}.zip"

    def load(self, video_id: str) -> np.ndarray:
        path = self.file(video_id)
        return load_array(_only_pickle(path), str(path))


class Avel100kZip(PerVideo):
    store = ZipFolder


def _only_pickle(path: Path) -> bytes:
    """The bytes of the one .pkl in a zip."""
    try:
        with zipfile.ZipFile(io.BytesIO(read_input(path, MAX_BYTES))) as file:
            members = [info for info in file.infolist() if _is_pickle(info)]
            if len(members) != 1:
                raise DataError(f"{path}: {len(members)} .pkl files in it, expected one")
            with file.open(members[0]) as stream:
                data = stream.read(MAX_BYTES + 1)
    except DataError:
        raise
    except Exception as error:  # each way of compression raises its own for damaged bytes
        text = one_line(error)[:150]
        raise DataError(f"{path}: not a readable zip, damaged or cut short ({text})") from None
    if len(data) > MAX_BYTES:
        raise DataError(f"{path}: unpacks to more than {MAX_BYTES // 2**20} MiB; refused")
    return data


def _is_pickle(info: zipfile.ZipInfo) -> bool:
    """macOS puts a file of its own beside each: `__MACOSX/._x.pkl`."""
    parts = info.filename.split("/")
    return parts[-1].endswith(".pkl") and not parts[-1].startswith("._") and "__MACOSX" not in parts
