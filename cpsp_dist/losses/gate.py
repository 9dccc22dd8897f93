"""Gate: whether both modalities take a segment for an event (CMBS, Xia and Zhao, CVPR 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from cpsp_dist.losses.global_batch import take
from cpsp_dist.losses.objective import Context, Objective, Step
from cpsp_dist.utils.registry import setting


def gate_loss(gate: Tensor, event: Tensor) -> Tensor:
    """Binary cross entropy of each segment, mean over T. gate [B, T], 0 to 1, event [B, T] bool -> [B]."""
    return F.binary_cross_entropy(gate, event.to(gate.dtype), reduction="none").mean(1)


def gate_loss_published(gate: Tensor, event: Tensor) -> Tensor:
    """The published form takes the gate, a product of two sigmoids, for a logit: what it makes of it lies between 0.5
    and 0.73, so that a background segment costs 0.69 at best. For comparison. Shapes as in `gate_loss`."""
    return F.binary_cross_entropy_with_logits(gate, event.to(gate.dtype), reduction="none").mean(1)


@dataclass(frozen=True)
class GateSettings:
    gate_form: Literal["probability", "published"] = setting(
        "probability", "of the gate objective; published: the gate, a probability, is taken for a logit"
    )


class Gate(Objective):
    weight = 0.0
    inputs = ("gate",)
    segment_labels = True
    Settings = GateSettings

    def __init__(self, settings: GateSettings, context: Context) -> None:
        super().__init__(settings, context)
        self.loss = gate_loss if settings.gate_form == "probability" else gate_loss_published

    def __call__(self, step: Step) -> tuple[Tensor, Tensor]:
        assert step.output.gate is not None
        return self.loss(take(step.output.gate, step.rows), step.event), step.batch.valid
