"""The streaming reader on real tars: every sample once, the same batches whatever the world, nothing damaged delivered.

The oracle is plain: all orders of all epochs as one list, cut into global batches.
"""

from __future__ import annotations

import errno
import gc
import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from cpsp_dist.data.manifest import ARRAY_FIELDS, Field, Manifest
from cpsp_dist.data.reader import EvalStream, ReaderOptions, TrainStream, permutation
from cpsp_dist.data.reader import files as stream_files
from cpsp_dist.data.reader import ring as stream_ring
from cpsp_dist.data.reader.order import Interleaved
from cpsp_dist.errors import DataError
from tests.support.tiny_shards import Written, assert_as_written, write_shards
from tests.support.tiny_shards import real_rows as real

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Shards by their sizes, written once: `folders(train=[5, 7], val=[3])`."""
    made: dict[str, Written] = {}

    def get(**splits: list[int]) -> Written:
        name = "-".join([split + "_".join(map(str, sizes)) for split, sizes in splits.items()])
        if name not in made:
            made[name] = write_shards(tmp_path_factory.mktemp("shards") / name, splits)
        return made[name]

    return get


@pytest.fixture
def written(folders) -> Written:
    """22 samples for training, in four shards."""
    return folders(train=[5, 7, 1, 9], val=[3, 4])


@pytest.fixture
def copied(written, tmp_path) -> Written:
    """The same in a folder of its own, to be damaged."""
    shutil.copytree(written.folder, tmp_path / "shards")
    return replace(written, folder=tmp_path / "shards")


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


# ---------------------------------------------------------------------------------------------------------------------
# Every sample once, the same batches


@settings(max_examples=40, deadline=None)
@given(
    sizes=SIZES,
    seed=st.integers(0, 1000),
    threads=st.integers(1, 4),
    depth=st.integers(1, 4),
    position=st.integers(0, 200),
    access=st.sampled_from(["map", "read"]),
    data=st.data(),
)
def test_delivers_the_order_from_any_position_with_the_arrays_as_written(
    folders, sizes, seed, threads, depth, position, access, data
):
    """Resuming, straddled epochs, threads and depth at once: always what the oracle says."""
    written = folders(train=sizes)
    n = sum(sizes)
    batch_size = data.draw(st.integers(1, n))
    steps = 2 * n // batch_size + 2
    with TrainStream(
        written.manifest,
        "train",
        global_batch=batch_size,
        seed=seed,
        options=ReaderOptions(threads=threads, depth=depth, access=access),
    ) as stream:
        assert stream.samples == n
        got = []
        for batch in itertools.islice(stream.batches(position), steps):
            assert batch.valid.all()
            assert_as_written(batch, written)
            got.append(real(batch))
    wanted = endless(n, seed, position, steps * batch_size)
    assert got == [wanted[i : i + batch_size] for i in range(0, len(wanted), batch_size)]


def test_each_sample_comes_once_an_epoch(written):
    with TrainStream(written.manifest, "train", global_batch=8, seed=4) as stream:
        rows = [row for batch in stream.batches(count=22) for row in real(batch)]
    epochs = [rows[i : i + 22] for i in range(0, len(rows), 22)]
    assert len(epochs) == 8
    assert all(sorted(epoch) == list(range(22)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 8


@settings(max_examples=25, deadline=None)
@given(sizes=SIZES, worlds=st.lists(st.integers(1, 6), min_size=1, max_size=6), data=st.data())
def test_the_world_may_change_at_every_step(folders, sizes, worlds, data):
    written = folders(train=sizes)
    n = sum(sizes)
    batch_size = data.draw(st.integers(1, n))
    position = data.draw(st.integers(0, 3 * n))
    for world in worlds:
        rows, slots = [], set()
        for rank in range(world):
            with TrainStream(
                written.manifest, "train", global_batch=batch_size, seed=9, rank=rank, world=world
            ) as stream:
                batch = next(stream.batches(position))
                assert_as_written(batch, written)
                rows += real(batch)
                slots.add(len(batch))
        assert rows == endless(n, 9, position, batch_size)
        assert slots == {-(-batch_size // world)}
        position += batch_size


@settings(max_examples=40, deadline=None)
@given(
    sizes=SIZES,
    worlds=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    order=st.sampled_from(["full", "interleaved"]),
    epoch_end=st.sampled_from(["carry", "drop", "pad"]),
    data=st.data(),
)
def test_every_order_and_epoch_end_gives_its_global_batches_once_in_any_world(
    folders, sizes, worlds, order, epoch_end, data
):
    written = folders(train=sizes)
    n = sum(sizes)
    accumulation = data.draw(st.integers(1, min(n, 3)))
    batch_size = accumulation * data.draw(st.integers(1, n // accumulation + (2 if epoch_end == "pad" else 0)))
    position = batch_size * data.draw(st.integers(0, 5))

    def rows_of_epoch(epoch: int) -> list[int]:
        make = Interleaved(sizes, 5, epoch) if order == "interleaved" else permutation(n, 5, epoch)
        rows = make(np.arange(n)).tolist()
        if epoch_end == "drop":
            return rows[: n // batch_size * batch_size]
        return rows + [-1] * (-n % batch_size if epoch_end == "pad" else 0)

    for world in worlds:
        streams = [
            TrainStream(
                written.manifest,
                "train",
                global_batch=batch_size,
                seed=5,
                rank=rank,
                world=world,
                accumulation=accumulation,
                options=ReaderOptions(order=order, epoch_end=epoch_end),
            )
            for rank in range(world)
        ]
        iterators = [stream.batches(position, count=accumulation) for stream in streams]
        micro = batch_size // accumulation
        for part in range(accumulation):
            rows = []
            for iterator in iterators:
                batch = next(iterator)
                assert_as_written(batch, written)
                rows += real(batch)
            wanted = [row for row in endless_of(rows_of_epoch, position + part * micro, micro) if row >= 0]
            assert sorted(rows) == sorted(wanted)
            if order == "full":
                assert rows == wanted
        for stream in streams:
            stream.close()
        position += batch_size


def test_padding_fills_an_epochs_last_batch_with_nothing(written):
    with TrainStream(
        written.manifest, "train", global_batch=8, seed=0, options=ReaderOptions(epoch_end="pad")
    ) as stream:
        batches = [(real(batch), batch.valid.tolist()) for batch in stream.batches(count=6)]
    assert [len(rows) for rows, _ in batches] == [8, 8, 6, 8, 8, 6]
    assert batches[2][1] == [True] * 6 + [False] * 2
    for epoch in (batches[:3], batches[3:]):
        assert sorted(row for rows, _ in epoch for row in rows) == list(range(22))


def test_with_lanes_a_rank_stays_with_its_shards(folders):
    """64 shards, 64 lanes, 8 ranks: each rank opens its lanes' shards, not all of them."""
    written = folders(train=[4] * 64)
    table = written.manifest.samples
    opened = []
    for rank in range(8):
        with TrainStream(
            written.manifest,
            "train",
            global_batch=64,
            seed=1,
            rank=rank,
            world=8,
            options=ReaderOptions(order="interleaved"),
        ) as stream:
            rows = [row for batch in stream.batches(count=4) for row in real(batch)]
        opened.append({int(shard) for shard in table["shard"][rows]})
    assert [len(shards) for shards in opened] == [8] * 8
    assert set().union(*opened) == set(range(64))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_micro_batches_of_all_ranks_are_the_global_batch(written, world):
    streams = [
        TrainStream(written.manifest, "train", global_batch=12, accumulation=3, seed=2, rank=rank, world=world)
        for rank in range(world)
    ]
    iterators = [stream.batches(6) for stream in streams]
    for step in range(5):
        wanted = endless(22, 2, 6 + 12 * step, 12)
        for part in range(3):
            rows = [row for iterator in iterators for row in real(next(iterator))]
            assert rows == wanted[4 * part : 4 * part + 4]
    for stream in streams:
        stream.close()


