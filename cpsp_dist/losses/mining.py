"""Mining: which rows of the pool each anchor is compared with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cpsp_dist.losses.tiles import columns


class Mined(NamedTuple):
    """Which rows of the pool each anchor is compared with."""

    positive: Tensor  # [A] index of the farthest row of its class; the anchor itself where there is no other
    negatives: Tensor  # [A, k] indices of the mined rows of other classes, in pool order
    mask: Tensor  # [A, k] bool: the first min(k, number of negatives) of them


@torch.no_grad()
def mine(
    anchors: Tensor,
    own: Tensor,
    rows: Tensor,
    category: Tensor,
    video: Tensor,
    negatives: int,
    *,
    semihard: bool = False,
) -> Mined:
    """The hardest positive and `negatives` negatives of each anchor. Ties go to the earlier row.

    Negatives are the nearest ones; with `semihard` the nearest of those farther than the hardest positive, or, where
    there is none such, the farthest. Rows of the anchor's own video id are neither positive nor negative.
    anchors [A, D]; own [A] index of each anchor in the pool; rows [N, D], category [N], video [N]: the pool.
    """
    count = len(rows)
    if count == 0:
        nothing = own.new_empty(len(own), 0)
        return Mined(own, nothing, nothing.bool())
    anchor_category, anchor_video = category[own].unsqueeze(1), video[own].unsqueeze(1)

    def tile(first: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """(squared distances, is positive, is negative) [A, n] of the columns first … end."""
        other = anchor_video != video[first:end]
        same_class = anchor_category == category[first:end]
        return squared_distances(anchors, rows[first:end]), same_class & other, ~same_class & other

    k = min(negatives, count)
    # The anchor itself lies below any distance.
    farthest, positive = anchors.new_full((len(own),), -1.0), own
    nearest, beyond = _Nearest(k), _Nearest(k)
    for first, end in columns(max(anchors.shape), count, rows.device):
        distance, same, negative = tile(first, end)
        value, place = distance.masked_fill(~same, -torch.inf).max(1)
        farther = value > farthest
        farthest, positive = torch.where(farther, value, farthest), torch.where(farther, place + first, positive)
        # Where none is beyond the hardest positive, semihard takes the farthest.
        nearest.add((distance.neg_() if semihard else distance).masked_fill_(~negative, torch.inf), first)
    if not semihard:
        return Mined(positive, *nearest.found())
    for first, end in columns(max(anchors.shape), count, rows.device):
        distance, _, negative = tile(first, end)
        beyond.add(distance.masked_fill_(~negative | (distance <= farthest.unsqueeze(1)), torch.inf), first)
    some = beyond.key.isfinite().any(1, keepdim=True)
    nearest.key = torch.where(some, beyond.key, nearest.key)
    nearest.index = torch.where(some, beyond.index, nearest.index)
    return Mined(positive, *nearest.found())


class _Nearest:
    """The k columns with the smallest finite keys, in column order, of tiles that come from left to right."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.key, self.index = torch.empty(0), torch.empty(0)

    def add(self, key: Tensor, first: int) -> None:
        """key [A, n]: of the columns from `first` on; inf: never to be taken."""
        place, found = _smallest(key, min(self.k, key.shape[1]))
        key, index = key.gather(1, place).masked_fill_(~found, torch.inf), place + first
        if len(self.key):
            key, index = torch.cat([self.key, key], 1), torch.cat([self.index, index], 1)
            place, found = _smallest(key, min(self.k, key.shape[1]))
            key, index = key.gather(1, place).masked_fill_(~found, torch.inf), index.gather(1, place)
        self.key, self.index = key, index

    def found(self) -> tuple[Tensor, Tensor]:
        """[A, k] columns, and which of these entries are any; those come first."""
        found = self.key.isfinite()
        return self.index.masked_fill(~found, 0), found


def _smallest(key: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The columns of the k smallest finite entries of each row, in column order. [A, N] -> [A, k], [A, k] bool.

    topk breaks ties in no defined order: of the entries that equal the k-th, the earliest are taken.
    """
    count = key.shape[1]
    values, places = key.topk(k, largest=False)
    last = values[:, -1:]
    numbers = torch.arange(count, device=key.device, dtype=torch.int32)
    # The shapes do not depend on the values: no host sync.
    tied = torch.where(key == last, numbers, count).topk(k, largest=False, sorted=True).values.long()
    below = values < last
    wanted = (torch.arange(k, device=key.device) < k - below.sum(1, keepdim=True)) & last.isfinite()
    both = torch.cat([torch.where(below, places, count), torch.where(wanted, tied, count)], 1)
    index = both.topk(k, largest=False, sorted=True).values
    found = index < count
    return index.masked_fill_(~found, 0), found


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """[A, D], [N, D] -> [A, N], never negative."""
    sums = x.square().sum(1, keepdim=True) + y.square().sum(1)
    return sums.addmm_(x, y.t(), alpha=-2).clamp_(min=0)
