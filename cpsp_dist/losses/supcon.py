"""The supervised-contrastive form of PSA_V (`mining: supcon`)."""

from __future__ import annotations

from torch import Tensor

from cpsp_dist.losses.tiles import contrast


def supcon(anchors: Tensor, own: Tensor, rows: Tensor, category: Tensor, video: Tensor, temperature: float) -> Tensor:
    """Video level, supervised-contrastive form: a reconstruction, as the published code names one and has none.

    Mean over the positives p of −log( exp(c_p/η) / Σ_j exp(c_j/η) ), c the cosine with the anchor, j over the pool
    without the anchor and other rows of its video (SupCon, Khosla et al. 2020, L_out). 0 for an anchor without
    positive. anchors [A, D]; own [A], their indices in the pool; rows [N, D], category [N], video [N]: the pool -> [A].
    """
    anchor_video, anchor_category = video[own].unsqueeze(1), category[own].unsqueeze(1)

    def masks(first: int, end: int) -> tuple[Tensor, Tensor]:
        other = anchor_video != video[first:end]
        return other, other & (anchor_category == category[first:end])

    return contrast(anchors, rows, masks, temperature)