def test_more_ranks_than_samples_of_a_batch(written):
    for rank in range(5):
        with TrainStream(written.manifest, "train", global_batch=3, seed=0, rank=rank, world=5) as stream:
            batches = [(len(batch), int(batch.valid.sum())) for batch in stream.batches(count=4)]
        assert batches == [(1, (rank + 1) * 3 // 5 - rank * 3 // 5)] * 4


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, batch_size=st.integers(1, 20), world=st.integers(1, 5), threads=st.integers(1, 3))
def test_evaluation_counts_every_sample_once_in_equal_steps(folders, sizes, batch_size, world, threads):
    written = folders(train=[2], val=sizes)
    rows, steps, slots = [], set(), set()
    for rank in range(world):
        with EvalStream(
            written.manifest,
            "val",
            batch=batch_size,
            rank=rank,
            world=world,
            options=ReaderOptions(threads=threads, depth=2),
        ) as stream:
            seen = 0
            for batch in stream:
                assert_as_written(batch, written)
                assert (batch.index[~batch.valid] == -1).all()
                rows += real(batch)
                slots.add(len(batch))
                seen += 1
            steps.add(seen)
            assert seen == len(stream)
    assert sorted(rows) == list(range(2, 2 + sum(sizes)))
    assert len(steps) == len(slots) == 1


def test_evaluation_can_be_repeated(written):
    with EvalStream(written.manifest, "val", batch=4) as stream:
        passes = [[real(batch) for batch in stream] for _ in range(3)]
    assert passes[0] == passes[1] == passes[2] == [[22, 23, 24, 25], [26, 27, 28]]


def test_plain_webdataset_reads_the_same_arrays(written):
    by_key = {row["key"].decode(): number for number, row in enumerate(written.manifest.samples)}
    urls = [str(written.manifest.path(shard)) for shard in written.manifest.shards if shard.split == "train"]
    theirs = {by_key[sample["__key__"]]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False).decode()}
    with TrainStream(written.manifest, "train", global_batch=22, seed=0) as stream:
        batch = next(stream.batches())
        assert sorted(theirs) == sorted(real(batch))
        for slot, row in enumerate(real(batch)):
            assert np.array_equal(batch.visual[slot].numpy(), theirs[row]["visual.npy"])
            assert np.array_equal(batch.audio[slot].numpy(), theirs[row]["audio.npy"])
            assert np.array_equal(batch.event[slot].numpy(), theirs[row]["label.npy"] == 1)


