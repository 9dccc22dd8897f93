"""Batches on their way from the reader to the device, and the labels of the global batch beside them."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cpsp_dist.data.batch import Batch
from cpsp_dist.data.reader import TrainStream
from cpsp_dist.losses.gather import rank_and_world
from cpsp_dist.losses.global_batch import GlobalBatch
from cpsp_dist.losses.objectives import Objectives


@dataclass(frozen=True)
class MicroBatch:
    """A rank's part of one forward and backward pass.

    Attributes:
        batch: on the device.
        rows: [B] int64 on the CPU, rows of the sample table; -1 for an empty slot.
        labels: of what the objectives see at once (the micro-batches of all ranks, with `pool.over=parts` all those
            of a step), prepared for them; None where they have to be gathered, because any rank may have skipped a
            damaged sample.
    """

    batch: Batch
    rows: Tensor
    labels: GlobalBatch | None


class BatchFeed:
    """The micro-batches of a run, in order: `take` gives the next one.

    To a GPU they are copied on a stream of its own, one ahead: call `prefetch` once the kernels of the one in hand are
    queued. (`stream.skipped` then counts one batch ahead too.) What every rank reads follows from the position, so that
    the labels of all ranks are known without asking them: a thread works them out one micro-batch ahead.
    """

    def __init__(self, stream: TrainStream, device: torch.device, objectives: Objectives, position: int = 0) -> None:
        """position: samples delivered before, over all ranks."""
        self._stream, self._device, self._objectives = stream, device, objectives
        self._batches = stream.batches(position)
        self._position = position
        self._thread = ThreadPoolExecutor(1, "labels")
        self._parts, self._taken = objectives.parts, 0
        self._labels: GlobalBatch | None = None
        self._planned = self._plan_labels()
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: tuple[Batch, Tensor, torch.cuda.Event] | BaseException | None = None

    def take(self) -> MicroBatch:
        """The next micro-batch; its memory is good until the one after it is taken.

        Raises:
            DataError: a damaged sample in it, see `TrainStream`.
        """
        if self._copies is None:
            batch, rows = self._read()
        else:
            batch, rows = self._take_copied()
        if self._taken % self._parts == 0:
            self._labels = None if self._planned is None else self._planned.result()
            self._planned = self._plan_labels()
        self._taken += 1
        return MicroBatch(batch, rows, self._labels)

    def prefetch(self) -> None:
        """Read the next micro-batch and start its copy to the GPU; nothing on a CPU."""
        if self._copies is None or self._next is not None:
            return
        try:
            # The reader records on the current stream when a batch's memory may be filled anew.
            with torch.cuda.stream(self._copies):
                batch, rows = self._read()
                copied = torch.cuda.Event()
                copied.record()
            self._next = batch, rows, copied
        except BaseException as error:  # of a batch whose turn has not come
            self._next = error

    def _take_copied(self) -> tuple[Batch, Tensor]:
        self.prefetch()
        found, self._next = self._next, None
        if isinstance(found, BaseException):
            raise found
        assert found is not None
        batch, rows, copied = found
        compute = torch.cuda.current_stream(self._device)
        compute.wait_event(copied)
        for tensor in vars(batch).values():
            tensor.record_stream(compute)
        return batch, rows

    def _read(self) -> tuple[Batch, Tensor]:
        batch = next(self._batches)
        rows = torch.where(batch.valid, batch.index, -1)  # the batch's own memory is used again
        return batch.to(self._device), rows

    def _plan_labels(self) -> Future[GlobalBatch] | None:
        """Start to work out the labels of what comes after that which was asked for."""
        if not self._stream.planned or self._stream.world != rank_and_world()[1]:
            return None
        parts, position = self._parts, self._position
        self._position += parts * self._stream.schedule.micro
        return self._thread.submit(lambda: self._objectives.prepare(planned_labels(self._stream, position, parts)))


def planned_labels(stream: TrainStream, position: int, parts: int = 1) -> GlobalBatch:
    """The labels of all ranks' slots of the `parts` micro-batches from `position` on, from the sample table: as they
    come in batches where no sample is skipped."""
    positions = range(position, position + parts * stream.schedule.micro, stream.schedule.micro)
    rows = np.stack([stream.rows_of_all_ranks(each) for each in positions], axis=1).ravel()  # [W, parts, b]
    table, valid = np.asarray(stream.manifest.samples).take(rows), rows >= 0

    def column(name: str, absent: int) -> Tensor:
        return torch.from_numpy(np.where(valid, table[name].astype(np.int64), absent))

    has_event = column("events", 0) > 0
    return GlobalBatch(
        torch.from_numpy(valid),
        column("category", -1),
        column("video", -1),
        has_event,
        stream.rank,
        stream.world,
        parts,
    )
