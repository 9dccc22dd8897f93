"""What is packed is what the source holds: checked with h5py, pickle, tarfile and plain webdataset."""

from __future__ import annotations

import csv
import io
import json
import pickle
import tarfile
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpsp_dist.cli import main
from cpsp_dist.data.manifest import Field, Manifest
from cpsp_dist.data.reader import EvalStream, TrainStream
from cpsp_dist.packing import LAYOUTS
from cpsp_dist.packing.index import index_shard
from cpsp_dist.packing.pack import pack
from cpsp_dist.packing.plan import PackOptions, plan_shards
from cpsp_dist.packing.source import Entry, SourceOptions, is_channels_first, open_source
from cpsp_dist.packing.verify import verify
from cpsp_dist.utils.errors import DataError
from tests.support import ave_metadata
from tests.support.environment import DATA
from tests.support.packing_sources import (
    CATEGORIES,
    WRITERS,
    files_under,
    one_hot,
    read_back,
    split_of,
    video_id,
    write_ave,
    write_avel,
    write_h5,
    write_zip,
)


def packed(out: Path, layout: str, source: Path, options: PackOptions | None = None, **files: object) -> Manifest:
    opened = open_source(SourceOptions(layout, source=source, **files))  # type: ignore[arg-type]
    return pack(opened, out, options or PackOptions())


def crc32c(data: bytes) -> int:
    """Bit by bit, from the definition (Castagnoli polynomial, reflected)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_round_trip_of_small_sources(tmp_path: Path, layout: str, dtype: str) -> None:
    data = WRITERS[layout](tmp_path / "source", 12)
    manifest = packed(tmp_path / "out", layout, tmp_path / "source", PackOptions(dtype, shard_mb=0.02))
    samples = list(read_back(tmp_path / "out"))
    assert sorted(s["json"]["row"] for s in samples) == list(range(12))
    assert len({s["shard"] for s in samples}) > 3  # several shards a split
    for sample in samples:
        row = sample["json"]["row"]
        # The rounding to float16 is numpy's, asked for here once more.
        np.testing.assert_array_equal(sample["visual.npy"], data["visual"][row].astype(dtype))
        np.testing.assert_array_equal(sample["audio.npy"], data["audio"][row])
        np.testing.assert_array_equal(sample["label.npy"], data["mask"][row])
        assert sample["visual.npy"].dtype == dtype
        assert (sample["audio.npy"].dtype, sample["label.npy"].dtype) == (np.float32, np.uint8)
        category = int(data["category"][row])  # also without an event: Annotations.txt or the csv has it
        assert sample["json"] == {
            "video_id": video_id(row),
            "category": category,
            "category_name": CATEGORIES[category],
            "split": split_of(row),
            "row": row,
        }
        assert sample["__key__"] == f"{row:06d}-{video_id(row)}"
        assert sample["shard"].startswith(split_of(row))
    assert manifest.categories == CATEGORIES
    assert {name: len(rows) for name, rows in manifest.splits.items()} == {"train": 6, "val": 3, "test": 3}


@pytest.mark.parametrize("layout", ["ave-h5", "avel100k-zip"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_our_reader_delivers_the_source(tmp_path: Path, layout: str, dtype: str) -> None:
    """From the command to both streams' batches, every row against the arrays that the source was written from."""
    source, out = tmp_path / "source", tmp_path / "out"
    data = WRITERS[layout](source, 24)
    command = ["shards", "pack", "--layout", layout, "--source", str(source), "--out", str(out)]
    assert main([*command, "--visual-dtype", dtype, "--shard-mb", "0.03"]) == 0
    manifest = Manifest.load(out)
    assert len(manifest.shards) > 6
    row_of_key = {f"{row:06d}-{video_id(row)}": row for row in range(24)}
    streams = [(split, EvalStream(manifest, split, batch=5), None) for split in ("train", "val", "test")]
    streams += [("train", TrainStream(manifest, "train", global_batch=4, seed=1), 3)]  # 12 of train: one epoch
    for split, stream, steps in streams:
        seen = []
        with stream:
            for batch in stream.batches(count=steps) if steps else stream:
                assert (batch.visual.dtype, batch.audio.dtype) == (getattr(torch, dtype), torch.float32)
                for slot in np.flatnonzero(batch.valid):
                    row = row_of_key[manifest.samples[batch.index[slot]]["key"].decode()]
                    np.testing.assert_array_equal(batch.visual[slot], data["visual"][row].astype(dtype))
                    np.testing.assert_array_equal(batch.audio[slot], data["audio"][row])
                    np.testing.assert_array_equal(batch.event[slot], data["mask"][row])
                    assert batch.category[slot] == data["category"][row]
                    seen.append(row)
        assert sorted(seen) == [row for row in range(24) if split_of(row) == split]


