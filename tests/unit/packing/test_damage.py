"""Damaged shards: every flipped byte and every cut is found and placed."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from cpsp_dist.data.manifest import Manifest
from cpsp_dist.packing.index import index_shard
from cpsp_dist.packing.pack import pack
from cpsp_dist.packing.plan import PackOptions
from cpsp_dist.packing.source import SourceOptions, open_source
from cpsp_dist.packing.verify import verify
from cpsp_dist.utils.errors import DataError
from tests.support.packed import packed
from tests.support.packing_sources import (
    one_hot,
    video_id,
    write_ave,
    write_h5,
)


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


def test_a_terabyte_of_zeros_is_not_read(undamaged: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "long.tar"
    path.write_bytes(undamaged.path(undamaged.shards[0]).read_bytes())
    os.truncate(path, 1 << 20)  # by what tar may fill up its last record
    assert len(index_shard(path).rows) == undamaged.shards[0].nsamples
    os.truncate(path, 1 << 40)
    with pytest.raises(DataError, match=r"long\.tar: byte \d+: more than [\d,]+ zero bytes at its end"):
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
