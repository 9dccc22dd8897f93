"""What a metric is: integer counts that add up over batches and ranks, and a result that is made of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from cpsp_dist.data.batch import Batch
from cpsp_dist.models.layers import Output


class Metric(ABC):
    """One metric on one split.

    Attributes:
        counts: int64, of any shape; what `update` adds to. Sums over ranks are put in its place before `result`.
        reported: keys of `result` that are shares, 0 to 1: reported in percent, in final results and MLflow.
    """

    counts: Tensor
    reported: ClassVar[tuple[str, ...]] = ()

    def __init__(self, categories: Sequence[str], seconds: int) -> None:
        """categories: names, in class order; seconds: T. Makes `counts`, all zero."""
        self.categories = categories
        self.counts = torch.zeros(self.shape(len(categories), seconds), dtype=torch.int64)

    @abstractmethod
    def shape(self, categories: int, seconds: int) -> tuple[int, ...]:
        """Of `counts`."""

    @abstractmethod
    def count(self, output: Output, batch: Batch) -> Tensor:
        """What a batch adds to the counts; padding adds nothing."""

    def update(self, output: Output, batch: Batch) -> None:
        self.counts += self.count(output, batch).cpu()

    @abstractmethod
    def result(self) -> dict[str, Any]:
        """The counts as values that are ready for JSON; a share of nothing is 0."""

    @classmethod
    def summary(cls, result: dict[str, Any]) -> list[str]:
        """Lines for people. result: of all metrics."""
        return [f"{name.replace('_', ' ')} {100 * result[name]:.2f} %" for name in cls.reported]


def predict(output: Output) -> Tensor:
    """The label of each segment: the video's likeliest category where the segment is an event, else K. [B, T] int64."""
    categories = output.category_logits.shape[1]
    category = output.category_logits.argmax(1, keepdim=True)
    return torch.where(output.event_logits.sigmoid() > 0.5, category, categories)


def share(part: Tensor | int, total: Tensor | int) -> float:
    """part / total; 0 of nothing."""
    return int(part) / max(int(total), 1)
