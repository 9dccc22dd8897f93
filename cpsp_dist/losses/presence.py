"""Presence: whether a video has an event at all, found in single segments (weak supervision)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cpsp_dist.losses.global_batch import take
from cpsp_dist.losses.objective import Context, Objective, Step
from cpsp_dist.utils.registry import setting


def presence_loss(event_logits: Tensor, present: Tensor, top: int) -> Tensor:
    """Multiple-instance learning over segments. logits [B, T], present [B] bool -> [B].

    In a video with an event the `top` highest segments are events; which others are is left open. In a video without
    one every segment is background. Binary cross entropy, a mean over the segments that count.
    """
    highest = event_logits.topk(min(top, event_logits.shape[1]), dim=1).values
    return torch.where(present, F.softplus(-highest).mean(1), F.softplus(event_logits).mean(1))


@dataclass(frozen=True)
class PresenceSettings:
    presence_top: int = setting(1, "segments of a video with an event that are taken for events", ge=1)


class Presence(Objective):
    """Takes of the labels only whether a video has an event: the background class of its weak label."""

    inputs = ("event_logits",)
    Settings = PresenceSettings

    def __init__(self, settings: PresenceSettings, context: Context) -> None:
        super().__init__(settings, context)
        self.settings = settings

    def __call__(self, step: Step) -> tuple[Tensor, Tensor]:
        logits = take(step.output.event_logits, step.rows)
        return presence_loss(logits, step.event.any(1), self.settings.presence_top), step.batch.valid
