"""The features of a video, by the encoders that a model was trained on."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt

from cpsp_dist.data.encoders import MODALITIES, Encoders, compare_records
from cpsp_dist.extraction.encoders import build_encoder
from cpsp_dist.extraction.encoders.encoder import AudioEncoder, Encoder, VisualEncoder
from cpsp_dist.extraction.features import clip_features, clip_form
from cpsp_dist.extraction.video import read_clip
from cpsp_dist.utils.errors import DataError, UserError
from cpsp_dist.utils.extras import require

Floats = npt.NDArray[np.float32]


class VideoReader:
    """Reads videos as features for one model.

    Args:
        trained: the encoders that the model records. model: how messages call it.
        names, weights: by modality, where the model does not record the encoder; files of weights.

    Raises:
        UserError: an encoder is not known, or other weights are given than the model was trained with.
    """

    def __init__(
        self, trained: Encoders, model: str, names: dict[str, str | None], weights: dict[str, str | None], device: str
    ) -> None:
        require("av", "video", "predicting for videos")
        self.seconds = trained.segment_seconds
        built = [_build(trained, m, model, names[m], weights[m], device) for m in MODALITIES]
        self.visual, self.audio = cast(VisualEncoder, built[0]), cast(AudioEncoder, built[1])

    def read(self, path: str, segments: int) -> tuple[Floats, Floats]:
        """visual [n, H, W, C] or [n, C], audio [n, A] of a video, decoded in clips of `segments` segments.

        A video of about that length is one clip, as in an extraction. What is left of a longer one and shorter than
        half a segment is not used.

        Raises:
            DataError: the video cannot be read, has no sound, or is shorter than half a segment.
        """
        length = video_seconds(path)
        count = int(length / self.seconds + 0.5)
        if count < 1:
            raise DataError(f"{path}: lasts {length:.2f} s, less than a segment of {self.seconds:g} s")
        parts = []
        for first in range(0, count, segments):
            form = clip_form(self.visual, self.audio, min(segments, count - first), self.seconds)
            start = None if count <= segments else first * self.seconds
            parts.append(clip_features(read_clip(path, form, start), self.visual, self.audio))
        visual, audio = (np.concatenate(each) for each in zip(*parts, strict=True))
        return visual, audio


def video_seconds(path: str) -> float:
    """How long a video's picture is, by its header. Raises DataError."""
    import av

    from cpsp_dist.utils.input_files import open_input

    open_input(path).close()
    try:
        with av.open(f"file:{path}") as container:
            streams: Any = container.streams
            if not streams.video:
                raise DataError(f"{path}: no picture in it")
            if not streams.audio:
                raise DataError(f"{path}: no sound in it")
            video = streams.video[0]
            if video.duration and video.time_base:
                return float(video.duration * video.time_base)
            return (container.duration or 0) / 1e6
    except av.error.FFmpegError as error:
        raise DataError(f"{path}: cannot be decoded ({getattr(error, 'strerror', None) or error})") from None


def _build(trained: Encoders, modality: str, model: str, name: str | None, weights: str | None, device: str) -> Encoder:
    record = trained[modality]
    if record is None and name is None:
        raise UserError(
            f"{model}: does not record which {modality} encoder made the features it was trained on; "
            f"name it with --{modality}-encoder"
        )
    if record is not None and name is not None and name != record["name"]:
        raise UserError(f"--{modality}-encoder {name}: {model} was trained on features of {record['name']}")
    half = record is not None and (record["preprocessing"] or {}).get("precision") == "float16"
    precision: Any = "float16" if half and device.startswith("cuda") else "float32"
    encoder = build_encoder(str(name or (record or {})["name"]), weights, device, precision)
    if encoder.modality != modality:
        raise UserError(f"--{modality}-encoder {encoder.name}: it is an encoder of {encoder.modality} input")
    if difference := compare_records(record, encoder.identity()):
        raise UserError(
            f"encoder {encoder.name}: this is {difference[1]}, {model} was trained on features of {difference[0]}; "
            f"give its weights with --{modality}-weights"
        )
    return encoder