def test_avdigits_h5(tmp_path: Path) -> None:
    source = DATA / "avdigits" / "ave_h5"
    packed(tmp_path / "out", "ave-h5", source, PackOptions("float32"))
    # videos.csv is the data set's own account of itself; the packer never reads it.
    with open(source / "videos.csv", newline="") as file:
        truth = list(csv.DictReader(file))
    names = (source / "categories.txt").read_text().split("\n")
    visual = h5py.File(source / "visual_feature.h5")["avadataset"]
    audio = h5py.File(source / "audio_feature.h5")["avadataset"]
    seen = 0
    for sample in read_back(tmp_path / "out"):
        info = sample["json"]
        line = truth[info["row"]]
        np.testing.assert_array_equal(sample["visual.npy"], visual[info["row"]].astype(np.float32))
        np.testing.assert_array_equal(sample["audio.npy"], audio[info["row"]])
        assert "".join(map(str, sample["label.npy"])) == line["mask"]
        assert info["split"] == line["split"]
        assert info["video_id"] == (line["video_id"] if info["row"] < 12 else f"row{info['row']:06d}")
        if "1" in line["mask"]:
            assert (info["category_name"], info["category"]) == (line["category"], names.index(line["category"]))
        else:
            assert (info["category_name"], info["category"]) == (None, -1)
        seen += 1
    assert seen == len(truth) == 18


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_avdigits_zip(tmp_path: Path, dtype: str) -> None:
    source = DATA / "avdigits" / "avel100k_zip"
    packed(tmp_path / "out", "avel100k-zip", source, PackOptions(dtype))

    def original(kind: str, name: str) -> np.ndarray:
        with zipfile.ZipFile(source / kind / f"{name}.zip") as file:
            return pickle.loads(file.read(file.namelist()[0]))  # our own files: trusted

    with open(source / "avdigits.csv", newline="") as file:
        truth = {line["video_id"]: line for line in csv.DictReader(file)}
    lengths: Counter[int] = Counter()
    for sample in read_back(tmp_path / "out"):
        info = sample["json"]
        audio = original("audio", info["video_id"])
        lengths[len(audio)] += 1
        if len(audio) < 10:
            audio = np.concatenate([audio, audio[-1:]])
        np.testing.assert_array_equal(sample["audio.npy"], audio[:10].astype(np.float32))
        np.testing.assert_array_equal(sample["visual.npy"], original("video", info["video_id"]).astype(dtype))
        np.testing.assert_array_equal(sample["label.npy"], original("label", info["video_id"])[0])
        line = truth.pop(info["video_id"])
        assert (info["category_name"], info["split"]) == (line["category"], line["split"])
    assert not truth
    assert lengths == {9: 2, 10: 5, 11: 1}


# --- the AVE layout --------------------------------------------------------------------------------------------------


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


