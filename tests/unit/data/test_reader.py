"""The streaming reader on real tars: every sample once, the same batches whatever the world, nothing damaged delivered.

The oracle is plain: all orders of all epochs as one list, cut into global batches.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from cpsp_dist.data.reader import EvalStream, ReaderOptions, TrainStream, permutation
from cpsp_dist.data.reader.order import Interleaved
from tests.support.examples import examples
from tests.support.tiny_shards import assert_as_written, endless, endless_of
from tests.support.tiny_shards import real_rows as real

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@examples(40)
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


@examples(25)
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


@examples(40)
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


@examples(40)
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
