"""AVPS: audio-visual pair similarity (pair level)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cpsp_dist.losses.global_batch import take
from cpsp_dist.losses.objective import Objective, Step


def avps(similarity: Tensor, event: Tensor) -> Tensor:
    """Pair level: mean over T of (s/Σs − g/Σg)², s = relu(similarity), g the event mask (paper, eq. 8 and 9).

    A video without event has the target zero for each segment: no pair of it should be alike. similarity [B, T],
    event [B, T] bool -> [B].
    """
    positive = F.relu(similarity)
    target = event.to(similarity.dtype)
    share = positive / (positive.sum(1, keepdim=True) + 1e-8)
    return (share - target / (target.sum(1, keepdim=True) + 1e-6)).square().mean(1)


class AVPS(Objective):
    weight = 100.0
    contrastive = True
    inputs = ("similarity",)
    segment_labels = True

    def __call__(self, step: Step) -> tuple[Tensor, Tensor]:
        return avps(take(step.output.similarity, step.rows), step.event), step.batch.valid