def test_tar_members_and_table(tmp_path: Path) -> None:
    write_ave(tmp_path / "source")
    manifest = packed(tmp_path / "out", "ave-h5", tmp_path / "source", PackOptions(shard_mb=0.05))
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert (index["__kind__"], index["wids_version"]) == ("wids-shard-index-v1", 1)
    row = 0
    for number, shard in enumerate(manifest.shards):
        path = manifest.path(shard)
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            assert [m.name.split(".", 1)[1] for m in members] == ["audio.npy", "json", "label.npy", "visual.npy"] * (
                shard.nsamples
            )
            for m in members:
                assert (m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) == (0, 0, 0, "", "", 0o444)
                assert m.type == tarfile.REGTYPE
                assert not m.pax_headers
            for start in range(0, len(members), 4):
                sample = manifest.samples[row]
                assert len({m.name.split(".", 1)[0] for m in members[start : start + 4]}) == 1
                assert sample["shard"] == number
                for member in members[start : start + 4]:
                    key, _, name = member.name.partition(".")
                    assert sample["key"].decode() == key
                    data = tar.extractfile(member).read()  # type: ignore[union-attr]
                    offset = member.offset_data
                    if name.endswith(".npy"):
                        name = name.removesuffix(".npy")
                        payload = np.load(io.BytesIO(data)).tobytes()
                        assert len(payload) == manifest.fields[name].nbytes
                        offset += len(data) - len(payload)
                        data = payload
                    else:
                        assert sample["json_size"] == len(data)
                        assert sample["category"] == json.loads(data)["category"]
                    assert sample[name] == offset
                    assert path.read_bytes()[offset : offset + len(data)] == data
                    assert sample[f"{name}_crc"] == crc32c(data)
                row += 1
    assert row == len(manifest.samples) == 12


def test_hash_of_crc_is_the_known_one() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720's check value: keeps the oracle above honest


