"""The page about several runs side by side."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cpsp_dist.metrics import reported
from cpsp_dist.metrics.predictions import Predictions
from cpsp_dist.metrics.statistics import ASSUMPTIONS, t_interval
from cpsp_dist.report import charts, comparison_figures
from cpsp_dist.report.page import Column, Figure, Page, PageSection, Table
from cpsp_dist.tracking.compare import Comparison, lower_is_better
from cpsp_dist.tracking.groups import Group, short
from cpsp_dist.tracking.history import History

#: Rows with curves and figures of their own, the first ones; others are in the tables.
DRAWN = 8


@dataclass(frozen=True)
class ComparedRuns:
    """What the page is made of.

    Attributes:
        found: the rows, and their figures. histories: by run id. curves: metrics to draw over the steps.
    """

    found: Comparison
    histories: Mapping[str, History]
    curves: Sequence[str]

    @cached_property
    def reference(self) -> Group:
        """The row that others are compared with: the baseline, else the first."""
        return self.found.baseline or self.found.groups[0]

    @cached_property
    def drawn(self) -> list[Group]:
        """The first rows, the reference among them."""
        first = [*self.found.groups[:DRAWN]]
        return first if any(group is self.reference for group in first) else [*first[: DRAWN - 1], self.reference]

    @cached_property
    def stored(self) -> dict[str, Predictions]:
        """The predictions on test of the first run of each drawn row, where they are stored, of the same videos."""
        found: dict[str, Predictions] = {}
        for group in self.drawn:
            one = group.stored(group.runs[0], "test")
            if one is not None and all(np.array_equal(one.key, each.key) for each in found.values()):
                found[group.name] = one
        return found


def comparison_page(data: ComparedRuns, title: str) -> Page:
    """title: which runs these are. There has to be a row."""
    found = data.found
    count = sum(len(group.runs) for group in found.groups)
    return Page(
        title=title,
        lead=f"{count:,} runs in {len(found.groups):,} rows, the best by {found.metrics[0]} first."
        if found.metrics
        else f"{count:,} runs in {len(found.groups):,} rows.",
        notices=[f"{text[0].upper()}{text[1:]}." for text in found.warnings],
        sections=[
            PageSection("Runs", [runs_table(data), *_intervals(data)], _NOTE),
            PageSection("Settings that differ", _settings(found)),
            PageSection("Learning curves", _curves(data), _drawn_note(data)),
            PageSection("Settings and results", _parallel(found)),
            PageSection("Categories and seconds", comparison_figures.of_predictions(data.stored, data.reference.name)),
            PageSection("Which run is right where", comparison_figures.mcnemar_parts(data.stored, data.reference.name)),
            PageSection("Throughput and cost", comparison_figures.cost(found.groups)),
        ],
    )


_NOTE = (
    "low and high: ends of the 95 % interval, over seeds where there are several, else over videos where predictions "
    f"are stored. {ASSUMPTIONS['t']}. {ASSUMPTIONS['bootstrap']}."
)


def _drawn_note(data: ComparedRuns) -> str:
    more = len(data.found.groups) - len(data.drawn)
    text = "Lines are means over the seeds of a row, bands 95 % intervals (t)."
    return f"{text} Of the first {len(data.drawn)} rows; {more:,} more are in the table." if more else text


def runs_table(data: ComparedRuns) -> Table:
    """A row each: each metric with its interval and the first one's difference to the baseline, then the settings: a
    narrow window shows the first columns."""
    found, baseline = data.found, data.found.baseline
    columns = [Column("run")]
    for metric in found.metrics:
        columns += [Column(metric, "number"), Column("low", "number"), Column("high", "number")]
        if baseline is not None and metric == found.metrics[0]:
            columns += [Column(f"- {baseline.name}", "number"), Column("p", "number")]
    columns += [Column("seeds", "number"), *(Column(short(key)) for key in found.settings), Column("state")]
    rows = []
    for group in found.groups:
        seeds = len(group.by_seed(found.metrics[0])) if found.metrics else len(group.runs)
        row: list[Any] = [group.name]
        for metric in found.metrics:
            row += interval_of(group, metric)
            if baseline is not None and metric == found.metrics[0]:
                test = found.difference(group, metric)
                row += [None, None] if test is None else [test.difference.mean, test.p]
        rows.append([*row, seeds, *(group.settings.get(key) for key in found.settings), group.runs[0].status.lower()])
    return Table("All rows", columns, rows)


def interval_of(group: Group, metric: str) -> list[float | None]:
    """Mean, low and high, as far as known."""
    seeds, sure = group.over_seeds(metric), group.interval(metric)
    if seeds is None or sure is None:
        return [None, None, None]
    return [seeds.mean, None if math.isnan(sure.low) else sure.low, None if math.isnan(sure.high) else sure.high]


def _intervals(data: ComparedRuns) -> list[Figure]:
    """The first metric of each drawn row: its interval, its mean, and its seeds."""
    if not data.found.metrics:
        return []
    metric = data.found.metrics[0]
    groups = [group for group in data.drawn if group.by_seed(metric)]
    if not groups:
        return []
    ends = [interval_of(group, metric) for group in groups]
    option = charts.intervals(
        [group.name for group in groups],
        [(mean or 0.0, mean if low is None else low, mean if high is None else high) for mean, low, high in ends],
        [[*group.by_seed(metric).values()] for group in groups],
        metric,
    )
    best = groups[0]
    caption = f"Boxes: mean and 95 % interval; points: seeds. The first is '{best.name}', {ends[0][0] or 0:.4g}."
    return [Figure(f"{metric} with intervals", caption, option, height=90 + 44 * len(groups), wide=True)]


def _settings(found: Comparison) -> list[Table]:
    """A row for each setting; a column for each row of the comparison where these are few, else counts of values."""
    if not found.settings:
        return []
    if len(found.groups) <= DRAWN:
        columns = [Column("setting"), *(Column(group.name) for group in found.groups)]
        rows: list[list[Any]] = [[key, *(group.settings.get(key) for group in found.groups)] for key in found.settings]
        return [Table("Settings that differ", columns, rows)]
    counted = {key: Counter(str(group.settings.get(key)) for group in found.groups) for key in found.settings}
    rows = [
        [key, ", ".join(f"{value} ({count})" for value, count in values.most_common(20)), len(values)]
        for key, values in counted.items()
    ]
    return [
        Table("Settings that differ", [Column("setting"), Column("values (rows)"), Column("values", "number")], rows)
    ]


def _curves(data: ComparedRuns) -> list[Figure]:
    figures = []
    for metric in data.curves:
        means: dict[str, list[tuple[float, float | None]]] = {}
        bands: dict[str, list[tuple[float, float, float]]] = {}
        for group in data.drawn:
            points = _points(data, group, metric)
            if points:
                means[group.name] = [(step, mean) for step, mean, _, _ in points]
                bands[group.name] = [(step, low, high) for step, _, low, high in points if not math.isnan(low)]
        if means:
            last = ", ".join(f"{name} {points[-1][1]:.4g}" for name, points in means.items())
            option = charts.lines(means, "step", metric, bands={name: b for name, b in bands.items() if b})
            figures.append(Figure(metric, f"At the end: {last}.", option, height=360))
    return figures


def _points(data: ComparedRuns, group: Group, metric: str) -> list[tuple[int, float, float, float]]:
    """Step, mean, and ends of the interval as far as the metric goes, at the steps that all runs of the row have."""
    runs = [dict(h[metric]) for run in group.runs if metric in (h := data.histories.get(run.id, {}))]
    steps = sorted(set.intersection(*map(set, runs))) if runs else []
    lowest = 0.0 if all(value >= 0 for run in runs for value in run.values()) else -math.inf
    highest = 100.0 if metric.partition("/")[0] in reported() else math.inf
    found = []
    for step in charts.thinned(steps):
        interval = t_interval([run[step] for run in runs])
        low, high = (min(max(end, lowest), highest) for end in (interval.low, interval.high))
        found.append((step, interval.mean, low, high))
    return found


def _parallel(found: Comparison) -> list[Figure]:
    """Each run a line through its settings and metrics."""
    metrics = [m for m in found.metrics[:3] if any(m in run.metrics for g in found.groups for run in g.runs)]
    runs = [run for group in found.groups for run in group.runs]
    keys = [key for key in found.settings if len({run.params.get(key) for run in runs}) > 1][:8]
    if not keys or not metrics or len(runs) < 2:
        return []
    axes: list[tuple[str, list[Any]]] = [(short(key), [run.params.get(key, "-") for run in runs]) for key in keys]
    axes += [(metric, [run.metrics.get(metric) for run in runs]) for metric in metrics]
    better = "low" if lower_is_better(metrics[0]) else "high"
    return [
        Figure(
            "Settings and results of each run",
            f"A line is a run, coloured by {metrics[0]}, of which {better} values are better.",
            charts.parallel(axes, [run.name for run in runs], len(keys)),
            height=400,
            wide=True,
            least_width=110 * len(axes),
        )
    ]
