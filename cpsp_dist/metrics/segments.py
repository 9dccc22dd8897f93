"""The AVEL metric: the share of segments whose label is right, and what lies behind it by category.

A segment is right when its label is; background is a label of its own, number K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpsp_dist.data.batch import Batch
from cpsp_dist.metrics.metric import Metric, predict, share
from cpsp_dist.models.layers import Output


def confusion(output: Output, batch: Batch) -> Tensor:
    """How many segments of label i were given label j. [K+1, K+1] int64."""
    size = output.category_logits.shape[1] + 1
    pairs = batch.segment_labels(size - 1) * size + predict(output)
    return torch.bincount(pairs[batch.valid].flatten(), minlength=size * size).view(size, size)


def accuracy(confusion: Tensor) -> float:
    """The share of segments that are right, 0 to 1 (0 where nothing was counted)."""
    return share(confusion.trace(), confusion.sum())


class Segments(Metric):
    """accuracy; event_accuracy (event or background, whatever the category); categories: of each, with 'background'
    last, precision, recall, f1, and segments (how many there are); confusion: the counts as lists."""

    reported = ("accuracy", "event_accuracy")

    def shape(self, categories: int, seconds: int) -> tuple[int, ...]:
        return categories + 1, categories + 1

    def count(self, output: Output, batch: Batch) -> Tensor:
        return confusion(output, batch)

    def result(self) -> dict[str, Any]:
        counts = self.counts
        right, answered, present = counts.diag(), counts.sum(0), counts.sum(1)
        return {
            "accuracy": accuracy(counts),
            "event_accuracy": share(counts[:-1, :-1].sum() + counts[-1, -1], counts.sum()),
            "categories": {
                name: {
                    "precision": share(right[i], answered[i]),
                    "recall": share(right[i], present[i]),
                    "f1": share(2 * right[i], answered[i] + present[i]),
                    "segments": int(present[i]),
                }
                for i, name in enumerate([*self.categories, "background"])
            },
            "confusion": counts.tolist(),
        }

    @classmethod
    def summary(cls, result: dict[str, Any]) -> list[str]:
        return [
            f"segment accuracy {100 * result['accuracy']:.2f} %, of event or background alone "
            f"{100 * result['event_accuracy']:.2f} %"
        ]
