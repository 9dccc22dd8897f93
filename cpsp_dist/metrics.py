"""The AVEL metric, and what lies behind one number: by category, by second, at the boundaries of events.

A segment is right when its label is; background is a label of its own, number K. Everything is counted in integers, so
that sums over batches and ranks are exact; padding is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cpsp_dist.data.batch import Batch
from cpsp_dist.models.parts import Output


def predict(output: Output) -> Tensor:
    """The label of each segment: the video's likeliest category where the segment is an event, else K. [B, T] int64."""
    categories = output.category_logits.shape[1]
    category = output.category_logits.argmax(1, keepdim=True)
    return torch.where(output.event_logits.sigmoid() > 0.5, category, categories)


def confusion(output: Output, batch: Batch) -> Tensor:
    """How many segments of label i were given label j. [K+1, K+1] int64."""
    size = output.category_logits.shape[1] + 1
    pairs = batch.segment_labels(size - 1) * size + predict(output)
    return torch.bincount(pairs[batch.valid].flatten(), minlength=size * size).view(size, size)


def by_second(output: Output, batch: Batch) -> Tensor:
    """How many segments are right, and how many there are, at each second. [T, 2] int64."""
    right = predict(output) == batch.segment_labels(output.category_logits.shape[1])
    counted = batch.valid.unsqueeze(1).expand_as(right)
    return torch.stack([(right & counted).sum(0), counted.sum(0)], dim=1)


def boundaries(output: Output, batch: Batch) -> Tensor:
    """Boundaries found, invented and missed. [3] int64.

    A boundary lies between two seconds of which one is event and the other background, whatever the category.
    """
    answered = predict(output) < output.category_logits.shape[1]
    truth, answer = (x[batch.valid].long().diff(dim=1) != 0 for x in (batch.event, answered))
    return torch.stack([(truth & answer).sum(), (answer & ~truth).sum(), (truth & ~answer).sum()])


def accuracy(confusion: Tensor) -> float:
    """The share of segments that are right, 0 to 1 (0 where nothing was counted)."""
    return confusion.trace().item() / max(int(confusion.sum()), 1)


def breakdown(confusion: Tensor, by_second: Tensor, boundaries: Tensor, categories: Sequence[str]) -> dict[str, Any]:
    """The counts as shares, ready for JSON; a share of nothing is 0.

    Returns:
        accuracy; event_accuracy (event or background, whatever the category); boundary_f1; seconds: the accuracy at
        each; categories: of each, with 'background' last, precision, recall, f1, and segments (how many there are);
        confusion: the counts as lists.
    """
    right, answered, present = confusion.diag(), confusion.sum(0), confusion.sum(1)
    found, invented, missed = boundaries.tolist()
    return {
        "accuracy": accuracy(confusion),
        "event_accuracy": _share(confusion[:-1, :-1].sum() + confusion[-1, -1], confusion.sum()),
        "boundary_f1": _share(2 * found, 2 * found + invented + missed),
        "seconds": [_share(*counts) for counts in by_second.tolist()],
        "categories": {
            name: {
                "precision": _share(right[i], answered[i]),
                "recall": _share(right[i], present[i]),
                "f1": _share(2 * right[i], answered[i] + present[i]),
                "segments": int(present[i]),
            }
            for i, name in enumerate([*categories, "background"])
        },
        "confusion": confusion.tolist(),
    }


def _share(part: Tensor | int, whole: Tensor | int) -> float:
    return int(part) / max(int(whole), 1)
