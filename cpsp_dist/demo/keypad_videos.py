"""The corpus "keypad" as real videos: mp4 files whose picture is the wall and whose sound are the tones."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpsp_dist.demo.keypad import CATEGORIES, GRID, videos_of
from cpsp_dist.packing.target import workplace
from cpsp_dist.packing.text import COLUMNS
from cpsp_dist.utils.cores import usable_cores
from cpsp_dist.utils.extras import require

#: Frames a second; pixels of a scan, each way, and how often each is repeated: 224 x 224 of the picture.
FPS, CELL, SCALE = 10, 8, 4
#: Samples a second; what they are multiplied by, so that noise and tones stay within -1 and 1.
RATE, VOLUME = 16000, 0.1


def render(folder: Path, sizes: dict[str, int], seed: int = 0) -> None:
    """Write `videos/ID.mp4`, `videos.csv` and `labels.json` into `folder` (made here): what `cpsp-dist extract` takes.

    `sizes` counts the videos of train, val and test.

    Raises:
        UserError: `folder` is there already, or PyAV is missing.
    """
    require("av", "video", "keypad videos")
    with workplace(folder) as part:
        (part / "videos").mkdir()
        lines, labels = [",".join(COLUMNS)], {}
        with ThreadPoolExecutor(usable_cores()) as pool:
            waiting = []
            for video in videos_of(sizes, seed, RATE):
                lines.append(f"{CATEGORIES[video['category']]},{video['id']},{video['split']}")
                labels[video["id"]] = {"label": video["mask"].astype(int).tolist()}
                waiting.append(pool.submit(_write, part / "videos" / f"{video['id']}.mp4", video))
            for each in waiting:
                each.result()
        (part / "videos.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (part / "labels.json").write_text(json.dumps(labels) + "\n", encoding="utf-8")


def _picture(wall: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """[224, 224, 3] of a second's wall [7, 7, 64]."""
    cells = wall.reshape(GRID, GRID, CELL, CELL).transpose(0, 2, 1, 3).reshape(GRID * CELL, GRID * CELL)
    pixels = np.rint(255 * cells).astype(np.uint8).repeat(SCALE, 0).repeat(SCALE, 1)
    return np.ascontiguousarray(np.broadcast_to(pixels[..., None], (*pixels.shape, 3)))


def _write(path: Path, video: dict[str, Any]) -> None:
    """H.264 and AAC, a second of each after the other."""
    import av

    with av.open(str(path), "w") as out:
        picture: Any = out.add_stream("libx264", rate=FPS, options={"preset": "ultrafast"})
        picture.height = picture.width = GRID * CELL * SCALE
        picture.pix_fmt = "yuv420p"
        picture.codec_context.thread_count = 1
        sound: Any = out.add_stream("aac", rate=RATE, layout="mono")
        fifo = av.AudioFifo()
        for second, (wall, samples) in enumerate(zip(video["visual"], video["sound"], strict=True)):
            frame = av.VideoFrame.from_ndarray(_picture(wall), "rgb24")
            for number in range(FPS):
                frame.pts, frame.time_base = second * FPS + number, Fraction(1, FPS)
                out.mux(picture.encode(frame))
            scaled = np.clip(VOLUME * samples, -1, 1).astype(np.float32)[None]
            part = av.AudioFrame.from_ndarray(scaled, "fltp", layout="mono")
            part.sample_rate, part.pts, part.time_base = RATE, second * RATE, Fraction(1, RATE)
            fifo.write(part)
            while (ready := fifo.read(sound.frame_size)) is not None:
                out.mux(sound.encode(ready))
        if (rest := fifo.read(0, partial=True)) is not None:
            out.mux(sound.encode(rest))
        out.mux(picture.encode())
        out.mux(sound.encode())
