"""`shards preview --png` and `--html`: the features as they were packed, each sample drawn at the same cost."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from cpsp_dist.cli import main
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.packing.preview import Sample, preview, read_samples, select
from cpsp_dist.report import preview_page as module
from cpsp_dist.report.page import Choice, Table


def some_samples(count: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [
        Sample("train", f"{n:06d}-v", "dog", rng.random((7, 14)), rng.random((4, 2)), [0, n % 2]) for n in range(count)
    ]


def test_what_is_shown_is_what_was_packed(keypad_shards: Path, keypad_features: Path) -> None:
    manifest = Manifest.load(keypad_shards)
    rows = select(manifest, "val", 3)
    samples = [*read_samples(manifest, rows)]
    with (
        h5py.File(keypad_features / "visual_feature.h5") as visual,
        h5py.File(keypad_features / "audio_feature.h5") as audio,
    ):
        (maps,), (sounds,) = visual.values(), audio.values()
        for sample in samples:
            row = int(sample.key.partition("-")[0])
            assert np.allclose(sample.audio, sounds[row].T, atol=1e-6)
            for second in range(10):
                expected = np.abs(maps[row][second].astype(np.float16).astype(np.float32)).mean(-1)
                assert np.allclose(sample.visual[:, 7 * second : 7 * second + 7], expected, atol=1e-3)
    bars = [line.split()[-1] for line in preview(manifest, rows)]
    assert ["".join("▁█"[event] for event in sample.label) for sample in samples] == bars


def test_the_page(keypad_shards: Path) -> None:
    manifest = Manifest.load(keypad_shards)
    samples = [*read_samples(manifest, select(manifest, "test", 2))]
    page = module.preview_page(samples, "place", 0.5)
    table: Any = page.sections[0].parts[0]
    assert isinstance(table, Table)
    assert [row[4] for row in table.rows] == [[None, each.label] for each in samples]
    choice = page.sections[1].parts[0]
    assert isinstance(choice, Choice)
    event, visual, audio = choice.groups[0][1]
    assert event.option["xAxis"]["data"][:3] == ["0 s", "0.5 s", "1 s"]
    assert event.option["series"][0]["data"] == samples[0].label
    for figure, pixels in ((visual, samples[0].visual), (audio, samples[0].audio)):
        cells = figure.option["series"][0]["data"]
        assert len(cells) == pixels.size
        assert all(value == pytest.approx(pixels[y, x], rel=0.01, abs=1e-6) for x, y, value in cells)


def test_each_sample_costs_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What matplotlib makes grows with the samples, and not faster; 100 lie below each other, more beside them."""
    sizes, made = {}, []
    monkeypatch.setattr(module, "BELOW", 4)
    original = module._draw
    monkeypatch.setattr(module, "_draw", lambda axis, *more: (made.append(axis), original(axis, *more)))
    for count in (2, 4, 8):
        made.clear()
        module.draw(some_samples(count), 1.0, tmp_path / "x.png")
        assert len(made) == len({id(axis) for axis in made}) == count
        assert {axis.get_xlabel() for axis in made} == {"seconds"}
        sizes[count] = struct.unpack(">II", (tmp_path / "x.png").read_bytes()[16:24])
    assert sizes[2][0] == sizes[4][0] == sizes[8][0] / 2
    assert sizes[8][1] == sizes[4][1] == sizes[2][1] + 2 * round(100 * module.HEIGHT)


def test_dollar_signs_are_no_formula(tmp_path: Path) -> None:
    (sample,) = some_samples(1)
    module.draw([replace(sample, key="$a_^$", category=r"$\frac$")], 1.0, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_too_many_for_a_picture(
    keypad_shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "MOST", 5)
    assert main(["shards", "preview", str(keypad_shards), "-n", "6", "--png", str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err == "error: --png: 6 samples; give -n 5 or less, or --key for those to look at\n"