# ---------------------------------------------------------------------------------------------------------------------
# The ring


def test_a_batch_stays_while_it_is_in_hand(written, monkeypatch):
    """With everything read ahead that may be, the batch in hand is untouched; so is the one after `close`."""
    filled = threading.Semaphore(0)
    fill = stream_ring.Ring._fill

    def counting(self, *args):
        result = fill(self, *args)
        filled.release()
        return result

    monkeypatch.setattr(stream_ring.Ring, "_fill", counting)
    stream = TrainStream(written.manifest, "train", global_batch=4, seed=0, options=ReaderOptions(threads=1, depth=3))
    batches = stream.batches()
    batch = next(batches)
    before = batch.visual.clone()
    for _ in range(4):  # the one in hand and three ahead, a fill each as there is one thread
        assert filled.acquire(timeout=20)
    assert torch.equal(batch.visual, before)
    stream.close()
    assert not filled.acquire(blocking=False)
    assert torch.equal(batch.visual, before)
    assert_as_written(batch, written)


def test_slots_are_reused(written):
    with TrainStream(written.manifest, "train", global_batch=4, seed=0, options=ReaderOptions(depth=3)) as stream:
        places = [batch.visual.data_ptr() for batch in stream.batches(count=20)]
    assert len(set(places)) == 4


