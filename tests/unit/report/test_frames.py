"""Attention over frames: keypad's wall, a picture's bytes, and where it is orange."""

from __future__ import annotations

import io
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from cpsp_dist.cli import main
from cpsp_dist.cli.report import _frames_in
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.demo.keypad import CATEGORIES
from cpsp_dist.report.frames import EVENT, KEYPAD, attended, png, wall
from cpsp_dist.utils.errors import UserError
from tests.support.models import untrained_run
from tests.support.videos import Spec, make_video, shown


def test_the_wall_is_keypads(keypad_features: Path) -> None:
    with h5py.File(keypad_features / "visual_feature.h5") as file:
        visual = file["avadataset"][0].astype(np.float32)
    found = wall(visual, CATEGORIES)
    assert found is not None
    assert found.shape == (10, 56, 56, 3)
    assert [*KEYPAD] == CATEGORIES
    row, column = 4, 2
    cell = found[3, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8, 0]
    assert np.array_equal(cell, (255 * visual[3, row, column].reshape(8, 8)).astype(np.uint8))
    assert wall(visual, ["dog"]) is None
    assert wall(np.zeros((10, 7, 7, 512)), CATEGORIES) is None


def test_a_png_is_what_pillow_reads() -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (7, 11, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(pixels)))), pixels)


def test_orange_is_where_the_weight_is() -> None:
    frames = np.full((2, 56, 56, 3), 100, np.uint8)
    attention = np.zeros((2, 7, 7))
    attention[1, 0, 6] = 0.5
    found = np.asarray(Image.open(io.BytesIO(attended(frames, attention, np.array([True, False])))))
    assert found.shape == (112 + 8, 112 + 8 + 112, 4)
    panel = found[:112, 120:].astype(int)
    strong = panel[..., 0] - panel[..., 2] > 50
    assert strong[:16, 96:].all()
    assert strong.sum() == 16 * 16
    assert (found[-1, :112] == EVENT).all()
    assert (found[-1, 120:, 3] == 0).all()


@pytest.mark.long
def test_frames_of_videos_by_the_end_of_a_key(
    tmp_path: Path, keypad_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The frame in the middle of each segment, found by a sample's key; where there is none, the wall."""
    numbers = [n for n in range(10) for _ in range(25)]
    (tmp_path / "videos").mkdir()
    make_video(tmp_path / "videos" / "clip_1.mp4", Spec(frames=250), numbers)
    frames_of = _frames_in(tmp_path / "videos")
    found = frames_of("000012-clip_1", 10, 1.0)
    assert found is not None
    assert found.shape == (10, 112, 112, 3)
    assert [shown(frame) for frame in found] == [*range(10)]
    assert frames_of("000012-clip_2", 10, 1.0) is None
    (tmp_path / "videos" / "clip_2.mp4").write_bytes(b"damaged")
    assert _frames_in(tmp_path / "videos")("000012-clip_2", 10, 1.0) is None
    untrained_run(keypad_shards, tmp_path / "run")
    page = str(tmp_path / "page.html")
    assert main(["report", str(tmp_path / "run"), "--videos", str(tmp_path / "videos"), "--out", page]) == 0
    assert Path(page).read_text(encoding="utf-8").count("data:image/png;base64,") == 12
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "run"), "--videos", str(tmp_path / "empty")]) == 2
    assert f"--videos {tmp_path}/empty: no video in there" in capsys.readouterr().err
    (tmp_path / "videos" / "clip_1.webm").touch()
    with pytest.raises(UserError, match=r"two videos of one name, clip_1\.mp4 and clip_1\.webm$"):
        _frames_in(tmp_path / "videos")


def test_the_manifest_of_keypad_is_recognised(keypad_shards: Path) -> None:
    assert tuple(Manifest.load(keypad_shards).categories) == KEYPAD
