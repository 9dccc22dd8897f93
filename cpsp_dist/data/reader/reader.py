"""The streaming reader: threads fill a ring of reused batches from memory-mapped shards, in a fixed order.

`TrainStream` is endless and delivers each sample exactly once an epoch; `EvalStream` delivers each sample of a split
once over all ranks, in the same number of steps on every rank. What a rank has delivered is one number, the position:
samples delivered so far over all ranks. So any number of ranks resumes from it with the same global batches.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator
from typing import Self

import numpy as np
import torch

from cpsp_dist.data.batch import Batch
from cpsp_dist.data.manifest import ARRAY_FIELDS, Manifest
from cpsp_dist.data.reader.files import LookAhead
from cpsp_dist.data.reader.options import ReaderOptions
from cpsp_dist.data.reader.order import rank_slice
from cpsp_dist.data.reader.remote import shard_files
from cpsp_dist.data.reader.ring import AHEAD, PendingBatch, Ring, Slot
from cpsp_dist.data.reader.schedule import ReadSchedule
from cpsp_dist.data.shard_index import is_visual_shape
from cpsp_dist.utils.errors import DataError

logger = logging.getLogger(__name__)

#: Samples ordered at once: enough that ordering costs next to nothing a sample.
ORDERED = 4096


class _Stream:
    """What both streams share: checks, the ring's memory, counts."""

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        *,
        slots: int,
        rank: int,
        world: int,
        options: ReaderOptions,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        _check_schema(manifest)
        self.rows = manifest.rows(split)
        self.samples = len(self.rows)
        self.skipped = 0
        self.wait_seconds = 0.0
        self.manifest, self.split, self.rank, self.world = manifest, split, rank, world
        self._options, self._slot_size = options, slots
        self._pin = options.pin and torch.cuda.is_available()
        self._files = shard_files(manifest, options.access)
        self._look_ahead = LookAhead(self._files, manifest.fields)  # keeps what it found over many passes
        self._slots: list[Slot] = []
        self._ring: Ring | None = None

    def close(self) -> None:
        """End the reader threads and let go of shards and memory. A batch in hand stays readable."""
        if self._ring is not None:
            self._ring.stop()
        self._ring = None
        self._slots = []
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _deliver(self, plans: Iterator[np.ndarray]) -> Iterator[Batch]:
        """The batches of `plans` (rows of the sample table for each), read by threads of their own."""
        if self._ring is not None and not self._ring.stop():
            self._slots = []  # a thread that would not end may still write to these
        if not self._slots:
            # One is in the consumer's hands while `depth` are read ahead.
            count = self._options.depth + 1
            self._slots = [Slot(self.manifest.fields, self._slot_size, self._pin) for _ in range(count)]
        ring = self._ring = Ring(
            self.manifest,
            self._files,
            self._look_ahead,
            self._slots,
            plans,
            self._options.threads,
            self._options.check_crc,
            self._options.patience,
        )
        try:
            while True:
                asked = time.perf_counter()
                job = ring.next()
                self.wait_seconds += time.perf_counter() - asked
                if job is None:
                    return
                self._account(job)
                yield job.slot.batch()
        finally:
            ring.stop()

    def _account(self, job: PendingBatch) -> None:
        """Raise or count what went wrong in a batch. Counted at delivery, so reading ahead changes nothing."""
        for position, error in sorted(job.failures, key=lambda failure: failure[0]):
            if self._options.on_error == "raise" or not isinstance(error, DataError):
                raise error
            self.skipped += 1
            budget = self._options.skip_budget
            if self.skipped > budget:
                raise DataError(f"{error}; this is damaged sample {self.skipped}, and skip_budget is {budget}")
            logger.warning("skipped (%d of at most %d): %s", self.skipped, budget, error)
            job.slot.blank(position)


