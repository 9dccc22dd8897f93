"""Contrast: a video's event segments are alike, and unlike its background (CACE-Net, He et al., ACM MM 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cpsp_dist.losses.global_batch import take
from cpsp_dist.losses.objective import Context, Objective, Step
from cpsp_dist.utils.registry import setting


def contrast(views: Tensor, event: Tensor, temperature: float) -> Tensor:
    """Supervised contrast within each video, over two views of each segment.

    The positives of an event segment are both views of all event segments but itself; a background segment has its
    other view alone. With c the cosine, mean over all 2T segments i of −log( mean_{p∈P_i} exp(c_ip/τ) / Σ_{a≠i}
    exp(c_ia/τ) ). views [B, 2, T, D] of length 1, event [B, T] bool -> [B].
    """
    segments = views.shape[2]
    both = views.flatten(1, 2)
    scaled = torch.bmm(both, both.transpose(1, 2)) / temperature  # [B, 2T, 2T]
    itself = torch.eye(2 * segments, dtype=torch.bool, device=views.device)
    other_view = itself.roll(segments, 0)
    event = event.repeat(1, 2)
    positive = (event.unsqueeze(1) & event.unsqueeze(2) & ~itself) | other_view
    # Not -inf: a row of nothing but -inf has a gradient of NaN.
    lowest = torch.finfo(scaled.dtype).min / 4
    alike = torch.where(positive, scaled, lowest).logsumexp(2) - positive.sum(2).to(scaled.dtype).log()
    return (torch.where(itself, lowest, scaled).logsumexp(2) - alike).mean(1)


@dataclass(frozen=True)
class ContrastSettings:
    contrast_temperature: float = setting(0.01, "of the contrast objective", gt=0)


class Contrast(Objective):
    """0 as long as the network gives no views: see its setting `enhanced_from`."""

    weight = 0.0
    contrastive = True
    inputs = ("views",)
    segment_labels = True
    Settings = ContrastSettings

    def __init__(self, settings: ContrastSettings, context: Context) -> None:
        super().__init__(settings, context)
        self.temperature = settings.contrast_temperature

    def __call__(self, step: Step) -> tuple[Tensor, Tensor]:
        views = step.output.views
        if views is None:
            return step.output.event_logits.new_zeros(len(step.rows)), step.batch.valid
        return contrast(take(views, step.rows), step.event, self.temperature), step.batch.valid
