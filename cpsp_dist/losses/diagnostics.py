"""Diagnostics of the pool: what an anchor is compared with, and how hard that is."""

from __future__ import annotations

import torch
from torch import Tensor

from cpsp_dist.losses.global_batch import Rows
from cpsp_dist.losses.mining import Mined, squared_distances

#: What `Objectives.health` gives, as `pool/NAME`.
POOL_METRICS = (
    "size",
    "remembered",
    "anchors_with_positive",
    "active_hinges",
    "positive_distance",
    "negative_distance",
    "suspected_false_negatives",
    "gather_ms",
    "gather_bytes",
)


@torch.no_grad()
def pair_diagnostics(anchors: Tensor, own: Tensor, pool: Rows, mined: Mined | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums and counts over this rank's anchors, by name, to be added up over ranks and divided.

    `suspected_false_negatives` are mined negatives as near to the anchor as the nearer nine tenths of its positives
    are (the farthest tenth may itself be mislabelled): the event may well be the same, and the label another. As long
    as classes lie within each other that is most of them; the figure means something once they have separated. Only
    `anchors_with_positive` where nothing is mined (supcon).
    """
    positive = (pool.category[own].unsqueeze(1) == pool.category) & (pool.video[own].unsqueeze(1) != pool.video)
    has = positive.any(1)
    found = {"anchors_with_positive": (has.sum(), has.new_tensor(len(has), dtype=torch.int64))}
    if mined is None or not len(pool.rows):
        return found
    distance = squared_distances(anchors, pool.rows).sqrt()
    nearest_first = distance.masked_fill(~positive, torch.inf).sort(1).values
    nine_tenths = nearest_first.gather(1, ((positive.sum(1, keepdim=True) * 9 + 9) // 10 - 1).clamp(min=0))
    considered = mined.mask & has.unsqueeze(1)
    suspected = considered & (distance.gather(1, mined.negatives) <= nine_tenths)
    to_positive = (anchors - pool.rows[mined.positive]).norm(dim=-1)[has]
    to_negatives = (anchors.unsqueeze(1) - pool.rows[mined.negatives]).norm(dim=-1)[mined.mask]
    return found | {
        "positive_distance": (to_positive.sum(), has.sum()),
        "negative_distance": (to_negatives.sum(), mined.mask.sum()),
        "suspected_false_negatives": (suspected.sum(), considered.sum()),
    }
