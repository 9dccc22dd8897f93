"""Shards under torch's DataLoader: each sample exactly once, in batches that may be kept."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from cpsp_dist.data.batch import Batch
from cpsp_dist.data.torch_dataset import ShardsDataset
from cpsp_dist.utils.errors import DataError
from tests.support.tiny_shards import Written, assert_as_written, write_shards


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_shards(tmp_path_factory.mktemp("dataset") / "shards", {"train": [9, 8, 6], "val": [5]})


def read(folder: Path, workers: int, shuffle: bool, epoch: int = 0, rank: int = 0, world: int = 1) -> list[Batch]:
    dataset = ShardsDataset(folder, "train", batch=4, shuffle=shuffle, seed=7, rank=rank, world=world)
    dataset.set_epoch(epoch)
    context = ("spawn" if world == 1 else "fork") if workers else None
    return list(DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=context))


@pytest.mark.parametrize(("workers", "shuffle"), [(0, False), (0, True), (2, True)])
def test_each_sample_once_over_workers_and_ranks(written, workers, shuffle):
    """All batches are kept to the end: a batch that shared the reader's memory would hold later samples by then."""
    for world in (1, 2):
        batches = [b for rank in range(world) for b in read(written.folder, workers, shuffle, 3, rank, world)]
        for batch in batches:
            assert batch.valid.all()
            assert 1 <= len(batch) <= 4
            assert_as_written(batch, written)
        assert sorted(torch.cat([b.index for b in batches]).tolist()) == list(range(23))


def test_epochs_differ_and_repeat(written):
    def order(epoch: int) -> list[int]:
        return torch.cat([b.index for b in read(written.folder, 0, True, epoch)]).tolist()

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert sorted(order(1)) == list(range(23))


def test_it_pickles_and_refuses_mistakes(written):
    dataset = pickle.loads(pickle.dumps(ShardsDataset(written.folder, "val", batch=2)))
    assert sorted(torch.cat([b.index for b in dataset]).tolist()) == list(range(23, 28))
    with pytest.raises(DataError, match="no split 'tset'"):
        ShardsDataset(written.folder, "tset", batch=2)
    for wrong in ({"batch": 0}, {"batch": 1, "rank": 2, "world": 2}):
        with pytest.raises(ValueError, match="batch >= 1"):
            ShardsDataset(written.folder, "train", **wrong)
