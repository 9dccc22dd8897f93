"""Shards as a `torch.utils.data.IterableDataset`, for programs built around `DataLoader`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from cpsp_dist.data.batch import Batch
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.reader import EvalStream, ReaderOptions, TrainStream


def copy_batch(batch: Batch) -> Batch:
    """A batch with memory of its own, which stays as it is when its stream reads on; invalid slots are left out."""
    return Batch(**{field.name: getattr(batch, field.name)[batch.valid] for field in fields(batch)})


class ShardsDataset(IterableDataset[Batch]):
    """Batches of one split, each sample exactly once an iteration over all ranks and DataLoader workers.

    Each item is a `Batch` of at most `batch` videos, all of them valid, with memory of its own: it may be kept, unlike
    the batches of a plain stream. Give it to `DataLoader(dataset, batch_size=None, num_workers=...)`: it makes batches
    itself, and divides the samples over workers and ranks itself, so it takes no sampler. The last batches may be
    smaller, and ranks may get one batch more than others; for collectives at every step use `TrainStream`.

    Args:
        shards: folder or URL of shards. Each worker opens them itself, so the data set pickles (spawn too).
        split: "train", "val" or "test".
        batch: videos in an item, at least 1.
        shuffle: a permutation of all samples, given by `seed` and the epoch (`set_epoch`); else the order of the table.
        rank, world: this process among all; from torch.distributed, where it is initialised, by default.
        threads: reader threads of each worker.

    Raises:
        DataError: on construction, no such shards or split; while iterating, a damaged sample.
        ValueError: batch below 1, or rank not below world.
    """

    def __init__(
        self,
        shards: str | Path,
        split: str,
        *,
        batch: int,
        shuffle: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
        threads: int = 1,
    ) -> None:
        super().__init__()
        joined = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = rank if rank is not None else torch.distributed.get_rank() if joined else 0
        self.world = world if world is not None else torch.distributed.get_world_size() if joined else 1
        if batch < 1 or not 0 <= self.rank < self.world:
            raise ValueError(f"batch={batch}, rank={self.rank}, world={self.world}: batch >= 1, 0 <= rank < world")
        self.shards, self.split, self.batch = str(shards), split, batch
        self.shuffle, self.seed, self.threads, self.epoch = shuffle, seed, threads, 0
        self.samples = len(Manifest.load(self.shards).rows(split))

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration. Without effect on persistent workers, which hold copies."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        part, parts = self.rank * workers + number, self.world * workers
        together = self.batch * parts
        steps = -(-self.samples // together)
        with self._stream(part, parts) as stream:
            # An epoch of a padded stream is `steps` complete global batches long.
            batches = stream.batches(self.epoch * steps * together, steps) if self.shuffle else stream
            for batch in batches:
                if batch.valid.any():
                    yield copy_batch(batch)

    def _stream(self, part: int, parts: int) -> Any:
        """The one place that constructs streams here."""
        manifest, together = Manifest.load(self.shards), self.batch * parts
        options = ReaderOptions(threads=self.threads, epoch_end="pad")
        if self.shuffle:
            return TrainStream(
                manifest, self.split, global_batch=together, seed=self.seed, rank=part, world=parts, options=options
            )
        return EvalStream(manifest, self.split, batch=together, rank=part, world=parts, options=options)
