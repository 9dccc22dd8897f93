"""Rows of earlier steps that PSA_V's pool also has: without a collective, as every rank holds the same."""

from __future__ import annotations

import torch
from torch import Tensor

from cpsp_dist.losses.global_batch import GlobalBatch, Rows, indices
from cpsp_dist.utils.transfer import HostCopy, to_device


class MemoryBank:
    """Cross-batch memory (XBM, Wang et al. 2020): the last `size` rows of earlier steps, without gradient.

    A ring: row number n, in rank order within a step, lies in slot n % size. `count`, the rows ever put in, says
    which slots are filled; class 0 and video 0 are rows like any other. Every rank puts in what was gathered, and so
    holds the same. Labels are on the CPU.
    """

    def __init__(self, size: int) -> None:
        self.size, self._count = size, 0
        self._ring: Rows | None = None
        self._new: tuple[Rows, HostCopy] | None = None  # put in, not yet stored: which of them are finite is on its way

    @property
    def count(self) -> int:
        self._store()
        return self._count

    @torch.no_grad()
    def put(self, new: Rows) -> None:
        """Remember the rows; of more than `size` the last ones. Not those that are not finite: they would
        make every later step so. Which ones is read when the bank is next used, when a GPU has long found it."""
        self._store()
        self._new = new._replace(rows=new.rows.detach()), HostCopy(new.rows.isfinite().all(1))

    @torch.no_grad()
    def _store(self) -> None:
        if self._new is None:
            return
        (new, finite), self._new = self._new, None
        kept = finite.read()
        if not kept.all():
            places = indices(kept)
            new = Rows(new.rows[to_device([places], new.rows.device)[0]], new.category[places], new.video[places])
        if self._ring is None:
            self._ring = Rows(*(x.new_zeros(self.size, *x.shape[1:]) for x in new))
        count = min(len(new.rows), self.size)
        first = (self._count + len(new.rows) - count) % self.size
        to_end = min(count, self.size - first)
        for ring, x in zip(self._ring, new, strict=True):
            newest = x[len(x) - count :]
            ring[first : first + to_end] = newest[:to_end]
            ring[: count - to_end] = newest[to_end:]
        self._count += len(new.rows)

    def excluding(self, batch: GlobalBatch, like: Tensor) -> Rows:
        """What is remembered, in the order of the slots, less stale copies of videos that are in the batch; the rows
        on the features' device, the labels on the CPU.

        like [..., D]: the features' device, type and width.
        """
        self._store()
        if self._ring is None:
            labels = (torch.zeros(self.size, dtype=torch.int64) for _ in range(2))
            self._ring = Rows(like.new_zeros(self.size, like.shape[-1]), *labels)
        self._ring = self._ring._replace(rows=self._ring.rows.to(like))  # elsewhere only right after `load`
        filled = Rows(*(x[: min(self._count, self.size)] for x in self._ring))
        places = indices(~torch.isin(filled.video, batch.video[batch.valid]))
        rows = filled.rows[to_device([places], like.device)[0]]
        return Rows(rows, filled.category[places], filled.video[places])

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; empty before the first step."""
        self._store()
        if self._ring is None:
            return {}
        ring = {f"bank.{name}": x.cpu().clone() for name, x in self._ring._asdict().items()}
        return ring | {"bank.count": torch.tensor(self._count)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Resume from a `state`; from that of a bank of another size, with its newest rows."""
        if "bank.count" not in state:
            return
        ring = Rows(*(state[f"bank.{name}"].clone() for name in Rows._fields))
        count = int(state["bank.count"])
        if len(ring.rows) == self.size:
            self._ring, self._count, self._new = ring, count, None
            return
        filled = min(count, len(ring.rows))
        oldest_first = (count - filled + torch.arange(filled)) % len(ring.rows)
        self.put(Rows(*(x[oldest_first] for x in ring)))
