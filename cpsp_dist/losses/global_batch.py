"""What every rank knows of the global batch, so that objectives over all ranks are exactly those of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cpsp_dist.losses.gather import CommStats, rank_and_world


class Rows(NamedTuple):
    """Videos to compare with: a pool, or a part of one."""

    rows: Tensor  # [N, D]
    category: Tensor  # [N] int64
    video: Tensor  # [N] int64


@dataclass(frozen=True)
class GlobalBatch:
    """The labels of the global batch: all [W·b] slots, in rank order, the same on every rank."""

    valid: Tensor  # bool
    category: Tensor  # int64, -1: no class
    video: Tensor  # int64
    has_event: Tensor  # bool: has an event segment
    rank: int
    ranks: int

    @property
    def local(self) -> slice:
        """This rank's slots."""
        slots = len(self.valid) // self.ranks
        return slice(self.rank * slots, (self.rank + 1) * slots)

    @property
    def has_class(self) -> Tensor:
        """[W·b] bool: slots with a real video of known class; the others are no part of the pool."""
        return self.valid & (self.category >= 0)

    def local_positions(self, kept: Tensor) -> Tensor:
        """kept [W·b] bool -> where the kept slots of this rank are among all kept slots."""
        return (kept.cumsum(0) - 1)[self.local][kept[self.local]]

    def with_negative(self, scope: str, remembered: Rows | None = None) -> Tensor:
        """[W·b] bool: pooled slots with at least one negative in their pool (scope 'gather': all; 'local': the rank's).

        A negative is of another class and another video. Counted by classes and ids, not by pairs: no W·b × W·b table.
        """
        return self._where_in_pool(
            scope,
            remembered,
            lambda pool, category, video: (
                _sizes(pool) > _sizes(pool, category) + _sizes(pool, video) - _sizes(pool, category, video)
            ),
        )

    def with_positive(self, scope: str, remembered: Rows | None = None) -> Tensor:
        """[W·b] bool: pooled slots with at least one positive: of the same class, and of another video."""
        return self._where_in_pool(
            scope, remembered, lambda pool, category, video: _sizes(pool, category) > _sizes(pool, category, video)
        )

    def _where_in_pool(self, scope: str, remembered: Rows | None, holds: Callable[..., Tensor]) -> Tensor:
        pooled = self.has_class
        slots = len(self.valid) // self.ranks
        rank = torch.arange(len(self.valid), device=self.valid.device) // max(slots, 1)
        pool = rank if scope == "local" else torch.zeros_like(rank)
        keys = [pool[pooled], self.category[pooled], self.video[pooled]]
        if remembered is not None:
            more = (torch.zeros_like(remembered.video), remembered.category, remembered.video)
            keys = [torch.cat(pair) for pair in zip(keys, more, strict=True)]
        result = torch.zeros_like(pooled)
        result[pooled] = holds(*keys)[: int(pooled.sum())]
        return result


def gather_labels(
    valid: Tensor, category: Tensor, video: Tensor, event: Tensor, stats: CommStats | None = None
) -> GlobalBatch:
    """The labels of every rank's [b] slots (the same b on every rank): one collective of small integers."""
    rank, ranks = rank_and_world()
    own = torch.stack([valid.long(), category, video, event.long()], dim=1)
    gathered = own
    if ranks > 1:
        stats = stats or CommStats()
        stats.count((ranks - 1) * own.nbytes)
        gathered = own.new_empty(ranks * own.shape[0], own.shape[1])
        with stats.waiting(own.device):
            dist.all_gather_into_tensor(gathered, own)
    return GlobalBatch(gathered[:, 0].bool(), gathered[:, 1], gathered[:, 2], gathered[:, 3].bool(), rank, ranks)


def _sizes(*keys: Tensor) -> Tensor:
    """For each row, how many rows have the same keys. [n], … -> [n]."""
    _, group, sizes = torch.unique(torch.stack(keys, dim=1), dim=0, return_inverse=True, return_counts=True)
    of_each_row: Tensor = sizes[group]
    return of_each_row
