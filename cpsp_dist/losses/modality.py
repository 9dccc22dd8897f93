"""Modality: the category as audio and video find it before they are fused (CMBS, Xia and Zhao, CVPR 2022)."""

from __future__ import annotations

from torch import Tensor

from cpsp_dist.losses.category import category_loss
from cpsp_dist.losses.global_batch import take
from cpsp_dist.losses.objective import Objective, Step


class Modality(Objective):
    """Cross entropy, as of the category itself."""

    weight = 0.0
    inputs = ("modality_logits",)

    def __call__(self, step: Step) -> tuple[Tensor, Tensor]:
        assert step.output.modality_logits is not None
        return category_loss(take(step.output.modality_logits, step.rows), step.category), step.batch.has_class
