"""SSPSP: self-supervised, an audio segment against all visual segments of the pool."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cpsp_dist.losses.global_batch import take
from cpsp_dist.losses.objective import Context, Objective, Step
from cpsp_dist.losses.tiles import contrast
from cpsp_dist.models.layers import Output
from cpsp_dist.utils.registry import setting


def sspsp(audio: Tensor, own: Tensor, visual: Tensor, temperature: float) -> Tensor:
    """Self-supervised: each audio segment finds the visual segment of its second among all of the pool.

    Mean over T of −log( exp(c_own/τ) / Σ_j exp(c_j/τ) ), c the cosine with the audio segment. audio [B, T, D];
    own [B], the videos' indices in the pool; visual [N, T, D], the pool -> [B].
    """
    videos, segments, width = audio.shape
    target = (own.unsqueeze(1) * segments + torch.arange(segments, device=own.device)).reshape(-1, 1)

    def masks(first: int, end: int) -> tuple[None, Tensor]:
        return None, target == torch.arange(first, end, device=own.device)

    values = contrast(audio.reshape(-1, width), visual.reshape(-1, width), masks, temperature)
    return values.view(videos, segments).mean(1)


@dataclass(frozen=True)
class SSPSPSettings:
    sspsp_temperature: float = setting(0.1, "of SSPSP", gt=0)


class SSPSP(Objective):
    inputs = ("audio", "visual")
    contrastive = True
    Settings = SSPSPSettings

    def __init__(self, settings: SSPSPSettings, context: Context) -> None:
        super().__init__(settings, context)
        self.settings = settings

    def pooled_features(self, output: Output) -> Tensor:
        return output.visual

    def __call__(self, step: Step) -> tuple[Tensor, Tensor]:
        assert step.pooled is not None
        visual, own = step.pooled.rows(step.batch.valid, step.batch)
        values = sspsp(take(step.output.audio, step.rows), own, visual, self.settings.sspsp_temperature)
        return values, step.batch.valid
