"""A visual encoder that needs no weights, and folders of videos of which each is as short as can be."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cpsp_dist.extraction.encoders import ENCODERS
from cpsp_dist.extraction.encoders.encoder import VisualEncoder
from tests.support.videos import Spec, chirps, make_video

#: Of the clips below.
SEGMENTS, SECONDS = 10, 0.1


class Cells(VisualEncoder):
    """The mean colour in each of 7 x 7 cells."""

    name = "cells"
    preprocessing: ClassVar[dict[str, Any]] = {"cells": 7}
    frames_per_segment = 2
    size = (28, 28)

    def __call__(self, frames):
        cells = frames.reshape(len(frames), 7, 4, 7, 4, 3).astype(np.float32)
        return cells.mean((2, 4)) / np.float32(255)


def add_cells(rank: int = 0) -> None:
    """Make it an encoder like the others, in this process."""
    ENCODERS._package, ENCODERS._table["cells"] = "cpsp_dist.extraction.encoders", ("cells:Cells", "visual: of tests")
    module: Any = types.ModuleType("cpsp_dist.extraction.encoders.cells")
    module.Cells = Cells
    sys.modules[module.__name__] = module


def make_folder(folder: Path, count: int, header: str = "category,video_id,split") -> Path:
    """`count` videos v000.mp4, …, each with its own picture and sound, and videos.csv."""
    (folder / "videos").mkdir(parents=True)
    lines = [header]
    for number in range(count):
        spec = Spec(fps=20, frames=20, sound=chirps(1.0, 44100, shift=0.01 * number)[None])
        make_video(folder / "videos" / f"v{number:03d}.mp4", spec, numbers=[7 * number + i for i in range(20)])
        lines.append(f"{('dog', 'bell')[number % 2]},v{number:03d},{('train', 'val', 'test')[number % 3]}")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    """Of the command, behind its name."""
    return [
        *("extract", "--videos", str(folder / "videos"), "--csv", str(folder / "list.csv"), "--out", str(out)),
        *("--visual", "cells", "--audio", "logmel", "--segment-seconds", str(SECONDS), *more),
    ]


def written(folder: Path) -> dict[str, bytes]:
    """All that packing may read of an extraction, hidden files too; not its journal."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "journal"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
