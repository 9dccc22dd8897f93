"""The forms in which labels, ids, categories, audio and axis orders come, in each layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpsp_dist.packing.pack import pack
from cpsp_dist.packing.plan import PackOptions
from cpsp_dist.packing.source import SourceOptions, is_channels_first, open_source
from cpsp_dist.utils.errors import DataError
from tests.support import ave_metadata
from tests.support.packed import packed
from tests.support.packing_sources import (
    one_hot,
    read_back,
    video_id,
    write_ave,
    write_avel,
    write_h5,
    write_zip,
)


@pytest.mark.parametrize(("splits", "header"), [("order", False), ("text", True)])
@pytest.mark.long
def test_ave_metadata_at_its_real_size(tmp_path: Path, splits: str, header: bool) -> None:
    source = tmp_path / "source"
    source.mkdir()
    lines = ave_metadata.write(source, splits, header)
    write_h5(source / "visual_feature.h5", np.zeros((4143, 10, 7, 7, 1), np.float16))
    write_h5(source / "audio_feature.h5", np.arange(4143.0)[:, None, None] * np.ones((10, 1)), "dataset")
    opened = open_source(SourceOptions("ave-h5", source=source))
    assert not opened.problems
    (note,) = opened.notes
    assert note.startswith("4143 rows are cut from 4097 videos (46 repeat an id); 18 videos are in more than one split")
    manifest = pack(opened, tmp_path / "out", PackOptions())
    assert {name: len(rows) for name, rows in manifest.splits.items()} == {"train": 3339, "val": 402, "test": 402}
    assert len(np.unique(manifest.samples["video"])) == 4097
    assert manifest.categories == list(dict.fromkeys(line[0] for line in lines))  # AVE numbers classes as they come
    for sample in read_back(tmp_path / "out"):
        info = sample["json"]
        category, name, _, start, end = lines[info["row"]]
        assert (info["video_id"], info["category_name"]) == (name, category)
        expected = np.zeros(10)
        expected[int(start) : int(end)] = 1
        np.testing.assert_array_equal(sample["label.npy"], expected)
        assert sample["audio.npy"][0, 0] == info["row"]


def test_ave_ids_and_categories_that_are_not_known(tmp_path: Path) -> None:
    source = tmp_path / "source"
    data = write_ave(source)
    text = (source / "Annotations.txt").read_text().splitlines()
    (source / "Annotations.txt").write_text("\n".join(text[1:8]) + "\n")  # rows 0 to 6, no header
    opened = open_source(SourceOptions("ave-h5", source=source))
    entries = {e.row: e for e in opened.entries}
    assert [entries[r].video_id for r in (6, 7)] == [video_id(6), "row000007"]
    # Rows 2, 5, 8 and 11 have no event. Annotations knows the class of 2 and 5, mil_labels may know the others'.
    assert [entries[r].category for r in (2, 5, 8, 11)] == [2, 2, -1, -1]
    mil = np.eye(4)[np.where(np.arange(12) == 11, 3, data["category"])]  # row 11 is background there, too
    write_h5(source / "mil_labels.h5", mil)
    entries = {e.row: e for e in open_source(SourceOptions("ave-h5", source=source)).entries}
    assert [entries[r].category for r in (2, 5, 8, 11)] == [2, 2, 2, -1]


@pytest.mark.parametrize("name", ["right_labels.h5", "labels.h5"])
def test_ave_labels_under_either_name(tmp_path: Path, name: str) -> None:
    """Users have both; where both are there it is `right_labels.h5`."""
    source = tmp_path / "source"
    data = write_ave(source)
    (source / "right_labels.h5").rename(source / name)
    if name == "right_labels.h5":
        write_h5(source / "labels.h5", one_hot(data)[::-1])
    packed(tmp_path / "out", "ave-h5", source)
    for sample in read_back(tmp_path / "out"):
        np.testing.assert_array_equal(sample["label.npy"], data["mask"][sample["json"]["row"]])


def test_class_names_from_annotations_alone(tmp_path: Path) -> None:
    write_ave(tmp_path / "source")
    (tmp_path / "source" / "categories.txt").unlink()
    opened = open_source(SourceOptions("ave-h5", source=tmp_path / "source"))
    # Class 2 is that of the videos without events only, so no label has its name.
    assert opened.categories == ["bark", "bell", "class 2"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("first", [False, True])
def test_ave_axis_orders_and_float_types(tmp_path: Path, dtype: type, first: bool) -> None:
    source = tmp_path / "source"
    data = write_ave(source)
    visual = data["visual"].astype(dtype)
    write_h5(source / "visual_feature.h5", np.moveaxis(visual, 4, 2) if first else visual, "dataset")
    packed(tmp_path / "out", "ave-h5", source, PackOptions("float32"))
    for sample in read_back(tmp_path / "out"):
        np.testing.assert_array_equal(sample["visual.npy"], visual[sample["json"]["row"]].astype(np.float32))


# --- the AVEL100k layout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["list of dicts", "dict of dicts", "dict of lists", "text"])
def test_json_labels(tmp_path: Path, variant: str) -> None:
    source = tmp_path / "source"
    data = write_avel(source)
    masks = {video_id(row): mask.astype(int).tolist() for row, mask in enumerate(data["mask"])}
    content = {
        "list of dicts": [{name: {"label": mask}} for name, mask in masks.items()],
        "dict of dicts": {name: {"label": [mask], "category": "x"} for name, mask in masks.items()},
        "dict of lists": masks,
        "text": [{name: {"label": str(mask)}} for name, mask in masks.items()],
    }[variant]
    (tmp_path / "labels.json").write_text(json.dumps(content))
    packed(tmp_path / "out", "avel100k-zip", source, labels=tmp_path / "labels.json")
    for sample in read_back(tmp_path / "out"):
        np.testing.assert_array_equal(sample["label.npy"], data["mask"][sample["json"]["row"]])


@pytest.mark.parametrize("rows", [1, 9, 10, 11, 30])
def test_audio_of_any_length(tmp_path: Path, rows: int) -> None:
    source = tmp_path / "source"
    write_avel(source, 4)
    audio = np.arange(rows * 5.0).reshape(rows, 5)
    write_zip(source / "audio" / f"{video_id(1)}.zip", audio)
    packed(tmp_path / "out", "avel100k-zip", source)
    expected = [audio[min(t, rows - 1)] for t in range(10)]
    sample = next(s for s in read_back(tmp_path / "out") if s["json"]["row"] == 1)
    np.testing.assert_array_equal(sample["audio.npy"], expected)


def test_axis_orders_may_differ_between_videos(tmp_path: Path) -> None:
    source = tmp_path / "source"
    data = write_avel(source, 4)
    write_zip(source / "video" / f"{video_id(2)}.zip", data["visual"][2])  # channels last, the others first
    packed(tmp_path / "out", "avel100k-zip", source, PackOptions("float32"))
    for sample in read_back(tmp_path / "out"):
        np.testing.assert_array_equal(sample["visual.npy"], data["visual"][sample["json"]["row"]])


def test_seven_channels_need_the_order(tmp_path: Path) -> None:
    source = tmp_path / "source"
    data = write_avel(source, 4, channels=7)
    with pytest.raises(DataError, match=r"\[10, 7, 7, 7\] can be read both ways; say --visual-order"):
        packed(tmp_path / "out", "avel100k-zip", source)
    packed(tmp_path / "out", "avel100k-zip", source, PackOptions("float32"), visual_order="first")
    for sample in read_back(tmp_path / "out"):
        np.testing.assert_array_equal(sample["visual.npy"], data["visual"][sample["json"]["row"]])


@given(shape=st.tuples(*[st.sampled_from([1, 7, 10, 512])] * 4), order=st.sampled_from(["auto", "last", "first"]))
def test_axis_order_rule(shape: tuple[int, ...], order: str) -> None:
    """A grid has two equal sides, unless the order is given and neither of the two readings has such a grid."""
    square = {name for name, grid in (("last", shape[1:3]), ("first", shape[2:])) if grid[0] == grid[1]}
    fitting = square if order == "auto" else (square or {order}) & {order}
    if len(fitting) == 1:
        assert is_channels_first(shape, order, "x") == (fitting == {"first"})
        assert not is_channels_first((shape[0], shape[3]), order, "x")  # vectors
    else:
        with pytest.raises(DataError, match=r"^x: "):
            is_channels_first(shape, order, "x")


def test_a_grid_that_shards_do_not_hold_is_refused_before_packing(tmp_path: Path) -> None:
    """9 x 16 cells of 16 channels, which only their order given as `first` makes known."""
    source = tmp_path / "source"
    visual = np.moveaxis(np.zeros((10, 9, 16, 16), np.float32), 3, 1)
    write_avel(source, 1)
    write_zip(source / "video" / f"{video_id(0)}.zip", visual)
    with pytest.raises(DataError, match=r"^visual \[10, 9, 16, 16\], channels last: as many channels as one side"):
        packed(tmp_path / "out", "avel100k-zip", source, visual_order="first")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# --- the shards ------------------------------------------------------------------------------------------------------
