"""The F1 of event boundaries.

A boundary lies between two seconds of which one is event and the other background, whatever the category.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpsp_dist.data.batch import Batch
from cpsp_dist.metrics.metric import Metric, predict, share
from cpsp_dist.models.layers import Output


class Boundaries(Metric):
    """boundary_f1."""

    reported = ("boundary_f1",)

    def shape(self, categories: int, seconds: int) -> tuple[int, ...]:
        return (3,)

    def count(self, output: Output, batch: Batch) -> Tensor:
        """Boundaries found, invented and missed. [3] int64."""
        answered = predict(output) < output.category_logits.shape[1]
        truth, answer = (x[batch.valid].long().diff(dim=1) != 0 for x in (batch.event, answered))
        return torch.stack([(truth & answer).sum(), (answer & ~truth).sum(), (truth & ~answer).sum()])

    def result(self) -> dict[str, Any]:
        found, invented, missed = self.counts.tolist()
        return {"boundary_f1": share(2 * found, 2 * found + invented + missed)}

    @classmethod
    def summary(cls, result: dict[str, Any]) -> list[str]:
        return [f"event-boundary F1 {100 * result['boundary_f1']:.1f} %"]
