"""A model's answers on all videos of a split, and what follows from them; nothing here knows of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cpsp_dist.data.batch import Batch
from cpsp_dist.metrics import METRICS
from cpsp_dist.models import Output

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Answers:
    """Of N videos of T segments, K categories.

    Attributes:
        keys: of the samples. categories: K names; seconds: that a segment lasts.
        truth_category: [N], -1 where there is none. truth_event: [N, T].
        event_logits: [N, T]. category_logits: [N, K]. embedding: [N, D] mean of the fused segment features,
            where it is known.
    """

    keys: Sequence[str]
    categories: Sequence[str]
    seconds: float
    truth_category: Ints
    truth_event: Bools
    event_logits: Floats
    category_logits: Floats
    embedding: Floats | None

    @cached_property
    def probability(self) -> Floats:
        """[N, T] that the segment is an event; more than 0.5 is one."""
        return torch.from_numpy(self.event_logits).sigmoid().numpy()

    @cached_property
    def category_probability(self) -> Floats:
        """[N, K]."""
        return torch.from_numpy(self.category_logits).double().softmax(1).numpy()

    @cached_property
    def category(self) -> Ints:
        """[N] the likeliest."""
        likeliest: Ints = np.argmax(self.category_logits, axis=1).astype(np.int64)
        return likeliest

    @cached_property
    def labels(self) -> Ints:
        """[N, T] as the model has them, K for background."""
        return np.where(self.probability > 0.5, self.category[:, None], len(self.categories))

    @cached_property
    def truth(self) -> Ints:
        """[N, T] the true labels."""
        return np.where(self.truth_event, self.truth_category[:, None], len(self.categories))

    @cached_property
    def errors(self) -> Ints:
        """[N] segments with a wrong label."""
        wrong: Ints = np.sum(self.labels != self.truth, axis=1, dtype=np.int64)
        return wrong


def measure(answers: Answers) -> dict[str, Any]:
    """The results of all `METRICS`, as an evaluation has them, from the stored answers alone."""
    count, seconds = answers.truth_event.shape
    event, category = torch.from_numpy(answers.event_logits), torch.from_numpy(answers.category_logits)
    nothing = torch.zeros(count, seconds, 0)
    output = Output(event, category, None, nothing, nothing, nothing, event, None)
    rows = torch.arange(count)
    batch = Batch(
        nothing, nothing, torch.from_numpy(answers.truth_event), torch.from_numpy(answers.truth_category),
        torch.ones(count, dtype=torch.bool), rows, rows,
    )  # fmt: skip
    metrics = [metric(answers.categories, seconds) for metric in METRICS.values()]
    for metric in metrics:
        metric.update(output, batch)
    return {name: value for metric in metrics for name, value in metric.result().items()}


def trivial(answers: Answers) -> dict[str, Answers]:
    """Answers without a look at the features, by name: the split's commonest label everywhere, and an event
    everywhere, of the category that the model gives the video."""
    labels, counts = np.unique(answers.truth, return_counts=True)
    most = int(labels[counts.argmax()])
    everywhere = np.ones_like(answers.event_logits)
    if most == len(answers.categories):
        majority = replace(answers, event_logits=-everywhere)
    else:
        logits = np.zeros_like(answers.category_logits)
        logits[:, most] = 1
        majority = replace(answers, event_logits=everywhere, category_logits=logits)
    name = [*answers.categories, "background"][most]
    return {f"'{name}' everywhere": majority, "an event everywhere": replace(answers, event_logits=everywhere)}


@dataclass(frozen=True)
class Calibration:
    """Of ten bins of probability: mean probability, share that is right (nan where empty), and how many; error: the
    expected calibration error (Guo et al. 2017), the mean distance of the two, by count."""

    probability: Floats
    right: Floats
    count: Ints
    error: float


def calibrate(probability: Floats, right: Bools, bins: int = 10) -> Calibration:
    """probability, right: of any shape, the same."""
    flat, hits = probability.ravel().astype(float), right.ravel().astype(float)
    which = np.minimum((flat * bins).astype(int), bins - 1)
    count = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = np.bincount(which, flat, bins) / count
        shares = np.bincount(which, hits, bins) / count
    error = float(np.nansum(count * np.abs(means - shares)) / max(len(flat), 1))
    return Calibration(means, shares, count, error)


@dataclass(frozen=True)
class LengthRecall:
    """Of videos with `length` event segments: how many, the share of these segments found, and found with the right
    category."""

    length: int
    videos: int
    found: float
    right: float


def recall_by_length(answers: Answers) -> list[LengthRecall]:
    """By the number of event segments, those that there are."""
    lengths = answers.truth_event.sum(1)
    hit = (answers.probability > 0.5) & answers.truth_event
    right = hit & (answers.category == answers.truth_category)[:, None]
    rows = []
    for length in np.unique(lengths[lengths > 0]).tolist():
        own = lengths == length
        total = length * int(own.sum())
        rows.append(LengthRecall(length, int(own.sum()), hit[own].sum() / total, right[own].sum() / total))
    return rows


def principal_map(vectors: Floats) -> tuple[Floats, Floats]:
    """[N, D] -> [N, 2] along the two directions of most variance, and the share of the variance of each [2] (PCA)."""
    centred = vectors.astype(float) - vectors.mean(0, dtype=float)
    values, directions = np.linalg.eigh(centred.T @ centred)
    shares = values[::-1][:2] / max(values.sum(), 1e-12)
    return centred @ directions[:, ::-1][:, :2], shares
