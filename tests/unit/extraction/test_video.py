"""Decoding: videos whose frames show their numbers, with sound that is known at every sample."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpsp_dist.extraction.clip import Clip, ClipForm
from cpsp_dist.extraction.sound import mix, resample
from cpsp_dist.extraction.video import read_clip
from cpsp_dist.utils.errors import DataError
from tests.support.videos import Spec, chirps, make_video, shown, turn

FORM = ClipForm(segments=10, segment_seconds=0.2, frames_per_segment=16, size=(60, 100))
NTSC = Fraction(30000, 1001)
VP8 = {"codec": "libvpx", "codec_options": {"deadline": "realtime"}, "audio_codec": "libopus", "rate": 48000}
H264 = {"codec_options": {"bf": "3", "g": "12"}}
#: Seconds of 70 frames, not evenly spread.
TIMES = [0.0, *np.sort(np.random.default_rng(0).choice(np.arange(1, 1990), 69, replace=False)) / 1000]


def published(count: int, per_segment: int = 16) -> list[int]:
    """The formula of the published features, in exact arithmetic."""
    n = count // 10
    parts = [Fraction(i, per_segment) for i in range(per_segment)] if per_segment > 1 else [Fraction(1, 2)]
    return [math.floor(segment * n + part * n) for segment in range(10) for part in parts]


def lag(clip: Clip, start: float = 0.0, rate: int = 16000) -> float:
    """Milliseconds by which the sound of `chirps` comes late."""
    wave, wanted = clip.waveform, chirps(len(clip.waveform) / rate + 0.1, rate, start - 0.05)
    scores = {k: float(np.dot(wave, wanted[800 - k : 800 - k + len(wave)])) for k in range(-100, 100)}
    assert max(scores.values()) > 0.9 * np.square(wanted).sum() * len(wave) / len(wanted)
    return 1000 * max(scores, key=lambda k: scores[k]) / rate


CASES = [
    ("16.mp4", Spec(fps=16, frames=32, rate=16000, **H264)),
    ("25.mkv", Spec(fps=25, frames=50, **H264)),
    ("ntsc.mp4", Spec(fps=NTSC, frames=59, rate=48000, **H264)),
    ("30.webm", Spec(fps=30, frames=60, **VP8)),
    ("50.mp4", Spec(fps=50, frames=100, codec="mpeg4")),
    ("60.mkv", Spec(fps=60, frames=120, audio_codec="libmp3lame", rate=22050, **H264)),
    ("variable.mp4", Spec(fps=35, frames=70, times=TIMES, **H264)),
    ("variable.mkv", Spec(fps=35, frames=70, times=TIMES, audio_codec="flac", **H264)),
    ("variable.webm", Spec(fps=35, frames=70, times=TIMES, **VP8)),
    ("later.mkv", Spec(fps=25, frames=50, options={"output_ts_offset": "5"}, **H264)),
    ("edit.mp4", Spec(fps=25, frames=50, options={"output_ts_offset": "5"}, **H264)),
    ("offset.ts", Spec(fps=25, frames=50, **H264)),
    ("ten_bit.mp4", Spec(fps=25, frames=50, pix_fmt="yuv420p10le")),
    ("odd.mkv", Spec(fps=25, frames=50, pix_fmt="yuv444p", size=(47, 83))),
    ("6ch.mp4", Spec(fps=25, frames=50, layout="5.1", rate=48000)),
]
RATES = {
    "16": {"fps": 16, "frames": 32},
    "25": {"fps": 25, "frames": 50},
    "ntsc": {"fps": NTSC, "frames": 59},
    "30": {"fps": 30, "frames": 60},
    "50": {"fps": 50, "frames": 100},
    "variable": {"fps": 35, "frames": 70, "times": TIMES},
}


def every_rate_in_every_container() -> list[Any]:
    """What `CASES` lacks of it."""
    codecs: dict[str, dict[str, Any]] = {"mp4": H264, "mkv": H264, "webm": VP8}
    names = [f"{rate}.{suffix}" for rate in RATES for suffix in codecs]
    left = [name for name in names if name not in dict(CASES)]
    specs = {name: Spec(**RATES[name.split(".")[0]], **codecs[name.split(".")[1]]) for name in left}
    return [pytest.param(name, spec, marks=pytest.mark.long) for name, spec in specs.items()]


@pytest.mark.parametrize(("name", "spec"), [*CASES, *every_rate_in_every_container()])
def test_published_frames_and_sound_in_time(tmp_path: Path, name: str, spec: Spec) -> None:
    clip = read_clip(make_video(tmp_path / name, spec), FORM)
    assert clip.count == spec.frames
    assert [shown(frame) for frame in clip.frames] == published(spec.frames)
    assert clip.frames.shape == (160, 60, 100, 3)
    assert clip.waveform.shape == (32000,)
    assert abs(lag(clip)) <= 1


def test_a_header_with_another_number_of_frames(tmp_path: Path) -> None:
    """Matroska stores no count, and the mean rate misleads: three quarters of the frames lie in one quarter."""
    times = [*np.arange(60) * 0.008, *(0.5 + np.arange(20) * 0.075)]
    path = make_video(tmp_path / "v.mkv", Spec(fps=25, frames=80, times=times))
    assert [shown(frame) for frame in read_clip(path, FORM).frames] == published(80)


@pytest.mark.parametrize(
    ("suffix", "codecs"),
    [("mkv", H264), *(pytest.param(*case, marks=pytest.mark.long) for case in (("mp4", H264), ("webm", VP8)))],
)
def test_a_stretch_of_a_longer_file(tmp_path: Path, suffix: str, codecs: dict) -> None:
    spec = Spec(fps=30, frames=300, options={"output_ts_offset": "3"}, **codecs)
    path = make_video(tmp_path / f"v.{suffix}", spec)
    for start in (0.0, 0.5, 3.3, 7.7):
        clip = read_clip(path, FORM, start)
        first = math.ceil(start * 30 - 1e-6)
        assert [shown(frame) for frame in clip.frames] == [first + index for index in published(60)]
        assert abs(lag(clip, start)) <= 1


def test_the_start_of_a_file_that_was_cut_before(tmp_path: Path) -> None:
    clip = read_clip(make_video(tmp_path / "v.mp4"), FORM, start=30.0)
    assert [shown(frame) for frame in clip.frames] == published(50)
    assert clip.notes == ("taken as the clip, not cut at its start second",)


def test_a_file_longer_than_the_clip(tmp_path: Path) -> None:
    """By less than half a segment: all of its frames count, as in the published features. By more: those within."""
    longer = make_video(tmp_path / "a.mp4", Spec(fps=50, frames=104))
    assert read_clip(longer, FORM).count == 104
    much = make_video(tmp_path / "b.mp4", Spec(fps=50, frames=130))
    assert read_clip(much, FORM).count == 100


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_turned_as_the_file_says(tmp_path: Path, degrees: int) -> None:
    path = make_video(tmp_path / "v.mp4")
    form = ClipForm(10, 0.2, 1, (60, 100))
    straight = read_clip(path, ClipForm(10, 0.2, 1, (60, 100) if degrees == 180 else (100, 60))).frames
    turn(path, degrees)
    assert np.array_equal(read_clip(path, form).frames, np.rot90(straight, -degrees // 90, (1, 2)))


def test_one_frame_in_the_middle_and_its_colours(tmp_path: Path) -> None:
    clip = read_clip(make_video(tmp_path / "v.mp4", Spec(fps=30, frames=60)), ClipForm(10, 0.2, 1, (60, 100)))
    assert [shown(frame) for frame in clip.frames] == published(60, 1)
    red = clip.frames[:, 52:58].reshape(-1, 3).mean(0)
    assert red[0] > 240
    assert red[1:].max() < 15


def test_threads_change_nothing(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", Spec(**H264))
    one, four = read_clip(path, FORM), read_clip(path, FORM, threads=4)
    assert np.array_equal(one.frames, four.frames)
    assert np.array_equal(one.waveform, four.waveform)


def test_what_is_made_fit_is_noted(tmp_path: Path) -> None:
    short = Spec(fps=25, frames=48, sound=chirps(1.95, 44100)[None])
    clip = read_clip(make_video(tmp_path / "v.mp4", short), FORM)
    assert clip.notes[0] == "pictures end 0.08 s early"
    assert clip.notes[1].startswith("silence for 0.0")
    assert abs(lag(clip)) <= 1


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (Spec(fps=25, frames=40), "its pictures last 1.60 s, the clip 2 s"),
        (Spec(sound=chirps(1.2, 44100)[None]), "s of 2 s have no sound"),
        (Spec(audio_codec=None), "no sound in it"),
        (Spec(fps=4, frames=8), "8 frames are fewer than 10 segments"),
        (Spec(sound=chirps(1.5, 44100)[None], sound_at=0.5), "s of 2 s have no sound"),
    ],
)
def test_what_is_missing_is_an_error(tmp_path: Path, spec: Spec, said: str) -> None:
    path = make_video(tmp_path / "v.mp4", spec)
    with pytest.raises(DataError, match=said) as error:
        read_clip(path, FORM)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_resampling_is_exact_below_the_band_limit(rate: int) -> None:
    time = np.arange(rate) / rate
    tone = np.sin(2 * np.pi * 440 * time).astype(np.float32)
    wanted = np.sin(2 * np.pi * 440 * (rate // 4 / rate + np.arange(8000) / 16000))
    assert np.abs(resample(tone, rate, 16000, rate // 4, 8000) - wanted).max() < 1e-5
    if rate > 16000:  # what 16 kHz cannot hold is removed, not folded back
        high = np.sin(2 * np.pi * 9000 * time).astype(np.float32)
        assert np.abs(resample(high, rate, 16000, rate // 4, 8000)).max() < 1e-3


def test_channels_are_mixed_without_clipping() -> None:
    ones = np.ones((6, 4), np.float32)
    names = ["FL", "FR", "FC", "LFE", "BL", "BR"]
    assert np.allclose(mix(ones, names), 1)
    center = np.array([[0], [0], [1], [0], [0], [0]], np.float32)
    left = np.array([[1], [0], [0], [0], [0], [0]], np.float32)
    assert np.allclose(mix(center, names) / mix(left, names), math.sqrt(2))
    assert np.allclose(mix(np.array([[-32768, 16384], [0, 16384]], np.int16), ["FL", "FR"]), [-0.5, 0.5])
    assert np.allclose(mix(np.array([[0, 128, 192]], np.uint8), ["FC"]), [-1, 0, 0.5])


def test_the_middle_of_the_picture(tmp_path: Path) -> None:
    """The largest part of the size's proportions; a turned file's middle is the same."""
    path = make_video(tmp_path / "v.mp4", Spec(size=(48, 80)))
    complete = read_clip(path, ClipForm(10, 0.2, 1, (48, 80))).frames
    square = ClipForm(10, 0.2, 1, (48, 48), crop=True)
    middle = read_clip(path, square).frames
    assert np.array_equal(middle, complete[:, :, 16:64])
    turn(path, 90)
    assert np.array_equal(read_clip(path, square).frames, np.rot90(middle, -1, (1, 2)))
