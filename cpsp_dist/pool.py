"""The pool: what every rank knows of the global batch, so that objectives over all ranks are exactly one process'.

Its collectives are the same on every rank at every step, whatever the data: `share_members` (integers), then `gather`
(features, with gradient) for each objective that compares videos.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cpsp_dist.models.parts import unit


def world() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def embed(fusion: Tensor) -> Tensor:
    """One vector a video: the mean of its length-1 segment features (not scaled again). [B, T, D] -> [B, D]."""
    return unit(fusion).mean(1)


def gather(rows: Tensor) -> Tensor:
    """Every rank's rows, in rank order, with gradient. [b, D] -> [W·b, D]; b must be the same on every rank.

    The gradient of a row is the SUM of what all ranks ask of it (reduce-scatter). With rank losses of
    W · local sum / global count, averaged over ranks, parameters then get exactly the gradient of one process.
    Every rank has to take part in the backward pass, also with a loss of zero.
    """
    return rows if world()[1] == 1 else _Gather.apply(rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        out = rows.new_empty(world()[1] * rows.shape[0], *rows.shape[1:])
        dist.all_gather_into_tensor(out, rows.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        out = grad.new_empty(grad.shape[0] // world()[1], *grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad.contiguous(), op=dist.ReduceOp.SUM)
        return out


@dataclass(frozen=True)
class Members:
    """Who is in the global batch: all [W·b] slots, in rank order, the same on every rank."""

    valid: Tensor  # bool
    category: Tensor  # int64, -1: no class
    video: Tensor  # int64
    event: Tensor  # bool: has an event segment
    rank: int
    ranks: int

    @property
    def own(self) -> slice:
        """This rank's slots."""
        slots = len(self.valid) // self.ranks
        return slice(self.rank * slots, (self.rank + 1) * slots)

    @property
    def pooled(self) -> Tensor:
        """[W·b] bool: slots with a real video of known class; the others are no part of the pool."""
        return self.valid & (self.category >= 0)

    def with_negative(self, scope: str) -> Tensor:
        """[W·b] bool: pooled slots with at least one negative in their pool (scope 'gather': all; 'local': the rank's).

        A negative is of another class and another video. Counted by classes and ids, not by pairs: no W·b × W·b table.
        """
        return self._where_pooled(
            scope,
            lambda pool, category, video: (
                _sizes(pool) > _sizes(pool, category) + _sizes(pool, video) - _sizes(pool, category, video)
            ),
        )

    def with_positive(self, scope: str) -> Tensor:
        """[W·b] bool: pooled slots with at least one positive: of the same class, and of another video."""
        return self._where_pooled(
            scope, lambda pool, category, video: _sizes(pool, category) > _sizes(pool, category, video)
        )

    def _where_pooled(self, scope: str, holds: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        pooled = self.pooled
        slots = len(self.valid) // self.ranks
        rank = torch.arange(len(self.valid), device=self.valid.device) // max(slots, 1)
        pool = rank if scope == "local" else torch.zeros_like(rank)
        result = torch.zeros_like(pooled)
        result[pooled] = holds(pool[pooled], self.category[pooled], self.video[pooled])
        return result


def share_members(valid: Tensor, category: Tensor, video: Tensor, event: Tensor) -> Members:
    """Every rank's [b] slots (the same b on every rank): one collective of small integers."""
    rank, ranks = world()
    mine = torch.stack([valid.long(), category, video, event.long()], dim=1)
    if ranks == 1:
        everyone = mine
    else:
        everyone = mine.new_empty(ranks * mine.shape[0], mine.shape[1])
        dist.all_gather_into_tensor(everyone, mine)
    return Members(everyone[:, 0].bool(), everyone[:, 1], everyone[:, 2], everyone[:, 3].bool(), rank, ranks)


def _sizes(*keys: Tensor) -> Tensor:
    """For each row, how many rows have the same keys. [n], … -> [n]."""
    _, group, sizes = torch.unique(torch.stack(keys, dim=1), dim=0, return_inverse=True, return_counts=True)
    return sizes[group]


class Mined(NamedTuple):
    """Which rows of the pool each anchor is compared with."""

    positive: Tensor  # [A] index of the farthest row of its class; the anchor itself where there is no other
    negatives: Tensor  # [A, k] indices of the nearest rows of other classes, in pool order
    chosen: Tensor  # [A, k] bool: the first min(k, number of negatives) of them


@torch.no_grad()
def mine(anchors: Tensor, own: Tensor, rows: Tensor, category: Tensor, video: Tensor, negatives: int) -> Mined:
    """The hardest positive and the `negatives` hardest negatives of each anchor. Ties go to the earlier row.

    Rows of the anchor's own video id are neither. anchors [A, D]; own [A] index of each anchor in the pool; rows
    [N, D], category [N], video [N]: the pool.
    """
    count = len(rows)
    distance = rows.new_empty(len(anchors), 0) if count == 0 else _squared_distances(anchors, rows)
    same_class = category[own].unsqueeze(1) == category
    same_video = video[own].unsqueeze(1) == video
    is_self = own.unsqueeze(1) == torch.arange(count, device=own.device)

    to_positive = torch.where(same_class & ~same_video, distance, -torch.inf)
    to_positive = torch.where(is_self, -1.0, to_positive)  # below any distance, above no row at all
    positive = to_positive.argmax(1) if count else own

    k = min(negatives, count)
    to_negative = torch.where(same_class | same_video, torch.inf, distance)
    farthest = to_negative.topk(k, largest=False).values[:, k - 1 :] if k else to_negative  # [A, 1]
    # topk alone breaks ties as it likes: take all that are nearer than the k-th, then the earliest at its distance.
    nearer, at = to_negative < farthest, (to_negative == farthest) & to_negative.isfinite()
    taken = nearer | (at & (at.cumsum(1) <= k - nearer.sum(1, keepdim=True)))
    order = torch.where(taken, torch.arange(count, device=own.device), count)
    index = order.topk(k, largest=False).values.sort(1).values
    return Mined(positive, index.clamp(max=max(count - 1, 0)), index < count)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """[A, D], [N, D] -> [A, N], never negative."""
    sums = x.square().sum(1, keepdim=True) + y.square().sum(1)
    return torch.addmm(sums, x, y.t(), alpha=-2).clamp(min=0)
