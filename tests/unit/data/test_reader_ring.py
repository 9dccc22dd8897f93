"""The ring of reused batches: what is in hand stays, threads end, reading ahead."""

from __future__ import annotations

import gc
import itertools
import threading
import time

import pytest
import torch

from cpsp_dist.data.reader import EvalStream, ReaderOptions, TrainStream
from cpsp_dist.data.reader import files as stream_files
from cpsp_dist.data.reader import ring as stream_ring
from tests.support.tiny_shards import assert_as_written
from tests.support.tiny_shards import real_rows as real


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
    assert not set(threading.enumerate()) - before
    iterator = stream.batches()
    next(iterator)
    assert len(set(threading.enumerate()) - before) == 3
    second = stream.batches()
    next(second)  # ends the first
    assert len(set(threading.enumerate()) - before) == 3
    with pytest.raises(RuntimeError, match="another position"):
        next(iterator)
    stream.close()
    assert not set(threading.enumerate()) - before
    with pytest.raises(RuntimeError, match="closed"):
        next(second)
    list(EvalStream(written.manifest, "val", batch=2))  # a complete pass ends by itself
    assert not set(threading.enumerate()) - before


def test_an_iterator_in_a_reference_cycle_is_closed_by_the_garbage_collector(written):
    before = set(threading.enumerate())
    holder: list = [TrainStream(written.manifest, "train", global_batch=4, seed=0).batches()]
    next(holder[0])
    holder.append(holder)
    del holder
    gc.collect()
    assert not set(threading.enumerate()) - before


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
