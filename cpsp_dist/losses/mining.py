"""Mining: which rows of the pool each anchor is compared with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
    distance = squared_distances(anchors, rows)
    other = video[own].unsqueeze(1) != video
    same_class = category[own].unsqueeze(1) == category

    to_positive = distance.masked_fill(~(same_class & other), -torch.inf)
    to_positive.scatter_(1, own.unsqueeze(1), -1.0)  # the anchor itself: below any distance, above -inf
    farthest_positive, positive = to_positive.max(1, keepdim=True)

    key = distance.masked_fill_(same_class | ~other, torch.inf)
    if semihard:
        beyond = key.isfinite() & (key > farthest_positive)
        fallback = torch.where(key.isfinite(), -key, torch.inf)
        key = torch.where(beyond.any(1, keepdim=True), key.masked_fill(~beyond, torch.inf), fallback)
    return Mined(positive.squeeze(1), *_smallest(key, min(negatives, count)))


def _smallest(key: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The columns of the k smallest finite entries of each row, in column order. [A, N] -> [A, k], [A, k] bool.

    topk breaks ties in no defined order: take all below the k-th value, then the earliest at it.
    """
    largest = key.topk(k, largest=False).values[:, -1:]
    below, at = key < largest, (key == largest) & key.isfinite()
    taken = below | (at & (at.cumsum(1, dtype=torch.int32) <= k - below.sum(1, keepdim=True)))
    count = key.shape[1]
    columns = torch.where(taken, torch.arange(count, device=key.device), count)
    index = columns.topk(k, largest=False, sorted=True).values  # the shape does not depend on the values: no host sync
    found = torch.arange(k, device=key.device) < taken.sum(1, keepdim=True)
    return index.masked_fill_(~found, 0), found


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """[A, D], [N, D] -> [A, N], never negative."""
    sums = x.square().sum(1, keepdim=True) + y.square().sum(1)
    return sums.addmm_(x, y.t(), alpha=-2).clamp_(min=0)
