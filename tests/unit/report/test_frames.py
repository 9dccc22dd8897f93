"""Attention over frames: keypad's wall, a picture's bytes, and where it is orange."""

from __future__ import annotations

import io
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from cpsp_dist.data.manifest import Manifest
from cpsp_dist.demo.keypad import CATEGORIES
from cpsp_dist.report.frames import EVENT, KEYPAD, attended, png, wall


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


def test_the_manifest_of_keypad_is_recognised(keypad_shards: Path) -> None:
    assert tuple(Manifest.load(keypad_shards).categories) == KEYPAD
