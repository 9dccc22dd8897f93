"""Thousands of single-byte flips and truncations of a shard: found by the reader, or harmless; nothing else.

Harmless means that every array is delivered as it was written. Only bytes that hold no array may be harmless.
"""

from __future__ import annotations

import io
import itertools
import os
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cpsp_dist.data.manifest import TABLE_NAME, Manifest
from cpsp_dist.data.reader import EvalStream, ReaderOptions
from cpsp_dist.utils.errors import DataError
from tests.support.tiny_shards import Written, write_shards

#: Flips of each kind of place that holds no array; every byte of every array is flipped.
FLIPS = 400


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Written:
    return write_shards(tmp_path_factory.mktemp("original"), {"train": [6]}, segments=2, channels=1)


@pytest.fixture
def damaged(written, tmp_path) -> Written:
    shutil.copytree(written.folder, tmp_path / "damaged")
    return Written(tmp_path / "damaged", written.arrays)


def places(shard: Path) -> dict[str, list[int]]:
    """Every byte of a shard, by what it is part of."""
    found: dict[str, list[int]] = {
        "tar header": [],
        "npy header": [],
        "array": [],
        "json": [],
        "padding": [],
        "end": [],
    }
    end = 0
    with tarfile.open(shard) as tar:
        for member in tar.getmembers():
            start = member.offset_data
            found["tar header"] += range(member.offset, start)
            content = tar.extractfile(member).read()
            header = 0
            if member.name.endswith(".npy"):
                buffer = io.BytesIO(content)
                np.lib.format.read_magic(buffer)
                np.lib.format.read_array_header_1_0(buffer)
                header = buffer.tell()
            found["npy header"] += range(start, start + header)
            found["json" if header == 0 else "array"] += range(start + header, start + member.size)
            end = start + -(-member.size // 512) * 512
            found["padding"] += range(start + member.size, end)
    found["end"] += range(end, shard.stat().st_size)
    assert sum(map(len, found.values())) == shard.stat().st_size
    return found


def reader(written: Written, access: str) -> EvalStream:
    options = ReaderOptions(threads=1, depth=1, access=access)
    return EvalStream(Manifest.load(written.folder), "train", batch=6, options=options)


def delivers(stream: EvalStream, written: Written) -> bool:
    """Whether one more pass delivers every sample, each as it was written; False where it raises. Else the test
    fails."""
    seen = []
    try:
        for batch in stream:
            for slot, row in enumerate(batch.index.tolist()):
                arrays = written.arrays[row]
                assert np.array_equal(batch.visual[slot].numpy(), arrays["visual"])
                assert np.array_equal(batch.audio[slot].numpy(), arrays["audio"])
                assert np.array_equal(batch.event[slot].numpy(), arrays["label"] == 1)
                seen.append(row)
    except DataError:
        return False
    assert seen == list(range(6))
    return True


def delivered(written: Written, access: str) -> bool:
    """The same of a new reader."""
    with reader(written, access) as stream:
        return delivers(stream, written)


@pytest.mark.parametrize("access", ["map", pytest.param("read", marks=pytest.mark.long)])
def test_every_flip_of_an_array_is_found_and_every_other_flip_is_harmless(damaged, access):
    """By one reader, pass after pass: a new one for each flip takes three times as long."""
    assert delivered(damaged, access)
    shard = damaged.folder / "train-0000.tar"
    random = np.random.default_rng(0)
    outcomes: Counter[tuple[str, bool]] = Counter()
    with reader(damaged, access) as stream, open(shard, "r+b", buffering=0) as file:
        for place, where in places(shard).items():
            count = len(where) if place == "array" else min(len(where), FLIPS)
            for offset in random.choice(where, count, replace=False).tolist():
                file.seek(offset)
                original = file.read(1)[0]
                file.seek(offset)
                file.write(bytes([original ^ int(random.integers(1, 256))]))
                outcomes[place, delivers(stream, damaged)] += 1
                file.seek(offset)
                file.write(bytes([original]))
    assert delivered(damaged, access)
    assert {place for place, found in outcomes if not found} == {"array"}
    assert {place for place, found in outcomes if found} == {"tar header", "npy header", "json", "padding", "end"}
    assert sum(outcomes.values()) > 3000


def test_every_truncation_is_found(damaged):
    """At every kind of place, to the byte around each border; also a shard that grew."""
    shard = damaged.folder / "train-0000.tar"
    content = shard.read_bytes()
    random = np.random.default_rng(0)
    lengths = set(itertools.chain.from_iterable(random.choice(where, 100).tolist() for where in places(shard).values()))
    for where in places(shard).values():
        lengths |= {where[0] - 1, where[0], where[0] + 1, where[-1]} - {-1}
    for length in [*sorted(lengths), len(content) + 1, len(content) + 512]:
        shard.write_bytes((content + bytes(512))[:length])
        with pytest.raises(DataError, match=f"{shard}: shard is {length} bytes long, not {len(content)}"):
            Manifest.load(damaged.folder)
    shard.write_bytes(content)
    assert delivered(damaged, "map")


def test_every_flip_of_the_sample_table_is_found(damaged):
    """It holds what no array's checksum covers: the categories, and which videos are one."""
    table = damaged.folder / TABLE_NAME
    content = bytearray(table.read_bytes())
    for offset in range(0, len(content), 3):
        content[offset] ^= 1 << offset % 8
        table.write_bytes(content)
        with pytest.raises(DataError, match="not the table that was packed"):
            Manifest.load(damaged.folder)
        content[offset] ^= 1 << offset % 8
    table.write_bytes(content)
    assert delivered(damaged, "map")


def test_a_sample_table_of_a_terabyte_is_not_read(damaged):
    """It would take hours. The file has holes, and no bytes on the disk."""
    table = damaged.folder / TABLE_NAME
    content = table.read_bytes()
    os.truncate(table, 1 << 40)
    with pytest.raises(DataError, match=r"not the table that was packed \(1,099,511,627,776 bytes are too many\)"):
        Manifest.load(damaged.folder)
    table.write_bytes(content)


def test_exchanged_samples_are_found(damaged):
    """Complete arrays in another sample's place, as a faulty copy leaves them: right bytes, wrong sample."""
    shard = damaged.folder / "train-0000.tar"
    manifest = Manifest.load(damaged.folder)
    for field in ("visual", "audio"):
        content = bytearray(shard.read_bytes())
        original = bytes(content)
        size = manifest.fields[field].nbytes
        first, second = (int(manifest.samples[row][field]) for row in (1, 4))
        content[first : first + size], content[second : second + size] = (
            content[second : second + size],
            content[first : first + size],
        )
        shard.write_bytes(content)
        assert not delivered(damaged, "map")
        shard.write_bytes(original)
    assert delivered(damaged, "map")


def test_a_block_of_zeros_is_found(damaged):
    """What a lost write leaves behind."""
    shard = damaged.folder / "train-0000.tar"
    content = shard.read_bytes()
    for start in range(0, len(content), 512):
        shard.write_bytes(content[:start] + bytes(512) + content[start + 512 :])
        arrays = set(places_of_arrays(damaged)) & set(range(start, start + 512))
        changed = any(content[byte] for byte in arrays)
        assert delivered(damaged, "map") != changed


def places_of_arrays(written: Written) -> list[int]:
    manifest = Manifest.load(written.folder)
    return [
        byte
        for row in manifest.samples
        for name, field in manifest.fields.items()
        for byte in range(int(row[name]), int(row[name]) + field.nbytes)
    ]
