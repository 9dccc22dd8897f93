"""Which rows each rank reads at each position: a pure function, of the shards' sizes and numbers alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from cpsp_dist.data.reader.order import Full, Interleaved, Order, rank_slice

OrderName = Literal["full", "interleaved"]
EpochEnd = Literal["carry", "drop", "pad"]


class ReadSchedule:
    """Global batches of a split, epoch after epoch, and each rank's share of them.

    Position p of the stream lies in epoch p // L, at offset p % L of that epoch's order. L, the length of an epoch, is
    the number of samples n with `epoch_end="carry"` (global batches straddle epochs); with "drop" it is n without the
    last, short global batch; with "pad" that batch is filled up with nothing (row -1). A step takes the next
    `global_batch` positions, as `accumulation` micro-batches one after the other.

    The ranks' shares of a micro-batch are equal but for one. With order "full" they are its positions in turn; with
    "interleaved" the positions are sorted by lane first, so that a rank stays with its lanes and thus with its shards.
    Either way the global batch is the same for every number of ranks.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        global_batch: int,
        seed: int,
        world: int = 1,
        accumulation: int = 1,
        order: OrderName = "full",
        epoch_end: EpochEnd = "carry",
    ) -> None:
        if min(global_batch, accumulation) < 1 or global_batch % accumulation:
            raise ValueError(f"global_batch={global_batch} is not a multiple of accumulation={accumulation}")
        if order not in ("full", "interleaved") or epoch_end not in ("carry", "drop", "pad"):
            raise ValueError(f"order={order!r}, epoch_end={epoch_end!r}")
        self.sizes, self.n = sizes, int(sum(sizes))
        self.micro, self.world, self._seed, self._name = global_batch // accumulation, world, seed, order
        full = self.n // global_batch * global_batch
        padded = -(-self.n // global_batch) * global_batch
        self.epoch_length = {"carry": self.n, "drop": full, "pad": padded}[epoch_end]
        self._orders: dict[int, Order] = {}

    def rows(self, position: int, count: int, rank: int) -> np.ndarray:
        """[count, b] rows of the split that `rank` reads in the next `count` micro-batches; -1 for padding."""
        return self._rows(position, count, rank_slice(0, self.micro, rank, self.world))

    def rows_of_all_ranks(self, position: int) -> np.ndarray:
        """[W, b] rows of the split that each rank reads in the micro-batch at `position`; -1 for padding, and where a
        rank's share is shorter than that of others."""
        rows, everyone = np.full((self.world, -(-self.micro // self.world)), -1), range(self.micro)
        found = self._rows(position, 1, everyone)[0]
        for rank in range(self.world):
            share = rank_slice(0, self.micro, rank, self.world)
            rows[rank, : len(share)] = found[share.start : share.stop]
        return rows

    def _rows(self, position: int, count: int, mine: range) -> np.ndarray:
        firsts = position + self.micro * np.arange(count, dtype=np.int64)
        if self._name == "full":
            positions = firsts[:, None] + np.arange(mine.start, mine.stop)
        else:
            positions = firsts[:, None] + np.arange(self.micro)
            lanes = positions % self.epoch_length % self.order(0).lanes
            by_lane = np.argsort(lanes, axis=1, kind="stable")[:, mine.start : mine.stop]
            positions = np.take_along_axis(positions, by_lane, axis=1)
        epochs, offsets = np.divmod(positions, self.epoch_length)
        rows = np.full_like(positions, -1)
        for epoch in np.unique(epochs).tolist():
            here = (epochs == epoch) & (offsets < self.n)
            rows[here] = self.order(epoch)(offsets[here])
        return rows

    def weights(self, position: int, accumulation: int) -> list[float]:
        """How much each micro-batch of the step at `position` counts: its share of the step's samples, times their
        number. All 1 but for a padded step, where the mean over its samples is not the mean over its micro-batches."""
        if self.epoch_length <= self.n:
            return [1.0] * accumulation
        ends = [position + self.micro * part for part in range(accumulation + 1)]
        before = [end // self.epoch_length * self.n + min(end % self.epoch_length, self.n) for end in ends]
        total = max(1, before[-1] - before[0])
        return [accumulation * (end - first) / total for first, end in itertools.pairwise(before)]

    def order(self, epoch: int) -> Order:
        """The order of an epoch; the last few are kept."""
        if epoch not in self._orders:
            while len(self._orders) >= 4:
                del self._orders[next(iter(self._orders))]
            full = self._name == "full"
            self._orders[epoch] = (
                Full(self.n, self._seed, epoch) if full else Interleaved(self.sizes, self._seed, epoch)
            )
        return self._orders[epoch]
