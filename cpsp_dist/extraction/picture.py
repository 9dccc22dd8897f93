"""Decoded frames to RGB of one size."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from cpsp_dist.extraction.clip import Pixels

if TYPE_CHECKING:
    import av


class Converter:
    """Frames to RGB of one size, the same bytes on every machine, turned as the file says.

    Args:
        crop: take the largest part in the middle that has the size's proportions; else all of it, squeezed.
    """

    def __init__(self, size: tuple[int, int], *, crop: bool = False):
        from av.video.reformatter import Interpolation, VideoReformatter

        self._size, self._crop, self._reformatter = size, crop, VideoReformatter()
        exact = Interpolation.ACCURATE_RND | Interpolation.BITEXACT
        self._flags = Interpolation.BILINEAR | exact | Interpolation.FULL_CHR_H_INT

    def __call__(self, frame: av.VideoFrame) -> Pixels:
        turned, flip = _turn(frame)
        height, width = reversed(self._size) if turned else self._size
        if self._crop:
            frame = self._middle(frame, width, height)
        pixels = self._rgb(frame, width, height)
        if turned:
            pixels = pixels.transpose(1, 0, 2)
        return np.ascontiguousarray(pixels[:: -1 if flip[0] else 1, :: -1 if flip[1] else 1])

    def _rgb(self, frame: av.VideoFrame, width: int, height: int) -> Pixels:
        scaled = self._reformatter.reformat(
            frame, width=width, height=height, format="rgb24", interpolation=self._flags, threads=1
        )
        return np.asarray(scaled.to_ndarray(), np.uint8)

    def _middle(self, frame: av.VideoFrame, width: int, height: int) -> av.VideoFrame:
        """The part that is kept. Cut before it is scaled, so that no pixel beside it counts (there may be bars)."""
        import av

        across = min(frame.width, max(1, round(frame.height * width / height)))
        down = min(frame.height, max(1, round(frame.width * height / width)))
        left, top = (frame.width - across) // 2, (frame.height - down) // 2
        pixels = self._rgb(frame, frame.width, frame.height)[top : top + down, left : left + across]
        return av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")


def _turn(frame: av.VideoFrame) -> tuple[bool, tuple[bool, bool]]:
    """(whether rows become columns, whether then to flip (up and down, left and right)), by the display matrix."""
    with contextlib.suppress(KeyError):
        data = frame.side_data["DISPLAYMATRIX"]  # type: ignore[typeddict-item]
        a, b, _, c, d, *_ = np.frombuffer(bytes(data), "<i4")
        if abs(a) >= abs(b):
            return False, (bool(d < 0), bool(a < 0))
        return True, (bool(b < 0), bool(c < 0))
    return False, (False, False)
