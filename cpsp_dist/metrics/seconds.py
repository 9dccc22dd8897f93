"""The accuracy at each second of the videos."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpsp_dist.data.batch import Batch
from cpsp_dist.metrics.metric import Metric, predict, share
from cpsp_dist.models.layers import Output


class Seconds(Metric):
    """seconds: the share of segments that are right, at each second."""

    def shape(self, categories: int, seconds: int) -> tuple[int, ...]:
        return seconds, 2

    def count(self, output: Output, batch: Batch) -> Tensor:
        """How many segments are right, and how many there are, at each second. [T, 2] int64."""
        right = predict(output) == batch.segment_labels(output.category_logits.shape[1])
        counted = batch.valid.unsqueeze(1).expand_as(right)
        return torch.stack([(right & counted).sum(0), counted.sum(0)], dim=1)

    def result(self) -> dict[str, Any]:
        return {"seconds": [share(right, total) for right, total in self.counts.tolist()]}

    @classmethod
    def summary(cls, result: dict[str, Any]) -> list[str]:
        return ["accuracy at each second (%): " + " ".join(f"{100 * each:.0f}" for each in result["seconds"])]
