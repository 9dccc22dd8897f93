"""Clips of any number of segments, and labels in the csv, where a video may be in several rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cpsp_dist.data.manifest import Manifest
from cpsp_dist.packing.pack import pack
from cpsp_dist.packing.plan import PackOptions
from cpsp_dist.packing.source import SourceOptions, open_source
from cpsp_dist.utils.errors import DataError, UserError
from tests.support.packing_sources import read_back


def write(
    folder: Path, segments: int, rows: list[str], header: str = "category,video_id,split"
) -> dict[str, np.ndarray]:
    """`rows` of a csv, and features of their videos a, b, c; returns them."""
    rng = np.random.default_rng(segments)
    visual = {name: rng.standard_normal((segments, 7, 7, 4)).astype(np.float32) for name in "abc"}
    for name, array in visual.items():
        for kind, data in (("visual", array), ("audio", array.mean((1, 2)))):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            np.save(folder / kind / f"{name}.npy", data)
    (folder / "list.csv").write_text("\n".join([header, *rows]) + "\n")
    (folder / "categories.txt").write_text("dog\nbell\n")
    return visual


def packed(folder: Path) -> Manifest:
    return pack(open_source(SourceOptions("npy", source=folder)), folder.parent / "out", PackOptions("float32"))


@pytest.mark.parametrize("segments", [1, 5, 30])
def test_clips_of_any_number_of_segments(tmp_path: Path, segments: int) -> None:
    visual = write(tmp_path / "in", segments, ["dog,a,train", "bell,b,val", "dog,c,test"])
    labels = {name: [number % 2 for number in range(i, i + segments)] for i, name in enumerate("abc")}
    (tmp_path / "in" / "labels.json").write_text(json.dumps(labels))
    np.save(tmp_path / "in" / "audio" / "b.npy", np.arange(8.0).reshape(2, 4))
    manifest = packed(tmp_path / "in")
    assert [manifest.fields[name].shape[0] for name in ("visual", "audio", "label")] == [segments] * 3
    for sample in read_back(tmp_path / "out"):
        name = sample["json"]["video_id"]
        np.testing.assert_array_equal(sample["visual.npy"], visual[name])
        np.testing.assert_array_equal(sample["label.npy"], labels[name])
        rows = [*range(segments)] if name != "b" else [min(t, 1) for t in range(segments)]
        audio = visual[name].mean((1, 2)) if name != "b" else np.arange(8.0).reshape(2, 4)
        np.testing.assert_allclose(sample["audio.npy"], audio[rows], rtol=1e-6)


def test_a_clip_of_another_number_of_segments_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "in", 5, ["dog,a,train", "bell,b,val", "dog,c,test"])
    (tmp_path / "in" / "labels.json").write_text(json.dumps({name: [0, 1, 1, 0, 0] for name in "abc"}))
    np.save(tmp_path / "in" / "visual" / "c.npy", np.zeros((6, 7, 7, 4)))
    with pytest.raises(DataError, match=r"video c \(row 2\): .*shape \[5\], expected \[1, 6\] or \[6\] as the visual"):
        packed(tmp_path / "in")


def test_a_video_in_several_rows_with_labels_of_its_own(tmp_path: Path) -> None:
    rows = ['dog,a,train,"[0, 1, 1]"', 'bell,a,test,"[[1, 0, 0]]"', 'bell,b,val,"[0, 0, 0]"']
    visual = write(tmp_path / "in", 3, rows, "category,video_id,split,label")
    assert len(packed(tmp_path / "in").samples) == 3
    found = {(s["json"]["video_id"], s["json"]["split"]): s for s in read_back(tmp_path / "out")}
    assert {key: sample["label.npy"].tolist() for key, sample in found.items()} == {
        ("a", "train"): [0, 1, 1],
        ("a", "test"): [1, 0, 0],
        ("b", "val"): [0, 0, 0],
    }
    np.testing.assert_array_equal(found["a", "train"]["visual.npy"], visual["a"])
    np.testing.assert_array_equal(found["a", "test"]["visual.npy"], visual["a"])


def test_mistakes_in_a_column_of_labels(tmp_path: Path) -> None:
    write(tmp_path / "in", 3, ["dog,a,train,yes"], "category,video_id,split,label")
    with pytest.raises(DataError, match=r"list\.csv: label 'yes' is not a list of numbers"):
        packed(tmp_path / "in")
    write(tmp_path / "in", 3, ["dog,a,train"])
    with pytest.raises(UserError, match="give it with --labels"):
        packed(tmp_path / "in")
