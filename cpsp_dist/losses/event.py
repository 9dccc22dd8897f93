"""Event: whether each segment holds an event that is both seen and heard."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cpsp_dist.losses.global_batch import take
from cpsp_dist.losses.objective import Objective, Step


def event_loss(event_logits: Tensor, event: Tensor) -> Tensor:
    """Binary cross entropy of each segment, mean over T. logits [B, T], event [B, T] bool -> [B]."""
    return F.binary_cross_entropy_with_logits(event_logits, event.to(event_logits.dtype), reduction="none").mean(1)


class Event(Objective):
    weight = 1.0
    inputs = ("event_logits",)
    segment_labels = True

    def __call__(self, step: Step) -> tuple[Tensor, Tensor]:
        return event_loss(take(step.output.event_logits, step.rows), step.event), step.batch.valid
