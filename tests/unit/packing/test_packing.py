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
from hypothesis import given
from hypothesis import strategies as st

from cpsp_dist.cli import main
from cpsp_dist.data.manifest import Field, Manifest
from cpsp_dist.data.reader import EvalStream, TrainStream
from cpsp_dist.packing import LAYOUTS
from cpsp_dist.packing.plan import PackOptions, plan_shards
from cpsp_dist.packing.source import Entry
from tests.support.environment import DATA
from tests.support.examples import examples
from tests.support.folders import files_under
from tests.support.packed import packed
from tests.support.packing_sources import (
    CATEGORIES,
    WRITERS,
    read_back,
    split_of,
    video_id,
    write_ave,
)


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


@examples(100)
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
