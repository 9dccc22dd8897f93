"""What may be predicted for: videos, files of features, folders of shards; each as arrays of its segments."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from cpsp_dist.data.encoders import ENCODERS_NAME, UNKNOWN, Encoders
from cpsp_dist.data.manifest import INDEX_NAME
from cpsp_dist.packing.avel100k_zip import ZipFolder
from cpsp_dist.packing.encoders import read_record
from cpsp_dist.packing.npy_files import NpyFolder
from cpsp_dist.packing.per_video import ArrayStore
from cpsp_dist.packing.source import channels_last
from cpsp_dist.utils.errors import DataError, UserError
from cpsp_dist.utils.urls import is_url

logger = logging.getLogger(__name__)

VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".m4v", ".avi", ".ts", ".mpg", ".mpeg", ".flv", ".ogv")
ARRAYS: dict[str, type[ArrayStore]] = {".npy": NpyFolder, ".zip": ZipFolder}
VISUAL_FOLDERS, AUDIO_FOLDER = ("visual", "video"), "audio"


@dataclass(frozen=True)
class FeatureFiles:
    """The two arrays of one video: a file each, with one suffix."""

    video: str
    visual: Path
    audio: Path

    @property
    def encoders(self) -> Encoders:
        """As the extraction recorded them beside the features' folder. Raises DataError."""
        for folder in (self.visual.parent.parent, self.visual.parent):
            if (folder / ENCODERS_NAME).is_file():
                return read_record(folder / ENCODERS_NAME)
        return UNKNOWN

    def load(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """visual [T, H, W, C] or [T, C], audio [T, A].

        As in packing, other than T rows of audio repeat the last one or are cut. Maps of a grid of unequal sides have
        their channels last.

        Raises:
            DataError: naming the file.
        """
        arrays = []
        for path in (self.visual, self.audio):
            store = ARRAYS[path.suffix](path.parent, "features")
            arrays.append(np.array(store.load(path.name.removesuffix(path.suffix)), dtype=np.float32))
        visual, audio = arrays
        sides = visual.shape[1:]
        unequal = len(sides) == 3 and sides[0] != sides[1] != sides[2]
        visual = channels_last(visual, "last" if unequal else "auto", str(self.visual))
        if audio.ndim != 2 or not len(audio):
            raise DataError(f"{self.audio}: shape {list(audio.shape)}, expected [T, A]")
        for array, path in ((visual, self.visual), (audio, self.audio)):
            if not np.isfinite(array).all():
                raise DataError(f"{path}: holds values that are NaN or infinite")
        if len(audio) != len(visual):
            done = "the rest is left out" if len(audio) > len(visual) else "the last one is repeated"
            logger.warning(f"{self.audio}: {len(audio)} segments, but {len(visual)} of {self.visual.name}: {done}")
        return visual, audio[np.minimum(np.arange(len(visual)), len(audio) - 1)]


Kind = Literal["shards", "features", "video"]


def resolve(given: str) -> Iterator[tuple[Kind, FeatureFiles | str]]:
    """What an input is: shards (its folder or URL), or one or several videos or pairs of feature files.

    Raises:
        UserError: it is none of these.
    """
    path = Path(given)
    if is_url(given) or (path / INDEX_NAME).is_file():
        yield "shards", given
    elif path.is_dir():
        yield from _of_folder(path)
    elif path.suffix in ARRAYS:
        yield "features", _pair(path)
    elif not path.exists():
        raise UserError(f"{given}: no such file or folder")
    elif path.suffix.lower() in VIDEOS:
        yield "video", given
    else:
        raise UserError(
            f"{given}: neither a video ({', '.join(VIDEOS[:3])}, …), nor features of a video (.npy, .zip), nor a "
            "folder of shards, of features or of videos"
        )


def _of_folder(folder: Path) -> Iterator[tuple[Kind, FeatureFiles | str]]:
    for name in VISUAL_FOLDERS:
        if (folder / name).is_dir() and (folder / AUDIO_FOLDER).is_dir():
            files = sorted(each for each in (folder / name).iterdir() if each.suffix in ARRAYS)
            if not files:
                raise UserError(f"{folder / name}: no .npy or .zip files here")
            yield from (("features", _pair(each)) for each in files)
            return
    videos = sorted(each for each in folder.iterdir() if each.suffix.lower() in VIDEOS)
    if not videos:
        raise UserError(
            f"{folder}: no shards ({INDEX_NAME}), no features (folders visual and audio) and no videos in it"
        )
    yield from (("video", str(each)) for each in videos)


def _pair(path: Path) -> FeatureFiles:
    """`visual/ID.npy` goes with `audio/ID.npy`, `ID.visual.npy` with `ID.audio.npy`; either may be given."""
    suffix, name = path.suffix, path.name
    video = name.removesuffix(suffix)
    if path.parent.name in (*VISUAL_FOLDERS, AUDIO_FOLDER):
        folders = [path.parent.parent / each for each in VISUAL_FOLDERS]
        visual = next((each / name for each in folders if (each / name).is_file()), folders[0] / name)
        audio = path.parent.parent / AUDIO_FOLDER / name
    elif video.endswith((".visual", ".audio")):
        video = video.rpartition(".")[0]
        visual, audio = (path.with_name(f"{video}.{each}{suffix}") for each in ("visual", "audio"))
    else:
        raise UserError(
            f"{path}: features are two files: visual/ID{suffix} and audio/ID{suffix}, or ID.visual{suffix} and "
            f"ID.audio{suffix}; give either"
        )
    for each in (visual, audio):
        if not each.is_file():
            raise UserError(f"{path}: no such file: {each}")
    return FeatureFiles(video, visual, audio)
