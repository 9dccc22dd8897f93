"""Small videos, made by PyAV: every frame shows its number, and the sound is known at every sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

BITS = 10
IDENTITY = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
#: Display matrices (a, b, c, d) by the degrees that a player turns a picture clockwise.
MATRICES = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


@dataclass
class Spec:
    """A video. `times`: seconds of each frame, where they are not evenly spread."""

    fps: Fraction | int = 25
    frames: int = 50
    times: Sequence[float] | None = None
    codec: str = "libx264"
    pix_fmt: str = "yuv420p"
    size: tuple[int, int] = (48, 80)
    sound: np.ndarray | None = None  # [channels, n]; None: `chirps` of the video's length
    audio_codec: str | None = "aac"  # None: no stream of sound
    rate: int = 44100
    layout: str = "mono"
    sound_at: float = 0.0
    options: dict[str, str] = field(default_factory=dict)
    codec_options: dict[str, str] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return float(self.frames / Fraction(self.fps)) if self.times is None else self.times[-1] + 1 / float(self.fps)


def picture(number: int, size: tuple[int, int]) -> np.ndarray:
    """[H, W, 3]: the bits of `number` as white columns, the lowest at the left; its lower quarter is red."""
    height, width = size
    columns = np.arange(width) * BITS // width
    image = np.repeat((number >> columns & 1)[None, :, None] * np.uint8(255), height, 0).repeat(3, 2)
    image[height - height // 4 :] = (255, 0, 0)
    return image.astype(np.uint8)


def shown(frame: np.ndarray) -> int:
    """The number of a `picture`, at any size."""
    row = frame[: frame.shape[0] // 2].mean(axis=(0, 2))
    return sum(1 << bit for bit in range(BITS) if row[int((bit + 0.5) * len(row) / BITS)] > 127)


def chirps(seconds: float, rate: int, shift: float = 0.0) -> np.ndarray:
    """[n] a tone burst of 4 ms each tenth of a second, each of another height; as it is `shift` seconds later."""
    time = np.arange(round(seconds * rate)) / rate + shift
    phase = time % 0.1 - 0.05
    tone = np.sin(2 * np.pi * (900 + 217 * (np.floor(time / 0.1) * 7 % 11)) * phase)
    return (0.7 * tone * np.exp(-((phase / 0.002) ** 2)) * (time >= 0)).astype(np.float32)


def make_video(path: Path, spec: Spec | None = None, numbers: Sequence[int] | None = None) -> Path:
    """Write `spec` to `path`, in the container of its suffix."""
    spec = spec or Spec()
    with av.open(str(path), "w", options=spec.options) as out:
        fps = Fraction(spec.fps)
        quick = {"preset": "ultrafast"} if spec.codec == "libx264" else {}
        video: Any = out.add_stream(spec.codec, rate=fps, options=quick | spec.codec_options)
        video.height, video.width = spec.size
        video.pix_fmt = spec.pix_fmt
        video.codec_context.thread_count = 1
        if spec.times is not None:
            video.codec_context.time_base = Fraction(1, 1000)
        audio: Any = None
        if spec.audio_codec:
            quick = {"aac_coder": "fast"} if spec.audio_codec == "aac" else {}
            audio = out.add_stream(spec.audio_codec, rate=spec.rate, layout=spec.layout, options=quick)
        for index in range(spec.frames):
            frame = av.VideoFrame.from_ndarray(picture(numbers[index] if numbers else index, spec.size), "rgb24")
            frame.time_base = Fraction(1, 1000) if spec.times is not None else 1 / fps
            frame.pts = index if spec.times is None else round(spec.times[index] * 1000)
            out.mux(video.encode(frame))
        out.mux(video.encode())
        if audio is not None:
            _add_sound(out, audio, spec)
    return path


def _add_sound(out: Any, stream: Any, spec: Spec) -> None:
    sound = spec.sound if spec.sound is not None else chirps(spec.seconds, spec.rate)[None]
    channels = stream.layout.nb_channels
    sound = np.ascontiguousarray(np.broadcast_to(sound, (channels, sound.shape[1])))
    frame = av.AudioFrame.from_ndarray(sound.astype(np.float32), "fltp", layout=stream.layout.name)
    frame.sample_rate, frame.pts = spec.rate, round(spec.sound_at * spec.rate)
    frame.time_base = Fraction(1, spec.rate)
    resampler = av.AudioResampler(stream.codec_context.format, stream.layout, spec.rate, stream.frame_size or None)
    for part in [*resampler.resample(frame), *resampler.resample(None)]:
        out.mux(stream.encode(part))
    out.mux(stream.encode())


def turn(path: Path, degrees: int) -> None:
    """Have an mp4's picture turned clockwise by players, by its track's matrix."""
    data = bytearray(path.read_bytes())
    a, b, c, d = MATRICES[degrees]
    place = data.index(IDENTITY, data.index(b"tkhd"))
    matrix = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    data[place : place + len(IDENTITY)] = np.array(matrix, ">i4").tobytes()
    path.write_bytes(data)
