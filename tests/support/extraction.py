"""A visual encoder that needs no weights, and folders of videos of which each is as short as can be."""

from __future__ import annotations

import json
import random
import shutil
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cpsp_dist.cli import main
from cpsp_dist.extraction.encoders import ENCODERS
from cpsp_dist.extraction.encoders.encoder import VisualEncoder
from tests.support.folders import Content, files_under
from tests.support.videos import Spec, chirps, make_video

#: Of the clips below.
SEGMENTS, SECONDS = 10, 0.1
#: Makes the encoder known in a forked process.
PATCH = "tests.support.extraction:add_cells"


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


def extracted_videos(folder: Path, count: int) -> Path:
    """The shards of `count` labelled videos, made in `folder` as `videos` and `video-shards`."""
    add_cells()
    labels = {f"v{i:03d}": {"label": [int(j >= i % 10) for j in range(10)]} for i in range(count)}
    videos = make_folder(folder / "videos", count)
    (videos / "labels.json").write_text(json.dumps(labels))
    shards = folder / "video-shards"
    more = ("--labels", str(videos / "labels.json"), "--shards", "--workers", "1")
    assert main(arguments(videos, shards, *more)) == 0
    return shards


def written(folder: Path) -> dict[str, Content]:
    """All that packing may read of an extraction, hidden files too; not its journal."""
    return {name: content for name, content in files_under(folder).items() if Path(name).parent.name != "journal"}


def complete(store: Path) -> set[str]:
    """The videos that were ever complete, as the store's journal has them."""
    journals = (store / "journal").glob("done-*.jsonl")
    lines = [line for journal in journals for line in journal.read_text().split("\n")[:-1]]
    return {json.loads(line)["name"] for line in lines}


def killed(prefork: Any, arguments: list[str], store: Path, kills: int, seed: int) -> int:
    """Give the command, killed after a random number of videos, `kills` times, then let it finish.

    store: where it keeps its journal. Returns how many kills came in time.
    """
    rng = random.Random(seed)
    total, in_time = len([*Path(arguments[2]).iterdir()]), 0
    for kill in range(kills):
        there = len(complete(store))
        after = there + rng.randint(0, max(0, min(total - there - 1, 2 * total // kills)))
        workers = ["--workers", str(1 + kill % 2)]
        launch = prefork.start([*arguments, *workers], 1, command="cpsp_dist.cli", patch=PATCH)
        launch.until(lambda after=after: len(complete(store)) >= after)
        launch.kill()
        in_time += launch.wait() == [-9]
    prefork.start(arguments, 1, command="cpsp_dist.cli", patch=PATCH).finish()
    return in_time


def break_files(folder: Path) -> dict[str, str]:
    """Ten kinds of broken files instead of the first ten videos: id -> what its line says."""
    paths = [folder / f"v{number:03d}.mp4" for number in range(10)]
    good = paths[0].read_bytes()
    paths[0].unlink()
    paths[1].write_bytes(b"")
    paths[2].write_bytes(b"no video at all\n" * 1000)
    paths[3].write_bytes(good[: len(good) // 2])
    make_video(paths[4], Spec(fps=20, frames=20, audio_codec=None))
    make_video(paths[5], Spec(fps=20, frames=10))
    make_video(paths[6], Spec(fps=20, frames=20, sound=np.zeros((1, 20000), np.float32)))
    make_video(paths[7], Spec(fps=5, frames=5))
    paths[8].unlink()
    paths[8].mkdir()
    shutil.copy(paths[10 - 1], folder / "v009.mkv")
    return {
        "v000": "no file v000.mp4, .mkv or .webm, nor v000_START.mp4",
        "v001": "cannot be decoded",
        "v002": "cannot be decoded",
        "v003": "cannot be decoded",
        "v004": "no sound in it",
        "v005": "its pictures last 0.50 s, the clip 1 s",
        "v006": "have no sound",
        "v007": "5 frames are fewer than 10 segments",
        "v008": "v008.mp4",
        "v009": "v009.mkv and v009.mp4 are there; keep one of them",
    }
