"""Rows of earlier steps that PSA_V's pool also has: without a collective, as every rank holds the same."""

from __future__ import annotations

import torch
from torch import Tensor

from cpsp_dist.losses.global_batch import GlobalBatch, Rows


class MemoryBank:
    """Cross-batch memory (XBM, Wang et al. 2020): the last `size` rows of earlier steps, without gradient.

    A ring: row number n, in rank order within a step, lies in slot n % size. `count`, the rows ever put in, says
    which slots are filled; class 0 and video 0 are rows like any other. Every rank puts in what was gathered, and so
    holds the same.
    """

    def __init__(self, size: int) -> None:
        self.size, self.count = size, 0
        self._ring: Rows | None = None

    @torch.no_grad()
    def put(self, new: Rows) -> None:
        """Remember the rows; of more than `size` the last ones. Not those that are not finite: they would
        make every later step so."""
        new = Rows(*(x[new.rows.isfinite().all(1)] for x in new))
        if self._ring is None:
            self._ring = Rows(*(x.new_zeros(self.size, *x.shape[1:]) for x in new))
        kept = min(len(new.rows), self.size)
        first = self.count + len(new.rows) - kept
        slots = (first + torch.arange(kept, device=new.rows.device)) % self.size
        for ring, x in zip(self._ring, new, strict=True):
            ring[slots] = x[len(x) - kept :]
        self.count += len(new.rows)

    def excluding(self, batch: GlobalBatch, like: Tensor) -> Rows:
        """What is remembered, in the order of the slots, less stale copies of videos that are in the batch.

        like [..., D]: the features' device, type and width.
        """
        if self._ring is None:
            self._ring = Rows(
                like.new_zeros(self.size, like.shape[-1]),
                *(torch.zeros(self.size, dtype=torch.int64, device=like.device) for _ in range(2)),
            )
        labels = (x.to(like.device) for x in self._ring[1:])
        self._ring = Rows(self._ring.rows.to(like), *labels)  # on another device only right after `load`
        filled = Rows(*(x[: min(self.count, self.size)] for x in self._ring))
        kept = ~torch.isin(filled.video, batch.video[batch.valid])
        return Rows(*(x[kept] for x in filled))

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; empty before the first step."""
        if self._ring is None:
            return {}
        ring = {f"bank.{name}": x.cpu().clone() for name, x in self._ring._asdict().items()}
        return ring | {"bank.count": torch.tensor(self.count)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Resume from a `state`; from that of a bank of another size, with its newest rows."""
        if "bank.count" not in state:
            return
        ring = Rows(*(state[f"bank.{name}"].clone() for name in Rows._fields))
        count = int(state["bank.count"])
        if len(ring.rows) == self.size:
            self._ring, self.count = ring, count
            return
        filled = min(count, len(ring.rows))
        oldest_first = (count - filled + torch.arange(filled)) % len(ring.rows)
        self.put(Rows(*(x[oldest_first] for x in ring)))