def test_a_pinned_slot_is_not_refilled_while_it_is_copied_to_the_gpu(written, monkeypatch):
    """Without a GPU, by stand-ins for CUDA's events: copies to the GPU continue after the next batch is asked for."""
    asked, copied, with_device = threading.Semaphore(0), threading.Event(), set()

    class Copying:
        def __init__(self, blocking):
            assert blocking

        def record(self):
            pass

        def synchronize(self):
            assert threading.get_ident() in with_device, "else CUDA makes a context on GPU 0"
            asked.release()
            assert copied.wait(20)

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Copying)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: device == 3 and with_device.add(threading.get_ident()))
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))
    with TrainStream(
        written.manifest, "train", global_batch=4, seed=0, options=ReaderOptions(threads=1, depth=1, pin=True)
    ) as stream:
        batches = stream.batches()
        first = next(batches)
        rows, place, before = real(first), first.visual.data_ptr(), first.visual.clone()
        next(batches)
        assert asked.acquire(timeout=20)  # the reader wants to refill the first slot
        assert torch.equal(first.visual, before)
        copied.set()
        third = next(batches)
        assert third.visual.data_ptr() == place
        assert real(third) != rows
        assert_as_written(third, written)


def test_no_thread_outlives_its_iterator(written):
    before = set(threading.enumerate())
    stream = TrainStream(written.manifest, "train", global_batch=4, seed=0, options=ReaderOptions(threads=3))
    for batch in stream.batches():  # left by break
        assert len(batch) == 4
        break
    gc.collect()
    assert set(threading.enumerate()) == before
    iterator = stream.batches()
    next(iterator)
    assert len(set(threading.enumerate()) - before) == 3
    second = stream.batches()
    next(second)  # ends the first
    assert len(set(threading.enumerate()) - before) == 3
    with pytest.raises(RuntimeError, match="another position"):
        next(iterator)
    stream.close()
    assert set(threading.enumerate()) == before
    with pytest.raises(RuntimeError, match="closed"):
        next(second)
    list(EvalStream(written.manifest, "val", batch=2))  # a complete pass ends by itself
    assert set(threading.enumerate()) == before


def test_an_iterator_in_a_reference_cycle_is_closed_by_the_garbage_collector(written):
    before = set(threading.enumerate())
    holder: list = [TrainStream(written.manifest, "train", global_batch=4, seed=0).batches()]
    next(holder[0])
    holder.append(holder)
    del holder
    gc.collect()
    assert set(threading.enumerate()) == before


def test_waiting_is_counted(written, monkeypatch):
    gate = threading.Event()
    read = stream_files.ShardFile.read

    def slow(self, into, offset):
        assert gate.wait(20)
        read(self, into, offset)

    monkeypatch.setattr(stream_files.ShardFile, "read", slow)
    with TrainStream(written.manifest, "train", global_batch=4, seed=0) as stream:
        assert stream.wait_seconds == 0
        threading.Timer(0.2, gate.set).start()
        began = time.perf_counter()
        next(stream.batches())
        assert 0 < stream.wait_seconds <= time.perf_counter() - began


def test_more_shards_than_files_may_be_open(written, monkeypatch):
    monkeypatch.setattr(stream_files, "_allow_files", lambda wanted: 4)  # two shards of four
    with TrainStream(written.manifest, "train", global_batch=5, seed=0, options=ReaderOptions(threads=3)) as stream:
        for batch in stream.batches(count=30):
            assert_as_written(batch, written)
        assert len(stream._files._open) <= 2


def test_looks_ahead_less_while_everything_is_in_memory_and_fully_once_it_is_not(written, monkeypatch):
    asked, blocks = [], itertools.repeat(7)
    monkeypatch.setattr(stream_files.ShardFile, "advise", lambda self, start, end: asked.append((start, end)))
    monkeypatch.setattr(stream_files, "_blocks_read", lambda: next(blocks))
    manifest = written.manifest
    ahead = stream_files.LookAhead(stream_files.ShardFiles(manifest), manifest.fields)
    counts = []
    for number in range(10):
        if number == 8:
            blocks = itertools.count()  # now asking reads from the disk
        asked.clear()
        ahead.ask(manifest.samples[:16])
        counts.append(len(asked))
    assert counts == [16, 8, 4, 2, 1, 1, 1, 1, 1, 16]


