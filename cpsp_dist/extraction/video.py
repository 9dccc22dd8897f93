"""One clip of a video file: the frames that its segments need, and its sound, decoded in one pass by PyAV.

Frames are counted as decoded, in the order of display, after edit lists; time zero is where the file's picture begins.
Nothing is replaced: what is damaged, or missing for more than half a segment, is an error.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpsp_dist.extraction.clip import Clip, ClipForm, Pixels, frame_indices
from cpsp_dist.extraction.picture import Converter
from cpsp_dist.extraction.sound import ROUNDING, Track, mix
from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.extras import require
from cpsp_dist.utils.input_files import open_input
from cpsp_dist.utils.text import one_line

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

#: Containers that are read. Playlists, which name other files, are not.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,ogg"
MAX_PIXELS = 2**26  # of a picture
RATES = (4_000, 384_000)  # samples a second
#: Decoding begins so many seconds before a clip: coded sound depends on what came before.
PREROLL = 1.0
#: Missing sound beyond this is noted.
NOTED_SECONDS = 0.01


def read_clip(path: str | Path, form: ClipForm, start: float | None = None, *, threads: int = 1) -> Clip:
    """The clip of `form.seconds` that begins at second `start` of a video file.

    Without a start the file is the clip: all of its frames count if it is not longer by more than half a segment.
    A start that the file is too short for is not used where the file has the length of a clip: it was cut before.

    Args:
        threads: of the decoder; 0: as many as there are cores. The result does not depend on it.

    Raises:
        UserError: PyAV is not installed.
        DataError: the file cannot be read or is damaged, has no picture or no sound, is too short; names it.
    """
    require("av", "video", "decoding videos")
    import av

    open_input(path).close()
    try:
        with _opened(path) as container:
            begin, cut_before = _begin(container, form, start)
            expected = _expected_frames(container, form, of_file=begin is None)
        decoding = _decode(path, form, begin, expected, threads)
        wanted = list(itertools.chain.from_iterable(_indices(path, form, decoding.count)))
        if not decoding.pictures.keys() >= set(wanted):  # there are not as many frames as the file's header says
            decoding = _decode(path, form, begin, decoding.count, threads)
    except av.error.FFmpegError as error:
        raise DataError(f"{path}: cannot be decoded ({_reason(error)})") from None
    notes = _notes(path, form, decoding) + (["taken as the clip, not cut at its start second"] if cut_before else [])
    frames = np.stack([decoding.pictures[index] for index in wanted])
    waveform = decoding.track.waveform(form.sample_rate, round(form.sample_rate * form.segment_seconds) * form.segments)
    return Clip(form, frames, waveform, decoding.count / max(decoding.end, 1e-9), decoding.count, tuple(notes))


def _indices(path: str | Path, form: ClipForm, count: int) -> list[list[int]]:
    try:
        return frame_indices(count, form.segments, form.frames_per_segment)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[InputContainer]:
    import av

    with av.open(
        f"file:{path}", container_options={"format_whitelist": FORMATS, "protocol_whitelist": "file"}
    ) as container:
        yield container


def _begin(container: InputContainer, form: ClipForm, start: float | None) -> tuple[float | None, bool]:
    """(second where the clip begins, None: it is the file; whether a start second does not count, for it is cut)."""
    seconds = (container.duration or 0) / 1e6
    cut_before = start is not None and start + form.seconds - form.slack > seconds
    cut_before &= 0 < seconds <= form.seconds + form.slack
    return (None, bool(start)) if cut_before else (start, False)


def _expected_frames(container: InputContainer, form: ClipForm, *, of_file: bool) -> int:
    """How many frames the clip has, by the file's header."""
    video = container.streams.best("video")
    if video is None:
        return 0
    seconds = (container.duration or 0) / 1e6
    if of_file and 0 < seconds < form.seconds + form.slack:
        if video.frames:
            return int(video.frames)
    else:
        seconds = form.seconds
    return round(float(video.average_rate or video.guessed_rate or 25) * seconds)


