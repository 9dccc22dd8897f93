"""`cpsp-dist report`: a page about one run."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from cpsp_dist.cli.paths import local_path, require_replaceable
from cpsp_dist.utils.console import echo
from cpsp_dist.utils.errors import DataError, UserError

if TYPE_CHECKING:
    from cpsp_dist.report.frames import FramesOf, Pixels

logger = logging.getLogger(__name__)

#: Pixels of a frame.
SIDES = (112, 112)


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "report",
        help="write a page about a run: curves, errors by category and second, what the model looks at",
        description="Write one HTML file about a run, which needs no network: what the run was, its curves, and what "
        "its best weights predict for a split, beside trivial baselines.",
    )
    parser.add_argument("run", type=local_path, metavar="RUN", help="output folder of a training run")
    parser.add_argument("--split", help="(default: test; where there is none, val)")
    parser.add_argument("--shards", help="folder of shards (default: those it was trained on)")
    parser.add_argument(
        "--out", type=local_path, metavar="FILE", help="file to write (default: report.html in the run's folder)"
    )
    parser.add_argument(
        "--videos",
        type=local_path,
        metavar="FOLDER",
        help="draw attention over the frames of the videos in there, found by the end of their keys (needs the extra "
        "'video')",
    )
    parser.set_defaults(handler=_report)


def _report(args: argparse.Namespace) -> None:
    from cpsp_dist.distributed.launchers import require_one_process

    require_one_process("report")
    from cpsp_dist.report.collect import collect
    from cpsp_dist.report.page import write
    from cpsp_dist.report.run_page import run_page

    path: Path = args.out or args.run / "report.html"
    require_replaceable("--out", path, (".html", ".htm"))
    frames_of = None if args.videos is None else _frames_in(args.videos)
    write(run_page(collect(args.run, args.split, args.shards, frames_of=frames_of)), path)
    echo(f"{path}: open it in a browser")


def _frames_in(folder: Path) -> FramesOf:
    """The frame in the middle of each segment. Raises UserError where there is no folder or PyAV."""
    from cpsp_dist.extraction.clip import ClipForm
    from cpsp_dist.extraction.video import read_clip
    from cpsp_dist.inference.inputs import VIDEOS
    from cpsp_dist.utils.extras import require

    require("av", "video", "--videos")
    try:
        videos = sorted(file for file in folder.iterdir() if file.suffix.lower() in VIDEOS)
    except OSError as error:
        raise UserError(f"--videos {folder}: cannot be read ({error.strerror})") from None
    files = {file.stem: file for file in videos}
    for file in videos:
        if files[file.stem] != file:
            raise UserError(f"--videos {folder}: two videos of one name, {file.name} and {files[file.stem].name}")
    if not files:
        raise UserError(f"--videos {folder}: no video in there ({', '.join(VIDEOS[:3])}, …)")

    def frames_of(key: str, segments: int, seconds: float) -> Pixels | None:
        file = files.get(key.partition("-")[2], files.get(key))
        try:
            return None if file is None else read_clip(file, ClipForm(segments, seconds, 1, SIDES)).frames
        except DataError as error:
            logger.warning("%s; its attention is drawn without frames", error)
            return None

    return frames_of
