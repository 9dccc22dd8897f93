"""Labels of all ranks, from the plan: what the ranks' batches hold, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cpsp_dist.config import ObjectiveSettings
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.reader import ReaderOptions, TrainStream
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.training.feed import BatchFeed, planned_labels


@pytest.mark.parametrize("order", ["full", "interleaved"])
@pytest.mark.parametrize(
    ("world", "global_batch", "accumulation", "epoch_end"),
    [(1, 8, 1, "carry"), (3, 20, 2, "pad"), (4, 10, 1, "drop"), (5, 4, 1, "carry")],
)
def test_labels_of_the_plan_are_those_of_all_ranks_batches(
    keypad_shards: Path, order: Any, world: int, global_batch: int, accumulation: int, epoch_end: Any
) -> None:
    manifest, options = Manifest.load(keypad_shards), ReaderOptions(order=order, epoch_end=epoch_end, threads=1)
    streams = [
        TrainStream(
            manifest,
            "train",
            global_batch=global_batch,
            seed=4,
            rank=rank,
            world=world,
            accumulation=accumulation,
            options=options,
        )
        for rank in range(world)
    ]
    try:
        batches = [stream.batches(global_batch) for stream in streams]
        for number in range(2 * 48 // streams[0].schedule.micro):  # into the third epoch
            shares = [next(of_rank) for of_rank in batches]
            position = global_batch + number * streams[0].schedule.micro
            for stream in streams:
                labels = planned_labels(stream, position)
                assert (labels.rank, labels.ranks) == (stream.rank, world)
                for name, found in (("valid", labels.valid), ("category", labels.category), ("video", labels.video)):
                    expected = torch.cat([getattr(share, name) for share in shares])
                    assert torch.equal(found, expected), name
                    assert found.dtype == expected.dtype
                assert torch.equal(labels.has_event, torch.cat([share.event.any(1) for share in shares]))
                rows = torch.cat([torch.where(share.valid, share.index, -1) for share in shares])
                assert stream.rows_of_all_ranks(position).ravel().tolist() == rows.tolist()
    finally:
        for stream in streams:
            stream.close()


@pytest.mark.parametrize(("on_error", "planned"), [("raise", True), ("skip", False)])
def test_labels_are_planned_where_no_rank_can_skip_a_sample(keypad_shards: Path, on_error: Any, planned: bool) -> None:
    manifest, objectives = Manifest.load(keypad_shards), Objectives(ObjectiveSettings(), pool="gather")
    with TrainStream(
        manifest, "train", global_batch=8, seed=1, options=ReaderOptions(on_error=on_error, threads=1)
    ) as stream:
        feed = BatchFeed(stream, torch.device("cpu"), objectives)
        for position in (0, 8):
            taken = feed.take()
            assert (taken.labels is not None) == planned
            assert torch.equal(taken.rows, taken.batch.index)
            if taken.labels is not None:
                # Prepared: a video without event has no class.
                expected = torch.where(taken.batch.event.any(1), taken.batch.category, -1)
                assert torch.equal(taken.labels.category, expected)
                assert torch.equal(taken.labels.video, planned_labels(stream, position).video)
    with TrainStream(manifest, "train", global_batch=8, seed=1, world=2) as stream:
        # A dry run of one process for two ranks: its pool is its own share.
        assert BatchFeed(stream, torch.device("cpu"), objectives).take().labels is None
