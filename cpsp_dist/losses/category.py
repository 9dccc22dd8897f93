"""Category: which event a video shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cpsp_dist.losses.global_batch import take
from cpsp_dist.losses.objective import Context, Objective, Step
from cpsp_dist.utils.registry import setting


def category_loss(category_logits: Tensor, category: Tensor) -> Tensor:
    """Cross entropy; 0 for a video without class (-1). logits [B, K], category [B] -> [B].

    Weakly supervised the logits are the video's: the largest over its segments of sigmoid(event) · category logits.
    """
    return F.cross_entropy(category_logits, category, ignore_index=-1, reduction="none")


def weak_category_loss_published(video_logits: Tensor, category: Tensor) -> Tensor:
    """Weak supervision as published: `MultiLabelSoftMarginLoss` of softmax(logits), which it takes for logits.

    Sigmoids of probabilities lie between 0.5 and 0.73, so that even a perfect answer costs 0.69 − 0.38/K. For
    comparison; the default is the cross entropy of the same softmax. logits [B, K], category [B] (-1: gives 0) -> [B].
    """
    target = F.one_hot(category.clamp(min=0), video_logits.shape[1]).to(video_logits.dtype)
    values = F.multilabel_soft_margin_loss(video_logits.softmax(1), target, reduction="none")
    return torch.where(category >= 0, values, 0.0)


@dataclass(frozen=True)
class CategorySettings:
    weak_category: Literal["cross_entropy", "published", "ungated"] = setting(
        "cross_entropy",
        "published: multi-label margin loss of probabilities, as if they were logits; ungated: cross entropy of the "
        "logits over all segments, whatever their event scores, to go with `presence`",
    )


class Category(Objective):
    weight = 1.0
    inputs = ("category_logits", "video_logits")  # the latter with weak supervision
    Settings = CategorySettings

    def __init__(self, settings: CategorySettings, context: Context) -> None:
        super().__init__(settings, context)
        self.settings = settings

    def __call__(self, step: Step) -> tuple[Tensor, Tensor]:
        logits = step.output.category_logits
        gated = self.context.supervision == "weak" and self.settings.weak_category != "ungated"
        if gated:
            if step.output.video_logits is None:
                raise TypeError("weak supervision needs a network that gives video_logits")
            logits = step.output.video_logits
        published = gated and self.settings.weak_category == "published"
        loss = weak_category_loss_published if published else category_loss
        return loss(take(logits, step.rows), step.category), step.batch.has_class
