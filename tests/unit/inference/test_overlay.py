"""`--overlay`: the video again, with the events drawn in while they last, and the same sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from cpsp_dist.inference.overlay import EVENT, overlay
from cpsp_dist.inference.prediction import Prediction, Span
from cpsp_dist.utils.errors import UserError
from tests.support.videos import Spec, make_video, turn

OF_WEBM = Spec(
    fps=10,
    frames=30,
    size=(121, 161),
    codec="libvpx",
    audio_codec="libopus",
    rate=48000,
    codec_options={"deadline": "realtime", "cpu-used": "8"},
)


def prediction(path: Path) -> Prediction:
    """An event from second 1 to 2 of three."""
    return Prediction(
        str(path), path.stem, "dog barking", 0.9, 1.0, [0.1, 0.9, 0.2], [Span(1.0, 2.0, "dog barking", 0.9)]
    )


def opened(path: Path) -> tuple[list[float], np.ndarray, bytes]:
    """(time of each frame, its pixels [n, H, W, 3], the packets of the sound)."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    with av.open(str(path)) as container:
        sound = b"".join(bytes(packet) for packet in container.demux(audio=0))
    return [float(frame.time or 0) for frame in frames], pixels, sound


@pytest.mark.parametrize(
    ("name", "written", "spec"),
    [
        ("clip.mp4", "clip.mp4", Spec(fps=10, frames=30, size=(120, 160))),
        ("clip.webm", "clip.mp4", OF_WEBM),
        ("clip.mkv", "clip.mkv", Spec(fps=10, frames=30, size=(120, 160), audio_codec="pcm_s16le")),
    ],
)
def test_events_are_drawn_while_they_last(tmp_path: Path, name: str, written: str, spec: Spec) -> None:
    path = make_video(tmp_path / name, spec)
    made = overlay(prediction(path), tmp_path / "out" / "videos")
    assert made == tmp_path / "out" / "videos" / written
    assert [each.name for each in made.parent.iterdir()] == [written], "no part is left"
    times, before, sound = opened(path)
    again, after, copied = opened(made)
    np.testing.assert_allclose(again, times, rtol=0, atol=0.002)
    assert copied == sound
    assert len(sound) > 1000
    before = before[:, :120, :160]
    assert after.shape == before.shape
    # The bar of the seconds is at the bottom; an event's frame and its name are at the top.
    change = np.abs(after[:, :40].astype(int) - before[:, :40]).mean(axis=(1, 2, 3))
    inside = np.array([1.0 <= time < 2.0 for time in times])
    assert inside.sum() == 10
    assert change[inside].min() > 4 * change[~inside].max()
    corner = after[inside][:, 1, 80].mean(axis=0)
    assert np.abs(corner - EVENT).max() < 60
    bar = after[5, -2:].astype(int).mean(axis=0)
    assert bar[80, 1] > bar[80, 0] + 60, "green in the middle third"
    assert np.ptp(bar[130]) < 60, "grey in the last"


def test_a_turned_video_is_upright(tmp_path: Path) -> None:
    path = make_video(tmp_path / "turned.mp4", Spec(fps=10, frames=30, size=(64, 96)))
    turn(path, 90)
    _, pixels, _ = opened(overlay(prediction(path), tmp_path / "out"))
    assert pixels.shape[1:3] == (96, 64)
    red = pixels[0].astype(int)[10:80, :, 0] - pixels[0].astype(int)[10:80, :, 1]
    assert red[:, 4].mean() > 100 > red[:, 40].mean(), "what was at the bottom is at the left"


def test_what_has_no_pictures_and_the_source_itself_are_refused(tmp_path: Path) -> None:
    path = make_video(tmp_path / "clip.mp4", Spec(fps=10, frames=30))
    content = path.read_bytes()
    with pytest.raises(UserError, match="would overwrite the video"):
        overlay(prediction(path), tmp_path)
    assert path.read_bytes() == content
    with pytest.raises(UserError, match="shards is no video"):
        overlay(prediction(tmp_path / "shards"), tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--overlay .*cannot be written \(File exists\)$"):
        overlay(prediction(path), tmp_path / "file")


def test_without_pillow_it_is_one_line(tmp_path: Path, monkeypatch: Any) -> None:
    from cpsp_dist.utils import extras

    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "PIL" else object())
    with pytest.raises(UserError, match=r"--overlay needs PIL, which the extra 'report' brings"):
        overlay(prediction(tmp_path / "clip.mp4"), tmp_path / "out")
