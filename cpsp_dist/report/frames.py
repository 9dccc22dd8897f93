"""What a model looks at, as pictures: its attention over the frame of each second, or over keypad's wall."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
#: (key of a sample, segments, seconds of one) -> [T, h, w, 3] its frames; None where there are none.
FramesOf = Callable[[str, int, float], Pixels | None]

#: The categories of the demo's corpus, whose visual features are the 8 x 8 pixels of each cell of a wall.
KEYPAD = tuple(f"digit {n}" for n in ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"))
WALL = (7, 7, 64)
#: Pixels of a second's panel, at least; between two of them.
SIDE, GAP = 112, 8
#: Where a map is strongest, and at the bottom where there is an event.
STRONG, EVENT = np.array([255, 120, 0]), np.array([10, 125, 75, 255], np.uint8)


def wall(visual: npt.NDArray[np.floating], categories: Sequence[str]) -> Pixels | None:
    """[T, 56, 56, 3] the wall that keypad's visual features [T, 7, 7, 64] are, scans bright; None of other features."""
    if visual.shape[1:] != WALL or tuple(categories) != KEYPAD:
        return None
    cells = visual.reshape(-1, 7, 7, 8, 8).transpose(0, 1, 3, 2, 4).reshape(-1, 56, 56)
    grey = (255 * np.clip(cells, 0, 1)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=3)


def attended(frames: Pixels, attention: npt.NDArray[np.floating], event: npt.NDArray[np.bool_]) -> bytes:
    """A PNG: the frames side by side, orange where a map is strong, a green line below where there is an event.

    frames: [T, h, w, 3]; attention: [T, H, W], each map scaled to its largest weight; event: [T].
    """
    times = -(-SIDE // min(frames.shape[1:3]))
    large = frames.repeat(times, axis=1).repeat(times, axis=2)
    count, height, width = large.shape[:3]
    down, across = (np.arange(size) * of // size for size, of in zip((height, width), attention.shape[1:], strict=True))
    scaled = attention / np.maximum(attention.max(axis=(1, 2), keepdims=True), 1e-12)
    share = 0.7 * scaled[:, down[:, None], across][..., None]
    panels = np.zeros((count, height + 8, width + GAP, 4), np.uint8)  # transparent between them
    panels[:, :height, :width, :3] = large * (1 - share) + STRONG * share
    panels[:, :height, :width, 3] = 255
    panels[event, height + 3 :, :width] = EVENT
    return png(np.concatenate([*panels], axis=1)[:, :-GAP])


def png(pixels: Pixels) -> bytes:
    """Of [height, width, 3 or, with alpha, 4], by the standard library alone."""
    height, width, channels = pixels.shape
    rows = np.zeros((height, 1 + channels * width), np.uint8)  # each begins with its filter: none
    rows[:, 1:] = pixels.reshape(height, -1)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 6, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows.tobytes(), 6)),
        (b"IEND", b""),
    ]
    chunks = [struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
