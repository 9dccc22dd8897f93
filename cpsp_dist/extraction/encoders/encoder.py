"""What every encoder offers, and how a network runs over many inputs so that each result depends on its input alone.

Shape letters: N inputs, H×W pixels, h×w positions, C channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from cpsp_dist.distributed.devices import named_device
from cpsp_dist.extraction.clip import frame_indices
from cpsp_dist.utils.errors import UserError

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]
Precision = Literal["float32", "float16"]


class Encoder(ABC):
    """One network or function that turns inputs of one modality into features.

    A subclass has the `name` of the table and sets `preprocessing`. One with weights loads them in its `__init__` and
    sets `weights_sha256` (see `cpsp_dist/extraction/weights.py`).

    Args:
        weights: the file that the user gave.

    Attributes:
        preprocessing: everything beside the weights that changes its numbers, as JSON.
        weights_sha256: of the file that the weights were read from; None: it has none.
    """

    name: ClassVar[str]
    modality: ClassVar[Literal["visual", "audio"]]
    preprocessing: dict[str, Any]

    def __init__(self, weights: Path | None, device: str, precision: Precision = "float32") -> None:
        self.device, self.precision = named_device(device), precision
        self.weights_sha256: str | None = None
        if precision == "float16" and self.device.type != "cuda":
            raise UserError(f"encoder {self.name}: float16 needs a GPU; use float32 on {device}")

    def identity(self) -> dict[str, Any]:
        """What the manifest records: name, weights_sha256, preprocessing. Equal identities mean equal features."""
        half = {} if self.precision == "float32" else {"precision": self.precision}
        return {
            "name": self.name,
            "weights_sha256": self.weights_sha256,
            "preprocessing": self.preprocessing | half,
        }


class VisualEncoder(Encoder):
    """Frames in, a map or a vector for each out. The mean over the frames of a segment is the caller's.

    Attributes:
        frames_per_segment: 1: the frame in the middle; more: spread evenly from the segment's first frame on.
        size: height and width in pixels that the frames must have.
        crop: whether they are scaled from the largest square in the middle of the picture, or from all of it.
    """

    modality = "visual"
    frames_per_segment: ClassVar[int] = 16
    size: tuple[int, int] = (224, 224)
    crop: ClassVar[bool] = False

    def sampling(self) -> dict[str, Any]:
        """What `preprocessing` records of the choice of frames and how they are scaled."""
        return {"frames_per_segment": self.frames_per_segment, "size": [*self.size], "crop": self.crop}

    def frame_indices(self, frames: int, segments: int) -> list[list[int]]:
        """Which of a clip's frames to encode, [segments][frames_per_segment]: see `extraction.clip`.

        Raises:
            ValueError: fewer frames than segments.
        """
        return frame_indices(frames, segments, self.frames_per_segment)

    @abstractmethod
    def __call__(self, frames: Pixels) -> Floats:
        """Features [N, h, w, C] (or [N, C]) of RGB frames [N, *size, 3]; each depends on its own frame alone."""


class AudioEncoder(Encoder):
    """The sound of segments in, a vector for each out.

    Attributes:
        sample_rate: in Hz, of the mono waveform that it takes.
    """

    modality = "audio"
    sample_rate: ClassVar[int] = 16000

    @abstractmethod
    def __call__(self, waveform: Floats) -> Floats:
        """Features [N, C] of segments [N, samples], samples in [-1, 1]; each depends on its own segment alone."""

    def seconds(self, waveform: Floats) -> Floats:
        """Segments [N, samples] as seconds [N, k, sample_rate], to be encoded each and averaged.

        Shorter ones get silence at their end. Longer ones give k = ⌈length in seconds⌉ seconds, evenly spread from the
        first sample to the last: of 1.5 s those from 0 and from 0.5 s on.
        """
        rate, samples = self.sample_rate, waveform.shape[1]
        if samples <= rate:
            return np.pad(waveform, ((0, 0), (0, rate - samples)))[:, None]
        count = -(-samples // rate)
        starts = [round(i * (samples - rate) / (count - 1)) for i in range(count)]
        return np.stack([waveform[:, start : start + rate] for start in starts], 1)