class _Decoding:
    """One pass over a clip.

    Attributes:
        pictures: by number, those that `expected` frames would need. count: frames of the clip.
        end: second of the clip where its last frame ends.
    """

    def __init__(self, path: str | Path, form: ClipForm, begin: float | None, expected: int):
        self.path, self.form, self.begin = path, form, begin or 0.0
        self.pictures: dict[int, Pixels] = {}
        self.count, self.end = 0, 0.0
        self.track: Track = Track(form.sample_rate, form.seconds)
        self._rate = 0
        self._seen = 0  # frames up to `_last`
        self._slack = form.slack if begin is None else 0.0
        self._convert = Converter(form.size, crop=form.crop)
        wanted = frame_indices(expected, form.segments, form.frames_per_segment) if expected >= form.segments else []
        self._wanted = set(itertools.chain.from_iterable(wanted))
        self.has_pictures = False

    @property
    def is_complete(self) -> bool:
        return self.has_pictures and self.track.is_full

    def add_picture(self, frame: av.VideoFrame, time: float, duration: float) -> None:
        """A frame shown at `time`, in seconds from the clip's begin."""
        if time < -ROUNDING or self.has_pictures:
            return
        end = self.form.seconds
        if time >= end + self._slack - ROUNDING:
            # A longer file: only what lies within the clip counts.
            self.has_pictures = True
            self.end = end
            return
        if frame.is_corrupt:
            raise DataError(f"{self.path}: damaged picture at {self.begin + time:.2f} s")
        if self._seen in self._wanted:
            self.pictures[self._seen] = self._convert(frame)
        self._seen += 1
        if time < end - ROUNDING:
            self.count = self._seen
        self.end = max(self.end, time + duration)

    def finish(self) -> None:
        """The file has ended."""
        if not self.has_pictures and self._slack:
            self.count = self._seen

    def add_sound(self, frame: av.AudioFrame, time: float | None) -> None:
        rate = frame.sample_rate
        if not self._rate:
            if not RATES[0] <= rate <= RATES[1]:
                raise DataError(f"{self.path}: sound of {rate} samples a second; {RATES[0]} to {RATES[1]} are read")
            self._rate, self.track = rate, Track(rate, self.form.seconds)
        if rate != self._rate:
            raise DataError(f"{self.path}: its sound changes from {self._rate} to {rate} samples a second")
        channels = [channel.name for channel in frame.layout.channels]
        samples = frame.to_ndarray()
        if not frame.format.is_planar:
            samples = samples.reshape(-1, len(channels)).T
        self.track.add(time, mix(samples, channels))


def _decode(path: str | Path, form: ClipForm, begin: float | None, expected: int, threads: int) -> _Decoding:
    """Decode the clip, keeping the pictures that it needs if it has `expected` frames."""
    decoding = _Decoding(path, form, begin, expected)
    if begin and begin > PREROLL and _decode_from(decoding, begin - PREROLL, threads):
        return decoding
    decoding = _Decoding(path, form, begin, expected)
    _decode_from(decoding, 0.0, threads)
    return decoding


def _decode_from(decoding: _Decoding, seek: float, threads: int) -> bool:
    """Decode from second `seek` of the file on; whether that was early enough for the clip."""
    with _opened(decoding.path) as container:
        video, audio = _streams(container, decoding.path)
        zero = float(video.start_time * video.time_base) if video.start_time is not None else 0.0
        for stream in (video, audio):
            stream.codec_context.thread_count = threads
            stream.codec_context.thread_type = "NONE" if threads == 1 else "AUTO"
        if seek:
            container.seek(int((zero + seek) * 1e6))
        origin, early = zero + decoding.begin, not seek
        length = 1 / float(video.average_rate or video.guessed_rate or 25)
        shown = 0.0
        for packet in container.demux(video, audio):
            if packet.is_corrupt:
                raise DataError(f"{decoding.path}: damaged at {_at(packet)}")
            frames: list[Any] = [*packet.decode()]
            for frame in frames:
                time = None if frame.pts is None else float(frame.pts * frame.time_base) - origin
                if packet.stream is audio:
                    decoding.add_sound(frame, time)
                    continue
                shown = time if time is not None else shown + length
                if not early and shown > -ROUNDING:
                    return False
                early = True
                duration = float(frame.duration * frame.time_base) if frame.duration else length
                decoding.add_picture(frame, shown, duration)
            if decoding.is_complete:
                return True
        decoding.finish()
    return True


def _streams(container: InputContainer, path: str | Path) -> tuple[Any, Any]:
    """The picture's and the sound's stream."""
    import av

    video, audio = container.streams.best("video"), container.streams.best("audio")
    if video is None or video.disposition & av.stream.Disposition.attached_pic:
        raise DataError(f"{path}: no picture in it")
    if audio is None:
        raise DataError(f"{path}: no sound in it")
    size: Any = video.codec_context
    if not 0 < size.width * size.height <= MAX_PIXELS:
        raise DataError(f"{path}: pictures of {size.width} x {size.height} pixels; up to {MAX_PIXELS:,} are read")
    return video, audio


def _at(packet: av.Packet[Any]) -> str:
    return f"{float(packet.pts * packet.time_base):.2f} s" if packet.pts is not None else "an unknown second"


def _reason(error: Exception) -> str:
    return one_line(getattr(error, "strerror", None) or error)[:100]


def _notes(path: str | Path, form: ClipForm, decoding: _Decoding) -> list[str]:
    """What was made fit; raises DataError where too much is missing."""
    missing = form.seconds - decoding.end
    if missing > form.slack + ROUNDING:
        raise DataError(f"{path}: its pictures last {decoding.end:.2f} s, the clip {form.seconds:g} s")
    silent = decoding.track.missing_seconds()
    if silent > form.slack:
        raise DataError(f"{path}: {silent:.2f} s of {form.seconds:g} s have no sound")
    notes = [f"pictures end {missing:.2f} s early"] if missing > NOTED_SECONDS else []
    return notes + ([f"silence for {silent:.2f} s without sound"] if silent > NOTED_SECONDS else [])
