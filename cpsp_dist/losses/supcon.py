"""The supervised-contrastive form of PSA_V (`mining: supcon`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cpsp_dist.models.layers import l2_normalize


def supcon(anchors: Tensor, own: Tensor, rows: Tensor, category: Tensor, video: Tensor, temperature: float) -> Tensor:
    """Video level, supervised-contrastive form: a reconstruction, as the published code names one and has none.

    Mean over the positives p of −log( exp(c_p/η) / Σ_j exp(c_j/η) ), c the cosine with the anchor, j over the pool
    without the anchor and other rows of its video (SupCon, Khosla et al. 2020, L_out). 0 for an anchor without
    positive. anchors [A, D]; own [A], their indices in the pool; rows [N, D], category [N], video [N]: the pool -> [A].
    """
    scaled = l2_normalize(anchors) @ l2_normalize(rows).t() / temperature
    other = video[own].unsqueeze(1) != video
    positive = other & (category[own].unsqueeze(1) == category)
    # The zero column keeps an empty pool, and an anchor that is alone, from having no largest value.
    lowest = torch.finfo(scaled.dtype).min / 4
    padded = F.pad(torch.where(other, scaled, lowest), (0, 1), value=lowest)
    log_share = scaled - padded.logsumexp(1, keepdim=True)
    found = positive.sum(1)
    return -torch.where(positive, log_share, 0.0).sum(1) / found.clamp(min=1)
