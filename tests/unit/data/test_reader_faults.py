"""Damaged, vanished and slow shards, at their batch."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cpsp_dist.data.manifest import ARRAY_FIELDS
from cpsp_dist.data.reader import EvalStream, ReaderOptions, TrainStream
from cpsp_dist.data.reader import files as stream_files
from cpsp_dist.data.reader import ring as stream_ring
from cpsp_dist.utils.errors import DataError
from tests.support.tiny_shards import Written, assert_as_written, endless
from tests.support.tiny_shards import real_rows as real


def flip(written: Written, row: int, field: str, byte: int = 0) -> tuple[Path, int]:
    """Damage one byte of an array; the shard and where the array starts."""
    sample = written.manifest.samples[row]
    path = written.folder / written.manifest.shards[sample["shard"]].url
    offset = int(sample[field])
    with open(path, "r+b") as file:
        file.seek(offset + byte)
        value = file.read(1)[0]
        file.seek(offset + byte)
        file.write(bytes([value ^ 1]))
    return path, offset


@pytest.mark.parametrize("field", ARRAY_FIELDS)
def test_a_flipped_byte_is_an_error_at_its_batch_naming_shard_sample_and_offset(copied, field):
    manifest = copied.manifest
    bad = endless(22, 3, 0, 22)[10]  # in the third batch of 4
    path, offset = flip(copied, bad, field, manifest.fields[field].nbytes - 1)
    with TrainStream(manifest, "train", global_batch=4, seed=3, options=ReaderOptions(threads=2)) as stream:
        batches = stream.batches()
        assert real(next(batches)) + real(next(batches)) == endless(22, 3, 0, 8)
        with pytest.raises(DataError) as caught:
            next(batches)
    key = manifest.samples[bad]["key"].decode()
    assert str(caught.value).startswith(f"{path}: sample '{key}', field {field} at byte {offset}: ")
    assert "\n" not in str(caught.value)


def test_unchecked_the_flipped_byte_would_be_delivered(copied):
    """So it is the check that finds it."""
    flip(copied, 0, "visual")
    with TrainStream(
        copied.manifest, "train", global_batch=22, seed=3, options=ReaderOptions(check_crc=False)
    ) as stream:
        batch = next(stream.batches())
        slot = batch.index.tolist().index(0)
        assert not np.array_equal(batch.visual[slot].numpy(), copied.arrays[0]["visual"])


@pytest.mark.parametrize(("threads", "depth"), [(1, 1), (3, 4)])
def test_skipping_keeps_the_slot_blank_and_counts_at_delivery(copied, threads, depth):
    bad = set(endless(22, 3, 5, 3))
    for row in bad:
        flip(copied, row, "audio")
    with TrainStream(
        copied.manifest,
        "train",
        global_batch=4,
        seed=3,
        options=ReaderOptions(on_error="skip", threads=threads, depth=depth),
    ) as stream:
        counts, rows = [], []
        for batch in stream.batches(count=11):
            assert len(batch) == 4
            for slot, row in enumerate(batch.index.tolist()):
                assert bool(batch.valid[slot]) == (row not in bad)
            assert_as_written(batch, copied)  # blank where not valid
            counts.append(stream.skipped)
            rows += batch.index.tolist()
    assert rows == endless(22, 3, 0, 44)
    assert counts == [sum(row in bad for row in rows[: 4 * (i + 1)]) for i in range(11)]
    assert counts[-1] == 6


def test_skipping_stops_past_its_budget(copied):
    for row in endless(22, 3, 0, 22)[::7]:  # positions 0, 7, 14, 21
        flip(copied, row, "visual")
    with TrainStream(
        copied.manifest, "train", global_batch=1, seed=3, options=ReaderOptions(on_error="skip", skip_budget=2)
    ) as stream:
        batches = stream.batches()
        assert [int(batch.index) for batch in itertools.islice(batches, 14)] == endless(22, 3, 0, 14)
        assert stream.skipped == 2
        with pytest.raises(DataError, match="damaged sample 3, and skip_budget is 2"):
            next(batches)


def test_skipping_is_reported(copied, caplog):
    path, _ = flip(copied, 0, "label")
    with EvalStream(copied.manifest, "train", batch=4, options=ReaderOptions(on_error="skip")) as stream:
        assert sum(int(batch.valid.sum()) for batch in stream) == 21
    assert [record.message for record in caplog.records if str(path) in record.message]


def test_a_shard_cut_short_while_it_is_open_is_an_error(copied):
    """With `access="read"`; a mapping would end the process, which is why network file systems are not mapped."""
    manifest = copied.manifest
    with TrainStream(manifest, "train", global_batch=22, seed=0, options=ReaderOptions(access="read")) as stream:
        batches = stream.batches(count=1)
        for shard in range(4):
            stream._files[shard]
        path = manifest.path(manifest.shards[3])
        with open(path, "r+b") as file:
            file.truncate(manifest.shards[3].filesize // 2)
        with pytest.raises(DataError, match=f"{path}: sample .*: the shard ends at byte"):
            next(batches)


def test_a_disk_error_names_the_sample_and_can_be_skipped(written, monkeypatch):
    preadv = os.preadv
    bad = written.manifest.samples[5]

    def failing(fd, buffers, offset):
        if offset == bad["visual"] and os.readlink(f"/proc/self/fd/{fd}").endswith("train-0001.tar"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    with (
        EvalStream(written.manifest, "train", batch=22, options=ReaderOptions(access="read")) as stream,
        pytest.raises(DataError, match=f"train-0001.tar: sample '{bad['key'].decode()}', field visual .*error"),
    ):
        next(iter(stream))
    with EvalStream(
        written.manifest, "train", batch=22, options=ReaderOptions(access="read", on_error="skip")
    ) as stream:
        assert real(next(iter(stream))) == [row for row in range(22) if row != 5]


def test_short_reads_are_continued(written, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:7]], offset))
    with EvalStream(written.manifest, "val", batch=3, options=ReaderOptions(access="read")) as stream:
        for batch in stream:
            assert_as_written(batch, written)


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/", "ext4"), ("/data/x", "nfs4"), ("/data/local/y", "xfs"), ("/with blank/z", "lustre"), ("/database", "ext4")],
)
def test_the_file_system_decides_how_shards_are_read(tmp_path, path, kind):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        "30 22 0:40 / /data rw,relatime shared:9 master:1 - nfs4 server:/export rw\n"
        "31 30 254:16 / /data/local rw - xfs /dev/vdb rw\n"
        "32 22 0:41 / /with\\040blank rw - lustre 10.0.0.1@tcp:/lfs rw\n"
    )
    assert stream_files.file_system(Path(path), mounts) == kind
    assert stream_files.file_system(Path(path), tmp_path / "not there") == ""


@pytest.mark.parametrize(("kind", "mapped"), [("ext4", True), ("nfs4", False), ("fuse.sshfs", False), ("", False)])
def test_network_file_systems_are_not_mapped(written, monkeypatch, kind, mapped):
    monkeypatch.setattr(stream_files, "file_system", lambda path: kind)
    assert stream_files.ShardFiles(written.manifest).mapped == mapped
    assert stream_files.ShardFiles(written.manifest, "map").mapped
    assert not stream_files.ShardFiles(written.manifest, "read").mapped


def test_a_shard_cut_short_after_the_start_is_an_error(copied):
    manifest = copied.manifest
    shard = manifest.path(manifest.shards[3])
    shard.write_bytes(shard.read_bytes()[:-2048])
    with (
        TrainStream(manifest, "train", global_batch=22, seed=0) as stream,
        pytest.raises(DataError, match=f"{shard}: shard is .* bytes long, not"),
    ):
        next(stream.batches())


def test_a_shard_that_vanished_is_an_error(copied):
    manifest = copied.manifest
    shard = manifest.path(manifest.shards[3])
    shard.unlink()
    with (
        TrainStream(manifest, "train", global_batch=22, seed=0) as stream,
        pytest.raises(DataError, match=f"{shard}: cannot open this shard: No such file"),
    ):
        next(stream.batches())


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [("visual", 10**9, "beyond the shard's end"), ("shard", 99, "names a shard that is not there")],
)
def test_a_table_that_points_nowhere_is_an_error(copied, column, value, message):
    manifest = copied.manifest
    samples = np.array(manifest.samples)
    samples[column][4] = value
    with (
        TrainStream(replace(manifest, samples=samples), "train", global_batch=22, seed=0) as stream,
        pytest.raises(DataError, match=message),
    ):
        next(stream.batches())


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_failing_reader_thread_reaches_the_consumer(written, monkeypatch, threads, on_error):
    """Also what nobody foresaw; and nothing hangs."""
    manifest = written.manifest
    unlucky = manifest.samples[endless(22, 0, 0, 22)[9]]
    path = str(manifest.path(manifest.shards[unlucky["shard"]]))
    read = stream_files.ShardFile.read

    def failing(self, into, offset):
        if (self.path, offset) == (path, unlucky["audio"]):
            raise MemoryError("nobody foresaw this")
        read(self, into, offset)

    monkeypatch.setattr(stream_files.ShardFile, "read", failing)
    before = set(threading.enumerate())
    with TrainStream(
        manifest, "train", global_batch=4, seed=0, options=ReaderOptions(threads=threads, on_error=on_error)
    ) as stream:
        batches = stream.batches()
        assert real(next(batches)) + real(next(batches)) == endless(22, 0, 0, 8)
        with pytest.raises(MemoryError, match="nobody foresaw this"):
            next(batches)
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize("threads", [1, 3])
def test_a_failure_in_the_order_reaches_the_consumer(written, monkeypatch, threads):
    def plans(self, position):
        yield np.arange(4)
        raise MemoryError("nobody foresaw this")

    monkeypatch.setattr(TrainStream, "_plans", plans)
    with (
        TrainStream(
            written.manifest, "train", global_batch=4, seed=0, options=ReaderOptions(threads=threads)
        ) as stream,
        pytest.raises(MemoryError, match="nobody foresaw this"),
    ):
        list(stream.batches())


def test_a_disk_that_does_not_answer_is_given_up(written, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(stream_files.ShardFile, "read", lambda self, into, offset: gate.wait(30))
    monkeypatch.setattr(stream_ring, "PATIENCE", 0.1)
    monkeypatch.setattr(stream_ring, "JOIN", 0.1)
    stream = TrainStream(written.manifest, "train", global_batch=4, seed=0)
    with pytest.raises(DataError, match="no data for"):
        next(stream.batches())
    gate.set()
    stream.close()
