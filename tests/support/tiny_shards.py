"""Small shards for the reader's tests, written by plain webdataset and indexed by plain tarfile."""

from __future__ import annotations

import hashlib
import io
import itertools
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import webdataset

from cpsp_dist.data.batch import Batch
from cpsp_dist.data.manifest import ARRAY_FIELDS, SAMPLE, Field, Manifest, Shard
from cpsp_dist.data.reader import permutation


@dataclass
class Written:
    """A folder of shards and the arrays that went into it, by row of the sample table."""

    folder: Path
    arrays: list[dict[str, np.ndarray]]

    @property
    def manifest(self) -> Manifest:
        return Manifest.load(self.folder)


def write_shards(
    folder: Path, splits: dict[str, list[int]], *, segments: int = 3, channels: int = 2, audio: int = 5, seed: int = 0
) -> Written:
    """`splits`: name -> samples of each of its shards. Random features; float16 visual."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    fields = {
        "visual": Field("<f2", (segments, 7, 7, channels)),
        "audio": Field("<f4", (segments, audio)),
        "label": Field("|u1", (segments,)),
    }
    shards: list[Shard] = []
    arrays: list[dict[str, np.ndarray]] = []
    rows: list[tuple] = []
    for split, sizes in splits.items():
        for number, size in enumerate(sizes):
            path = folder / f"{split}-{number:04d}.tar"
            first = len(arrays)
            with webdataset.TarWriter(str(path), encoder=False, mtime=0) as writer:
                for _ in range(size):
                    sample = {
                        "visual": random.standard_normal(fields["visual"].shape).astype(np.float16),
                        "audio": random.standard_normal(fields["audio"].shape).astype(np.float32),
                        "label": random.integers(0, 2, segments).astype(np.uint8),
                    }
                    members = {f"{name}.npy": _npy(array) for name, array in sample.items()}
                    writer.write({"__key__": f"{split}{len(arrays):06d}", "json": b"{}", **members})
                    arrays.append(sample)
            rows += _index(path, len(shards))
            content = path.read_bytes()
            shards.append(Shard(path.name, split, first, size, len(content), hashlib.sha256(content).hexdigest()))
    Manifest(folder, fields, ["a", "b", "c"], shards, np.array(rows, dtype=SAMPLE)).save()
    return Written(folder, arrays)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _index(path: Path, number: int) -> list[tuple]:
    """Rows of the sample table of one shard, as an outsider finds them: by tarfile and numpy's header reader."""
    found: dict[str, dict[str, tuple[int, bytes]]] = {}
    with tarfile.open(path) as tar:
        for member in tar.getmembers():
            key, _, extension = member.name.partition(".")
            content = tar.extractfile(member).read()
            skip = 0
            if extension.endswith("npy"):
                buffer = io.BytesIO(content)
                np.lib.format.read_magic(buffer)
                np.lib.format.read_array_header_1_0(buffer)
                skip = buffer.tell()
            found.setdefault(key, {})[extension.removesuffix(".npy")] = (member.offset_data + skip, content[skip:])
    rows = []
    for count, (key, members) in enumerate(found.items()):
        names = (*ARRAY_FIELDS, "json")
        offsets = [members[name][0] for name in names]
        crcs = [google_crc32c.value(members[name][1]) for name in names]
        events = sum(members["label"][1])
        category = count % 3 if events else -1
        rows.append(
            (number, *offsets, len(members["json"][1]), *crcs, category, events, 1000 * number + count, key.encode())
        )
    return rows


def real_rows(batch: Batch) -> list[int]:
    return batch.index[batch.valid].tolist()


def assert_as_written(batch: Batch, written: Written) -> None:
    table = written.manifest.samples
    for slot, row in enumerate(batch.index.tolist()):
        if not batch.valid[slot]:
            assert not any(t[slot].any() for t in (batch.visual, batch.audio, batch.event))
            continue
        arrays = written.arrays[row]
        assert np.array_equal(batch.visual[slot].numpy(), arrays["visual"])
        assert np.array_equal(batch.audio[slot].numpy(), arrays["audio"])
        assert np.array_equal(batch.event[slot].numpy(), arrays["label"] == 1)
        assert int(batch.category[slot]) == table[row]["category"]
        assert int(batch.video[slot]) == table[row]["video"]


def endless(n: int, seed: int, first: int, count: int) -> list[int]:
    """The oracle: rows at positions [first, first + count) of all epochs, one after the other."""
    return endless_of(lambda epoch: permutation(n, seed, epoch)(np.arange(n)).tolist(), first, count)


def endless_of(rows_of_epoch: Callable[[int], list[int]], first: int, count: int) -> list[int]:
    rows: list[int] = []
    for epoch in itertools.count():
        if len(rows) >= first + count:
            return rows[first : first + count]
        rows += rows_of_epoch(epoch)
    raise AssertionError
