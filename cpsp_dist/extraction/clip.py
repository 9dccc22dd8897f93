"""A clip: what is read of it, which of its frames stand for its segments. Imports nothing heavy: decoders use it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ClipForm:
    """What is read of a clip. Small and plain, so that it can be sent to decoding processes.

    Attributes:
        segments, segment_seconds: that the clip has.
        frames_per_segment: 1: that in its middle; more: evenly spread, see `frame_indices`.
        size: height and width of the frames.
        sample_rate: of the sound, in Hz.
        crop: whether a frame is the middle of its picture, or all of it, squeezed.
    """

    segments: int = 10
    segment_seconds: float = 1.0
    frames_per_segment: int = 16
    size: tuple[int, int] = (224, 224)
    sample_rate: int = 16000
    crop: bool = False

    @property
    def seconds(self) -> float:
        return self.segments * self.segment_seconds

    @property
    def slack(self) -> float:
        """Seconds that a clip may be shorter or longer."""
        return self.segment_seconds / 2


@dataclass(frozen=True)
class Clip:
    """A decoded clip.

    Attributes:
        frames: [segments · frames_per_segment, *size, 3] uint8, RGB.
        waveform: [segments · samples of a segment] float32 in [-1, 1], mono.
        fps: frames a second, on average. count: frames of the clip.
        notes: what was made fit, a text each.
    """

    form: ClipForm
    frames: Pixels
    waveform: Floats
    fps: float
    count: int
    notes: tuple[str, ...] = ()


def frame_indices(frames: int, segments: int, per_segment: int) -> list[list[int]]:
    """[segments][per_segment] numbers of frames, as the published features chose theirs.

    With n = frames // segments, frame i of segment l is int(l·n + i/per_segment·n). One frame a segment is that in its
    middle, int((l + 0.5) · frames / segments).

    Args:
        frames: decoded frames of the stretch that the segments cover.

    Raises:
        ValueError: fewer frames than segments.
    """
    if frames < segments:
        raise ValueError(f"{frames} frames are fewer than {segments} segments")
    if per_segment == 1:
        return [[(2 * segment + 1) * frames // (2 * segments)] for segment in range(segments)]
    n = frames // segments
    return [[int(segment * n + i / per_segment * n) for i in range(per_segment)] for segment in range(segments)]
