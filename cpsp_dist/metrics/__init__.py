"""Metrics: what a model's answers on a split are measured by. Counts add up exactly over batches and ranks.

Functions of model outputs and labels belong here; nothing here knows of runs or files.

To add a metric: write a file with a `metric.Metric`, and name it in the table. Its values are then in evaluations, in
a run's final results, in MLflow and in `cpsp-dist compare --metrics`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpsp_dist.utils.registry import Registry

if TYPE_CHECKING:
    from cpsp_dist.metrics.metric import Metric

METRICS: Registry[type[Metric]] = Registry(
    "cpsp_dist.metrics",
    {
        "segments": ("segments:Segments", "accuracy of the segments' labels, also by category"),
        "boundaries": ("boundaries:Boundaries", "F1 of the boundaries of events"),
        "seconds": ("seconds:Seconds", "accuracy at each second"),
        "trivial": ("trivial:Trivial", "trivial baselines, and flags where the answers are as trivial"),
    },
)


def reported() -> list[str]:
    """Names of the values that are reported as percentages: `Metric.reported` of all metrics."""
    return [name for metric in METRICS.values() for name in metric.reported]