def test_same_input_seed_and_options_give_the_same_bytes(tmp_path: Path) -> None:
    write_ave(tmp_path / "source")
    options = PackOptions(shard_mb=0.05)
    for name in ("a", "b"):
        packed(tmp_path / name / "out", "ave-h5", tmp_path / "source", options)
    packed(tmp_path / "c" / "out", "ave-h5", tmp_path / "source", replace(options, seed=1))
    a, b, c = (files_under(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert a["out/train-000000.tar"] != c["out/train-000000.tar"]


entries = st.lists(st.sampled_from(["train", "val", "test"]), min_size=1, max_size=200)


@settings(max_examples=100, deadline=None)
@given(splits=entries, shard_mb=st.floats(1e-3, 0.1), seed=st.integers(0, 5))
def test_the_plan_holds_every_video_once(splits: list[str], shard_mb: float, seed: int) -> None:
    fields = {"visual": Field("<f2", (10, 7, 7, 2)), "audio": Field("<f4", (10, 4)), "label": Field("|u1", (10,))}
    videos = [Entry(row, f"v{row}", split, 0) for row, split in enumerate(splits)]
    plans = plan_shards(videos, fields, PackOptions(shard_mb=shard_mb, seed=seed))
    assert sorted(e.row for p in plans for e in p.entries) == list(range(len(splits)))
    assert all(e.split == p.split for p in plans for e in p.entries)
    assert [p.split for p in plans] == sorted((p.split for p in plans), key=["train", "val", "test"].index)
    assert len({p.name for p in plans}) == len(plans)
    for split in set(splits):
        counts = [len(p.entries) for p in plans if p.split == split]
        assert max(counts) - min(counts) <= 1


def test_the_shuffle_is_pinned() -> None:
    fields = {"visual": Field("<f2", (1, 7, 7, 1)), "audio": Field("<f4", (1, 1)), "label": Field("|u1", (1,))}
    videos = [Entry(row, f"v{row}", "train", 0) for row in range(12)]
    (only,) = plan_shards(videos, fields, PackOptions(seed=0))
    # Shards packed years apart, by other library versions, hold the same samples.
    assert [e.row for e in only.entries] == [0, 3, 11, 4, 9, 6, 5, 1, 7, 8, 2, 10]


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("damage")
    write_ave(folder / "source", 8)
    return packed(folder / "out", "ave-h5", folder / "source")


def damaged_copy(undamaged: Manifest, tmp_path: Path, data: bytes) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir(exist_ok=True)
    for path in undamaged.folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / undamaged.shards[0].url).write_bytes(data)
    return copy


def test_every_flipped_byte_is_found_and_placed(undamaged: Manifest, tmp_path: Path) -> None:
    good = undamaged.path(undamaged.shards[0]).read_bytes()
    assert verify(undamaged.folder).fingerprint == undamaged.fingerprint
    places: dict[int, str] = {}  # what is at some bytes: everything up to the second sample, then a stride
    with tarfile.open(fileobj=io.BytesIO(good)) as tar:
        for m in tar.getmembers():
            places |= {m.offset + i: "header" for i in (0, 100, 124, 148, 156, 257, 345, 511)}
            places |= {m.offset_data + i: m.name for i in (0, 8, 60, m.size // 2, m.size - 1) if i < m.size}
            if m.size % 512:
                places[m.offset_data + m.size] = "padding"
    places |= {len(good) - i: "end" for i in (1, 512, 1024)}
    rows = undamaged.samples[: undamaged.shards[0].nsamples]
    for place, what in places.items():
        bad = bytearray(good)
        bad[place] ^= 0x10
        with pytest.raises(DataError) as error:
            verify(damaged_copy(undamaged, tmp_path, bytes(bad)))
        text = str(error.value)
        assert undamaged.shards[0].url in text
        payload = [
            (row["key"].decode(), name)
            for row in rows
            for name, size in (*((n, f.nbytes) for n, f in undamaged.fields.items()), ("json", row["json_size"]))
            if row[name] <= place < row[name] + size
        ]
        for key, name in payload:  # the sample's own bytes: named to the field
            assert f"{name} of sample {key} is damaged" in text, what


def test_every_cut_is_found(undamaged: Manifest, tmp_path: Path) -> None:
    good = undamaged.path(undamaged.shards[0]).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(good)) as tar:
        ends = [m.offset_data + m.size for m in tar.getmembers()]
        starts = [m.offset for m in tar.getmembers()]
    for cut in {0, 1, 511, 512, *starts, *ends, *(e + 100 for e in ends), len(good) - 512, len(good) - 1}:
        with pytest.raises(DataError, match=rf"{undamaged.shards[0].url}: shard is {cut} bytes long, not {len(good)}"):
            verify(damaged_copy(undamaged, tmp_path, good[:cut]))
        # The strict reader finds it without knowing the length, too (a tar may lack what pads it to 10 kB).
        path = tmp_path / "cut.tar"
        path.write_bytes(good[:cut])
        if good[cut:].strip(b"\0") or cut < max(ends) + 1024:
            with pytest.raises(DataError, match=r"cut\.tar: byte \d+: "):
                index_shard(path)


def test_interleaved_and_partial_samples_are_refused(undamaged: Manifest, tmp_path: Path) -> None:
    with tarfile.open(undamaged.path(undamaged.shards[0])) as tar:
        members = [(m, tar.extractfile(m).read()) for m in tar.getmembers()]  # type: ignore[union-attr]

    def rewritten(order: list[int]) -> Path:
        path = tmp_path / "other.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in order:
                tar.addfile(members[i][0], io.BytesIO(members[i][1]))
        return path

    assert len(index_shard(rewritten(list(range(8)))).rows) == 2
    for order in ([0, 1, 2, 4, 5, 6, 3, 7], [0, 1, 2], [0, 1, 3], [1, 2, 3], [0, 1, 1, 2, 3], [0, 4, 1, 5, 2, 6, 3, 7]):
        with pytest.raises(DataError, match=r"incomplete|is there twice"):
            index_shard(rewritten(order))
    with pytest.raises(DataError, match="no samples"):
        index_shard(rewritten([]))


def test_labels_are_checked(tmp_path: Path) -> None:
    source = tmp_path / "source"
    data = write_ave(source)
    labels = one_hot(data)
    labels[3, 2] = 0  # no class, no background
    labels[4, 0], labels[4, 1] = [1, 0, 0, 0], [0, 1, 0, 0]  # two classes
    labels[6, 5, 0] = 0.5
    write_h5(source / "right_labels.h5", labels)
    opened = open_source(SourceOptions("ave-h5", source=source))
    assert [p.split(":")[0] for p in opened.problems] == [f"video {video_id(r)} (row {r})" for r in (3, 4, 6)]
    with pytest.raises(DataError, match="3 problems in the source") as error:
        pack(opened, tmp_path / "out", PackOptions())
    assert "events of several classes: [0, 1]" in str(error.value)
    assert list(tmp_path.iterdir()) == [source]