class TrainStream(_Stream):
    """A split without end, each sample exactly once an epoch. A batch is valid only until the next one is asked for:
    its memory is filled anew; copy what you keep, or use `ShardsDataset`.

    `ReadSchedule` says which sample comes when; by default batches straddle epochs, so that none is short. Every rank
    gets ceil(global_batch / accumulation / world) slots a micro-batch, one of them invalid where shares are uneven.

    Attributes:
        samples: number of samples of the split.
        skipped: damaged samples skipped so far.
        wait_seconds: time the consumer has waited for data so far.

    Raises:
        DataError: fewer samples than one global batch; shards of another form than the models take; while reading, at
            the batch concerned: a damaged sample, or one too many.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        *,
        global_batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        options: ReaderOptions = ReaderOptions(),  # noqa: B008  # frozen
    ) -> None:
        self.schedule = ReadSchedule(
            [shard.nsamples for shard in manifest.shards if shard.split == split],
            global_batch=global_batch,
            seed=seed,
            world=world,
            accumulation=accumulation,
            order=options.order or ("full" if manifest.remote is None else "interleaved"),
            epoch_end=options.epoch_end,
        )
        slots = -(-self.schedule.micro // world)
        super().__init__(manifest, split, slots=slots, rank=rank, world=world, options=options)
        if self.samples < global_batch and options.epoch_end != "pad":
            raise DataError(
                f"{manifest.place}: split '{split}' has {self.samples} samples, too few for one global batch of"
                f" {global_batch}; set train.global_batch to at most {self.samples // accumulation * accumulation}"
            )

    def batches(self, position: int = 0, count: int | None = None) -> Iterator[Batch]:
        """This rank's micro-batches from `position` on (samples delivered before, over all ranks); `count`, or endless.

        A batch's tensors are views of a reused slot: they are good until the next batch is asked for. With `pin`, copy
        them on CUDA's current stream. A second call ends the first one's batches.
        """
        if position < 0:
            raise ValueError(f"position={position}")
        return self._deliver(itertools.islice(self._plans(position), count))

    @property
    def planned(self) -> bool:
        """Whether batches hold exactly the planned samples: none is skipped."""
        return self._options.on_error == "raise"

    def rows_of_all_ranks(self, position: int) -> np.ndarray:
        """[W, b] rows of the sample table that each rank's slots hold in the micro-batch at `position`, -1 for padding:
        what `index` says in every rank's batch."""
        rows = self.schedule.rows_of_all_ranks(position)
        return np.where(rows < 0, -1, rows + self.rows.start)

    def _plans(self, position: int) -> Iterator[np.ndarray]:
        together = 1 + AHEAD // self._slot_size  # few at first, so that the first batch comes soon
        while True:
            rows = self.schedule.rows(position, together, self.rank)
            yield from np.where(rows < 0, -1, rows + self.rows.start)
            position += together * self.schedule.micro
            together = min(2 * together, max(1, ORDERED // self._slot_size))


class EvalStream(_Stream):
    """Each sample of a split exactly once over all ranks, in table order, in the same number of steps on every rank.

    Each step takes `batch` samples over all ranks, in ceil(batch / world) slots a rank; what is left over is
    `valid=False`. A batch is valid only until the next one, as `TrainStream`'s. Iterate again for another pass.
    Attributes and errors as `TrainStream`'s; any split size serves.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        *,
        batch: int,
        rank: int = 0,
        world: int = 1,
        options: ReaderOptions = ReaderOptions(),  # noqa: B008  # frozen
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch={batch}")
        super().__init__(manifest, split, slots=-(-batch // world), rank=rank, world=world, options=options)
        self._batch = batch

    def __len__(self) -> int:
        """Steps, the same on every rank."""
        return -(-self.samples // self._batch)

    def __iter__(self) -> Iterator[Batch]:
        """One pass. A batch's tensors are good until the next batch is asked for."""
        return self._deliver(self._plans())

    def read(self, rows: np.ndarray) -> Batch:
        """The samples at these rows of the sample table, as many as there are slots; -1 for an empty one."""
        return next(self._deliver(iter([rows])))

    def _plans(self) -> Iterator[np.ndarray]:
        for first in range(0, self.samples, self._batch):
            count = min(self._batch, self.samples - first)
            yield np.asarray(rank_slice(first, count, self.rank, self.world), dtype=np.int64) + self.rows.start


def _check_schema(manifest: Manifest) -> None:
    """Raises DataError where the shards hold something else than the models take."""
    fields = manifest.fields
    forms = {"visual": ("<f2", "<f4"), "audio": ("<f4",), "label": ("|u1",)}
    fits = set(forms) <= set(fields) and all(np.dtype(fields[name].dtype).str in forms[name] for name in forms)
    if fits:
        visual, audio, label = (fields[name].shape for name in ARRAY_FIELDS)
        fits = is_visual_shape(visual) and len(audio) == 2 and label == visual[:1] == audio[:1]
    if not fits:
        wanted = "visual [T, H, W, C] or [T, C], float16 or float32, audio [T, A] float32, label [T] uint8"
        found = ", ".join(f"{name} {list(f.shape)} {np.dtype(f.dtype).name}" for name, f in fields.items())
        raise DataError(f"{manifest.place}: the shards hold {found}; needed: {wanted}; pack the features again")
