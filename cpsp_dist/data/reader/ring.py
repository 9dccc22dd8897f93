"""The ring: threads fill reused batches from the shards, in order, ahead of the consumer."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from crc32c import crc32c

from cpsp_dist.data.batch import Batch
from cpsp_dist.data.manifest import ARRAY_FIELDS, Field, Manifest
from cpsp_dist.data.reader.files import LookAhead, ShardFile, ShardFiles
from cpsp_dist.utils.errors import DataError

#: Samples of this rank that the kernel is asked for before the threads come to them.
AHEAD = 64
#: Seconds after which a batch that does not come, or a thread that does not end, is given up.
PATIENCE = 300.0
JOIN = 10.0


class Slot:
    """Memory of one batch, and its arrays sample by sample as bytes."""

    def __init__(self, fields: dict[str, Field], size: int, pin: bool) -> None:
        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, pin_memory=pin)

        self.arrays = {n: empty(size, *fields[n].shape, dtype=_torch_dtype(fields[n])) for n in ARRAY_FIELDS}
        self.event = empty(*self.arrays["label"].shape, dtype=torch.bool)
        self.valid = empty(size, dtype=torch.bool)
        self.category, self.video, self.index = (empty(size, dtype=torch.int64) for _ in range(3))
        self.rows = {name: list(t.numpy().reshape(size, -1).view(np.uint8)) for name, t in self.arrays.items()}
        self.size, self.pin = size, pin
        self.copied: torch.cuda.Event | None = None

    def batch(self) -> Batch:
        a = self.arrays
        return Batch(a["visual"], a["audio"], self.event, self.category, self.valid, self.video, self.index)

    def describe(self, table: np.ndarray, index: np.ndarray) -> None:
        """Fill everything but the features, and pad where `index` is -1; the samples' label bytes are there."""
        self.index.numpy()[:], self.valid.numpy()[:] = index, index >= 0
        self.category.numpy()[:], self.video.numpy()[:] = table["category"], table["video"]
        self.event.numpy()[:] = self.arrays["label"].numpy() != 0
        if len(padding := np.flatnonzero(index < 0)):
            for tensor in (*self.arrays.values(), self.event):
                tensor.numpy()[padding] = 0
            for tensor in (self.category, self.video):
                tensor.numpy()[padding] = -1

    def blank(self, position: int) -> None:
        """Zero a damaged sample; its index, category and video stay."""
        for rows in self.rows.values():
            rows[position][:] = 0
        self.event[position] = False
        self.valid[position] = False

    def give_back(self) -> None:
        """The consumer is done with this slot, but for copies to a GPU that it has queued."""
        if self.pin:
            self.copied = torch.cuda.Event(blocking=True)  # who waits for it sleeps
            self.copied.record()

    def wait_copied(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()


class PendingBatch:
    """One batch on its way: where it goes and comes from, what is claimed, what is done, what failed."""

    def __init__(self, slot: Slot, index: np.ndarray, table: np.ndarray, coming: list[np.ndarray]) -> None:
        self.slot, self.index, self.table, self.coming = slot, index, table, coming
        # Lists: read item by item, they are quicker than arrays.
        self.shards = np.where(index >= 0, table["shard"].astype(np.int64), -1).tolist()
        self.places = {name: (table[name].tolist(), table[f"{name}_crc"].tolist()) for name in ARRAY_FIELDS}
        self.claimed = 0
        self.pending = slot.size
        self.done = False
        self.failures: list[tuple[int, Exception]] = []


class Ring:
    """Threads that fill slots in the order of `plans`; `next` hands them out in that order.

    A plan is the rows of the sample table for one slot, -1 for padding; a short one is padded.
    """

    def __init__(
        self,
        manifest: Manifest,
        files: ShardFiles,
        look_ahead: LookAhead,
        slots: list[Slot],
        plans: Iterator[np.ndarray],
        threads: int,
        check_crc: bool,
        patience: float | None = None,
    ) -> None:
        self._patience = PATIENCE if patience is None else patience
        #: The GPU that the slots are copied to: CUDA has one for each thread, and GPU 0 for those that choose none.
        self._device = torch.cuda.current_device() if slots[0].pin else None
        self._manifest, self._files, self._check_crc = manifest, files, check_crc
        self._look_ahead = look_ahead
        self._table = np.asarray(manifest.samples)  # a plain array over the same map: indexing it is quicker
        self._ahead = 1 + -(-AHEAD // slots[0].size)  # plans drawn before their turn
        self._plans, self._stop_prefetch = files.prefetch(plans, self._ahead + len(slots))
        self._planned: deque[tuple[np.ndarray, np.ndarray]] = deque()
        self._unit = -(-slots[0].size // threads)
        self._lock = threading.RLock()  # re-entered where the garbage collector closes an iterator in the midst of it
        self._room = threading.Condition(self._lock)  # reader threads wait here for something to do
        self._ready = threading.Condition(self._lock)  # the consumer waits here for a batch
        self._free = deque(slots)
        self._jobs: deque[PendingBatch] = deque()  # in delivery order; only the last may have unclaimed samples
        self._held: Slot | None = None
        self._exhausted = self._stopped = False
        self._broken: BaseException | None = None
        self._workers = [threading.Thread(target=self._work, name=f"reader-{i}", daemon=True) for i in range(threads)]
        for worker in self._workers:
            worker.start()

    def next(self) -> PendingBatch | None:
        """The next batch, or None after the last one. The one before it goes back into the ring."""
        with self._lock:
            if self._stopped:  # its slots may be another ring's by now
                raise RuntimeError("this stream was closed, or asked for batches from another position")
            if self._held is not None:
                self._held.give_back()
                self._free.append(self._held)
                self._held = None
                self._room.notify_all()
            while not (self._jobs and self._jobs[0].done):
                if self._broken is not None:
                    raise self._broken
                if self._exhausted and not self._jobs:
                    return None
                received = self._files.bytes_received
                if not self._ready.wait(self._patience) and self._files.bytes_received == received:
                    place = self._manifest.place
                    raise DataError(f"{place}: no data for {self._patience:.0f} s; the storage may be hung")
                if self._stopped:
                    raise RuntimeError("this stream was closed while it waited for a batch")
            job = self._jobs.popleft()
            self._held = job.slot
            return job

    def stop(self) -> bool:
        """End the threads; False where one does not end (a disk that no longer answers)."""
        with self._lock:
            self._stopped = True
            if self._held is not None:  # another ring may fill it while copies out of it are under way
                self._held.give_back()
            self._room.notify_all()
            self._ready.notify_all()
        self._stop_prefetch()
        if threading.current_thread() in self._workers:  # the garbage collector again: a thread cannot join itself
            return False
        limit = time.monotonic() + JOIN
        for worker in self._workers:
            worker.join(max(0.0, limit - time.monotonic()))
        return not any(worker.is_alive() for worker in self._workers)

    def _work(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)
            while (claim := self._claim()) is not None:
                job, first, end = claim
                try:
                    failures = self._fill(job, first, end)
                except Exception as error:  # unforeseen: reported at this batch, like a damaged sample
                    failures = [(first, error)]
                with self._lock:
                    job.failures += failures
                    job.pending -= end - first
                    last = job.pending == 0
                if last:
                    job.slot.describe(job.table, job.index)
                    with self._lock:
                        job.done = True
                        self._ready.notify_all()
        except BaseException as error:  # in the order itself: the consumer would wait forever otherwise
            with self._lock:
                self._broken = error
                self._ready.notify_all()

    def _claim(self) -> tuple[PendingBatch, int, int] | None:
        """The next samples to read: a batch is shared by the threads, and the next begun once it is given out."""
        with self._lock:
            while not self._stopped:
                job = self._jobs[-1] if self._jobs else None
                if job is None or job.claimed == job.slot.size:
                    if self._exhausted:
                        return None
                    job = self._begin() if self._free else None
                    if self._exhausted:
                        self._room.notify_all()
                        self._ready.notify_all()
                        return None
                if job is not None:
                    first, job.claimed = job.claimed, min(job.slot.size, job.claimed + self._unit)
                    return job, first, job.claimed
                self._room.wait()
            return None

    def _begin(self) -> PendingBatch | None:
        coming = []
        while len(self._planned) < self._ahead and (index := next(self._plans, None)) is not None:
            padded = np.full(self._free[0].size, -1)
            padded[: len(index)] = index
            table = self._table.take(padded)  # of no meaning where the index is -1
            self._planned.append((padded, table))
            coming.append(table[: len(index)])
        if not self._planned:
            self._exhausted = True
            return None
        job = PendingBatch(self._free.popleft(), *self._planned.popleft(), coming)
        self._jobs.append(job)
        return job

    def _fill(self, job: PendingBatch, first: int, end: int) -> list[tuple[int, Exception]]:
        """Read samples [first, end) of a batch; the positions that failed, each with its error."""
        for table in job.coming:
            self._look_ahead.ask(table[first:end], first)
        slot, files, check = job.slot, self._files, self._check_crc
        slot.wait_copied()
        failures: dict[int, Exception] = {}
        opened: list[ShardFile | None] = []
        for position, number in enumerate(job.shards[first:end], first):
            try:
                opened.append(files[number] if number >= 0 else None)
            except DataError as error:
                opened.append(None)
                failures[position] = error
        # Field by field: small loops stay in the processor's cache, where half a megabyte a turn pushes all else out.
        for name in ARRAY_FIELDS:
            rows, (offsets, crcs) = slot.rows[name], job.places[name]
            for position, file in enumerate(opened, first):
                if file is None:
                    continue
                row = rows[position]
                try:
                    file.read(row, offsets[position])
                    if check and crc32c(row.data) != crcs[position]:
                        raise DataError("these bytes are not the ones that were packed (crc32c differs)")
                except (DataError, OSError) as error:
                    opened[position - first] = None
                    failures[position] = self._explain(error, job.table[position], name, offsets[position])
        return list(failures.items())

    def _explain(self, error: Exception, sample: np.void, field: str, offset: int) -> Exception:
        path = self._manifest.path(self._manifest.shards[sample["shard"]])
        remedy = "copy or pack this shard again"
        if self._manifest.remote is not None:
            remedy = f"delete this file of the cache, and it is fetched again from {self._manifest.place}"
        return DataError(
            f"{path}: sample '{sample['key'].decode()}', field {field} at byte {offset}: {error}; {remedy}"
        )


def _torch_dtype(field: Field) -> torch.dtype:
    return torch.from_numpy(np.empty(0, field.dtype)).dtype