def test_asking_covers_the_sample(written):
    """A sample's range starts at its first array and ends with its last one."""
    manifest = written.manifest
    for (shard, start, end), row in zip(
        stream_files.sample_ranges(manifest.samples, manifest.fields), manifest.samples, strict=True
    ):
        content = manifest.path(manifest.shards[shard]).read_bytes()
        arrays = written.arrays[list(manifest.samples["key"]).index(row["key"])]
        assert content[start : start + arrays["audio"].nbytes] == arrays["audio"].tobytes()
        assert content[end - arrays["visual"].nbytes : end] == arrays["visual"].tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# Damage


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
    assert set(threading.enumerate()) == before


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


# ---------------------------------------------------------------------------------------------------------------------
# What cannot work is refused at the start


def test_too_few_samples_for_one_global_batch(written):
    with pytest.raises(DataError) as caught:
        TrainStream(written.manifest, "train", global_batch=24, accumulation=4, seed=0)
    assert str(caught.value) == (
        f"{written.folder}: split 'train' has 22 samples, too few for one global batch of 24;"
        " set train.global_batch to at most 20"
    )
    TrainStream(written.manifest, "train", global_batch=20, accumulation=4, seed=0).close()


def test_a_split_that_is_not_there(written):
    with pytest.raises(DataError, match="no split 'test' in these shards; there are: train, val"):
        EvalStream(written.manifest, "test", batch=4)
    with pytest.raises(DataError, match="no split 'test'"):
        TrainStream(written.manifest, "test", global_batch=4, seed=0)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("visual", Field("<f8", (3, 7, 7, 2))),
        ("visual", Field(">f4", (3, 7, 7, 2))),
        ("visual", Field("<f4", (3, 2, 7, 7))),
        ("audio", Field("<f4", (4, 5))),
        ("label", Field("<f4", (3,))),
        ("label", None),
    ],
)
def test_shards_of_another_form(written, name, field):
    manifest = written.manifest
    fields = {k: f for k, f in (manifest.fields | {name: field}).items() if f is not None}
    with pytest.raises(DataError, match=r"the shards hold .*needed: visual \[T, 7, 7, C\]"):
        EvalStream(replace(manifest, fields=fields), "val", batch=4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 2, "world": 2},
        {"threads": 0},
        {"depth": 0},
        {"on_error": "ignore"},
        {"accumulation": 3},
        {"order": "shuffled"},
        {"epoch_end": "repeat"},
        {"access": "mmap"},
    ],
)
def test_arguments_that_make_no_sense(written, wrong):
    def stream():
        options = ReaderOptions(**{name: value for name, value in wrong.items() if hasattr(ReaderOptions, name)})
        others = {name: value for name, value in wrong.items() if not hasattr(ReaderOptions, name)}
        return TrainStream(written.manifest, "train", **({"global_batch": 4, "seed": 0} | others), options=options)

    with pytest.raises(ValueError):
        stream()


def test_a_position_before_the_start(written):
    with (
        TrainStream(written.manifest, "train", global_batch=4, seed=0) as stream,
        pytest.raises(ValueError, match="position=-4"),
    ):
        stream.batches(-4)


def test_a_manifest_read_again_gives_the_same_stream(written):
    """What a checkpoint relies on: nothing but the files, the seed and the position matters."""
    runs = []
    for _ in range(2):
        with TrainStream(Manifest.load(written.folder), "train", global_batch=5, seed=8) as stream:
            runs.append([real(batch) for batch in stream.batches(37, count=9)])
    assert runs[0] == runs[1]
