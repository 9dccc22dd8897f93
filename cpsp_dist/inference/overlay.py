"""A video again, with what was predicted for it drawn into its pictures and its sound copied."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpsp_dist.extraction.picture import Converter
from cpsp_dist.inference.drawn_files import drawn_file
from cpsp_dist.inference.inputs import VIDEOS
from cpsp_dist.inference.prediction import THRESHOLD, Prediction
from cpsp_dist.utils import files
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.extras import require
from cpsp_dist.utils.text import one_line

Pixels = npt.NDArray[np.uint8]

#: Sound that mp4 holds everywhere; any other goes to a Matroska file.
MP4_SOUND = ("aac", "mp3", "ac3", "opus", "flac", "alac")
EVENT, OTHER = (30, 170, 70), (110, 110, 110)


def overlay(found: Prediction, folder: Path) -> Path:
    """Write `VIDEO.mp4` (`.mkv` where mp4 does not hold its sound) into `folder`, made where it is missing.

    While an event lasts: a frame around the picture, the category with its probability, and the span in seconds. Below,
    always: a bar of the seconds, events in green, with a mark at the present time. The picture is encoded anew (H.264,
    upright, an even number of pixels), its times are kept; the packets of the sound are copied.

    Raises:
        UserError: the input is no video, Pillow is missing, or the file cannot be written.
    """
    require("av", "video", "--overlay")
    require("PIL", "report", "--overlay")
    import av

    source = Path(found.input)
    if source.suffix.lower() not in VIDEOS:
        raise UserError(f"--overlay: {found.input} is no video; there are no pictures to draw into")
    path = drawn_file(folder, found.video, ".mp4")
    try:
        with av.open(f"file:{source}") as container:
            sound = container.streams.best("audio")
            if sound is not None and sound.codec_context.name not in MP4_SOUND:
                path = path.with_suffix(".mkv")
            first = _upright(next(container.decode(video=0)))
        if path.exists() and path.samefile(source):
            raise UserError(f"--overlay {folder}: would overwrite the video {source}; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as part:
            _write(found, part, "mp4" if path.suffix == ".mp4" else "matroska", first.shape)
    except (OSError, ValueError, StopIteration, av.error.FFmpegError) as error:
        reason = one_line(getattr(error, "strerror", None) or error)
        raise UserError(f"--overlay {path}: cannot be written ({reason[:150]})") from None
    return path


def _write(found: Prediction, target: Path, form: str, shape: tuple[int, ...]) -> None:
    import av

    with av.open(f"file:{found.input}") as container, av.open(f"file:{target}", "w", format=form) as out:
        video: Any = container.streams.best("video")
        sound: Any = container.streams.best("audio")
        made = _add_video(out, video, shape)  # all streams before the first packet
        copied: Any = None if sound is None else out.add_stream_from_template(sound)
        begin = float(video.start_time * video.time_base) if video.start_time is not None else 0.0
        length = 1 / float(video.average_rate or video.guessed_rate or 25)
        time = begin - length
        for packet in container.demux([stream for stream in (video, sound) if stream is not None]):
            if packet.stream is sound:
                if packet.dts is not None:
                    packet.stream = copied
                    out.mux(packet)
                continue
            frames: list[Any] = [*packet.decode()]
            for frame in frames:
                time = time + length if frame.time is None else frame.time
                pixels = _upright(frame)
                drawn = av.VideoFrame.from_ndarray(_draw(pixels, found, time - begin), "rgb24")
                drawn.pts, drawn.time_base = round(time / video.time_base), video.time_base
                out.mux(made.encode(drawn))
        out.mux(made.encode())


def _add_video(out: Any, video: Any, shape: tuple[int, ...]) -> Any:
    made = out.add_stream("libx264", rate=video.average_rate or Fraction(25))
    made.height, made.width = shape[:2]
    made.pix_fmt = "yuv420p"
    made.codec_context.time_base = video.time_base
    return made


def _upright(frame: Any) -> Pixels:
    """[H, W, 3] as a player shows it; an odd last row or column is cut, which H.264 cannot have."""
    turned = frame.rotation % 180 == 90
    pixels = Converter((frame.width, frame.height) if turned else (frame.height, frame.width))(frame)
    return np.ascontiguousarray(pixels[: pixels.shape[0] // 2 * 2, : pixels.shape[1] // 2 * 2])


def _draw(pixels: Pixels, found: Prediction, time: float) -> Pixels:
    """The picture shown at `time`, in seconds from the video's begin, with what was predicted for it."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    width, height = image.size
    thick = max(2, height // 60)
    bar = height - 2 * thick
    step = width / len(found.event)
    for index, probability in enumerate(found.event):
        colour = EVENT if probability > THRESHOLD else OTHER
        draw.rectangle((index * step, bar, (index + 1) * step - 1, height), fill=colour)
    mark = time / found.segment_seconds * step
    draw.rectangle((mark - thick / 2, bar - thick, mark + thick / 2, height), fill=(255, 255, 255))
    for span in found.spans:
        if span.start <= time < span.end:
            draw.rectangle((0, 0, width - 1, bar - 1), outline=EVENT, width=thick)
            text = f"{span.category} {span.probability:.0%}  {span.start:g}-{span.end:g} s"
            font = ImageFont.load_default(size=max(8, min(height // 14, 2 * width // max(len(text), 1))))
            box = draw.textbbox((2 * thick, 2 * thick), text, font=font)
            draw.rectangle((box[0] - thick, box[1] - thick, box[2] + thick, box[3] + thick), fill=EVENT)
            draw.text((2 * thick, 2 * thick), text, font=font, fill=(255, 255, 255))
    return np.asarray(image)
