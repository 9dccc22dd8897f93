"""What every rank knows of the global batch, so that objectives over all ranks are exactly those of one process.

Who is in a pool, and which of its rows count, follows from labels alone. They are on the CPU, whatever the features are
on, so that a GPU is never waited for; indices made of them travel by `to_device`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cpsp_dist.losses.gather import CommStats, rank_and_world
from cpsp_dist.utils.transfer import to_device

Scope = Literal["gather", "local"]


class Rows(NamedTuple):
    """Videos to compare with: a pool, or a part of one."""

    rows: Tensor  # [N, D]
    category: Tensor  # [N] int64
    video: Tensor  # [N] int64


class Members(NamedTuple):
    """Kept slots as indices: of the pool (all ranks', or this rank's), and of this rank. int64."""

    places: Tensor  # [N] the slots of the pool that are kept, among all of them
    category: Tensor  # [N]
    video: Tensor  # [N]
    own: Tensor  # [A] where this rank's kept slots are among the N
    slots: Tensor  # [A] this rank's kept slots, among its b


@dataclass(frozen=True)
class GlobalBatch:
    """The labels of the global batch: all [W·b] slots, in rank order, the same on every rank, on the CPU."""

    valid: Tensor  # bool
    category: Tensor  # int64, -1: no class
    video: Tensor  # int64
    has_event: Tensor  # bool: has an event segment
    rank: int
    ranks: int
    parts: int = 1  # that a rank's slots are of, one after the other: W ranks · A parts · slots of a part
    _known: dict[tuple[str, str], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def local(self) -> slice:
        """This rank's slots."""
        slots = len(self.valid) // self.ranks
        return slice(self.rank * slots, (self.rank + 1) * slots)

    @property
    def has_class(self) -> Tensor:
        """[W·b] bool: slots with a real video of known class; the others are no part of the pool."""
        return self.valid & (self.category >= 0)

    def in_sample_order(self, kept: Tensor) -> Tensor:
        """kept [W·b] bool -> [N] int64: the kept slots' places among themselves, in the order of the samples: part by
        part, and in each part rank by rank, so that it does not depend on the number of ranks."""
        places = torch.where(kept, kept.cumsum(0) - 1, -1).view(self.ranks, self.parts, -1).transpose(0, 1).flatten()
        return places[places >= 0]

    def local_positions(self, kept: Tensor) -> Tensor:
        """kept [W·b] bool -> where the kept slots of this rank are among all kept slots."""
        return (kept.cumsum(0) - 1)[self.local][kept[self.local]]

    def members(self, kept: Tensor, scope: Scope, device: torch.device) -> Members:
        """kept [W·b] bool -> the kept slots of the pool of this scope, on `device`."""
        where = slice(None) if scope == "gather" else self.local
        slots = indices(kept[self.local])
        own = self.local_positions(kept) if scope == "gather" else torch.arange(len(slots))
        pool = kept[where]
        return Members(
            *to_device([indices(pool), self.category[where][pool], self.video[where][pool], own, slots], device)
        )

    def with_negative(self, scope: Scope, remembered: Rows | None = None) -> Tensor:
        """[W·b] bool: pooled slots with at least one negative in their pool (scope 'gather': all; 'local': the rank's).

        A negative is of another class and another video. Counted by classes and ids, not by pairs: no W·b × W·b table.
        """

        def has_negative(pool: np.ndarray, category: np.ndarray, video: np.ndarray) -> np.ndarray:
            others = _sizes(pool, category) + _sizes(pool, video) - _sizes(pool, category, video)
            found: np.ndarray = _sizes(pool) > others
            return found

        return self._where_in_pool("negative", scope, remembered, has_negative)

    def with_positive(self, scope: Scope, remembered: Rows | None = None) -> Tensor:
        """[W·b] bool: pooled slots with at least one positive: of the same class, and of another video."""

        def has_positive(pool: np.ndarray, category: np.ndarray, video: np.ndarray) -> np.ndarray:
            return _sizes(pool, category) > _sizes(pool, category, video)

        return self._where_in_pool("positive", scope, remembered, has_positive)

    def _where_in_pool(
        self,
        name: str,
        scope: Scope,
        remembered: Rows | None,
        holds: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    ) -> Tensor:
        """Without a bank it is found once: while the batch is read, where `prepare` asks for it then."""
        if remembered is None and (name, scope) in self._known:
            return self._known[name, scope]
        pooled = self.has_class.numpy()
        slots = len(pooled) // self.ranks
        pool = np.arange(len(pooled)) // max(slots, 1) if scope == "local" else np.zeros(len(pooled), dtype=np.int64)
        keys = [pool[pooled], self.category.numpy()[pooled], self.video.numpy()[pooled]]
        if remembered is not None:
            more = (np.zeros(len(remembered.video), dtype=np.int64), *(x.numpy() for x in remembered[1:]))
            keys = [np.concatenate(pair) for pair in zip(keys, more, strict=True)]
        result = np.zeros_like(pooled)
        result[pooled] = holds(*keys)[: np.count_nonzero(pooled)]
        found = torch.from_numpy(result)
        if remembered is None:
            self._known[name, scope] = found
        return found


def gather_labels(
    valid: Tensor, category: Tensor, video: Tensor, event: Tensor, stats: CommStats | None = None, *, parts: int = 1
) -> GlobalBatch:
    """The labels of every rank's [b] slots (the same b on every rank): one collective of small integers.

    For where they do not follow from the order of samples alone. A GPU is waited for.
    """
    rank, ranks = rank_and_world()
    own = torch.stack([valid.long(), category, video, event.long()], dim=1)
    gathered = own
    if ranks > 1:
        stats = stats or CommStats()
        stats.count((ranks - 1) * own.nbytes)
        gathered = own.new_empty(ranks * own.shape[0], own.shape[1])
        with stats.waiting(own.device):
            dist.all_gather_into_tensor(gathered, own)
    gathered = gathered.cpu()
    return GlobalBatch(gathered[:, 0].bool(), gathered[:, 1], gathered[:, 2], gathered[:, 3].bool(), rank, ranks, parts)


def indices(mask: Tensor) -> Tensor:
    """Where a mask of the CPU is true. [n] bool -> [k] int64."""
    return mask.nonzero().squeeze(1)


def take(x: Tensor, places: Tensor) -> Tensor:
    """x[places]: rows of x in order, each at most once; a view where these are all of them.

    A view and not x itself: gradients are added up in the same order then.
    """
    return x.view_as(x) if len(places) == len(x) else x[places]


def _sizes(*keys: np.ndarray) -> np.ndarray:
    """For each row, how many rows have the same keys. [n], … -> [n]."""
    numbers = keys[0]
    for key in keys[1:]:
        values, inverse = np.unique(key, return_inverse=True)
        numbers = numbers * len(values) + inverse
    _, group, sizes = np.unique(numbers, return_inverse=True, return_counts=True)
    of_each_row: np.ndarray = sizes[group]
    return of_each_row
