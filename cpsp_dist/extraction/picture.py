"""Decoded frames to RGB of one size."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from cpsp_dist.extraction.clip import Pixels

if TYPE_CHECKING:
    import av


class Converter:
    """Frames to RGB of one size, the same bytes on every machine, turned as the file says."""

    def __init__(self, size: tuple[int, int]):
        from av.video.reformatter import Interpolation, VideoReformatter

        self._size, self._reformatter = size, VideoReformatter()
        exact = Interpolation.ACCURATE_RND | Interpolation.BITEXACT
        self._flags = Interpolation.BILINEAR | exact | Interpolation.FULL_CHR_H_INT

    def __call__(self, frame: av.VideoFrame) -> Pixels:
        turned, flip = _turn(frame)
        height, width = reversed(self._size) if turned else self._size
        scaled = self._reformatter.reformat(
            frame, width=width, height=height, format="rgb24", interpolation=self._flags, threads=1
        )
        pixels = scaled.to_ndarray()
        if turned:
            pixels = pixels.transpose(1, 0, 2)
        return np.ascontiguousarray(pixels[:: -1 if flip[0] else 1, :: -1 if flip[1] else 1])


def _turn(frame: av.VideoFrame) -> tuple[bool, tuple[bool, bool]]:
    """(whether rows become columns, whether then to flip (up and down, left and right)), by the display matrix."""
    with contextlib.suppress(KeyError):
        data = frame.side_data["DISPLAYMATRIX"]  # type: ignore[typeddict-item]
        a, b, _, c, d, *_ = np.frombuffer(bytes(data), "<i4")
        if abs(a) >= abs(b):
            return False, (bool(d < 0), bool(a < 0))
        return True, (bool(b < 0), bool(c < 0))
    return False, (False, False)
