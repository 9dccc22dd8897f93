"""Figures of a comparison that are made of stored predictions, and of what runs cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cpsp_dist.metrics.predictions import Array, Predictions
from cpsp_dist.metrics.statistics import ASSUMPTIONS, mcnemar
from cpsp_dist.report import charts
from cpsp_dist.report.page import Column, Facts, Figure, Table
from cpsp_dist.tracking.groups import Group

#: Categories in the figure of differences, those that differ most; the table has all.
SHOWN = 40


def f1_by_label(found: Predictions) -> Array:
    """[K+1] of each category and, last, of background; 0 where there is nothing."""
    size = len(found.categories) + 1
    truth, label = found.truth.ravel(), found.label.ravel()
    right = np.bincount(truth[truth == label], minlength=size)
    either = np.bincount(truth, minlength=size) + np.bincount(label, minlength=size)
    shares: Array = 2 * right / np.maximum(either, 1)
    return shares


def of_predictions(stored: Mapping[str, Predictions], reference: str) -> list[Figure]:
    """F1 by category against the reference's, and the accuracy at each second."""
    if not stored:
        return []
    first = next(iter(stored.values()))
    seconds = {name: (each.label == each.truth).mean(0) for name, each in stored.items()}
    series = {name: [(t, round(float(v), 4)) for t, v in enumerate(values)] for name, values in seconds.items()}
    columns = [Column("segment", "number"), *(Column(name, "percent") for name in seconds)]
    rows = [[t, *(float(values[t]) for values in seconds.values())] for t in range(first.event.shape[1])]
    figures = [
        Figure(
            "Accuracy at each segment of test",
            "Of the first run of each row: "
            + ", ".join(f"{name} {100 * values.mean():.1f} %" for name, values in seconds.items())
            + ".",
            charts.lines(series, "segment", "accuracy"),
            table=Table("Accuracy at each segment", columns, rows),
        )
    ]
    if reference in stored and len(stored) > 1:
        figures.append(_differences(stored, reference))
    return figures


def _differences(stored: Mapping[str, Predictions], reference: str) -> Figure:
    names = [*stored[reference].categories, "background"]
    found = {name: f1_by_label(each) for name, each in stored.items()}
    others = {name: values - found[reference] for name, values in found.items() if name != reference}
    most = np.max(np.abs([*others.values()]), axis=0)
    order = np.argsort(-most, kind="stable").tolist()
    shown = order[:SHOWN]
    series = {name: [round(float(values[k]), 4) for k in shown] for name, values in others.items()}
    columns = [Column("category"), *(Column(f"F1, {name}", "percent") for name in found)]
    columns += [Column(f"{name} - {reference}", "percent") for name in others]
    rows = [[names[k], *(float(v[k]) for v in found.values()), *(float(v[k]) for v in others.values())] for k in order]
    return Figure(
        f"F1 by category, difference to {reference}",
        f"The largest difference is in '{names[order[0]]}'. Above 0 a run is better than {reference}."
        + (f" The {SHOWN} categories that differ most; the table has all." if len(names) > SHOWN else ""),
        charts.level_bars([names[k] for k in shown], series, "difference of F1"),
        height=min(760, 110 + 14 * len(shown) * len(series)),
        wide=True,
        table=Table("F1 by category", columns, rows, page=50),
    )


def mcnemar_parts(stored: Mapping[str, Predictions], reference: str) -> list[Table | Facts]:
    """How often the reference and each other run are right on the same segments, and on the same videos."""
    if reference not in stored or len(stored) < 2:
        return []
    own = stored[reference]
    rows: list[list[Any]] = []
    for name, other in stored.items():
        if name == reference:
            continue
        segments = [(each.label == each.truth).ravel() for each in (own, other)]
        videos = [(each.label == each.truth).all(1) for each in (own, other)]
        for what, (a, b) in (("segments", segments), ("videos, all segments right", videos)):
            found = mcnemar(a, b)
            rows.append([name, what, found.both, found.only_first, found.only_second, found.neither, found.p])
    names = ("both right", f"only {reference}", "only the other", "neither", "p")
    columns = [Column("compared with"), Column("counted"), *(Column(each, "number") for each in names)]
    return [
        Table(f"{reference} and each other run on the same test videos", columns, rows),
        Facts("Reading it", [("McNemar's test", ASSUMPTIONS["mcnemar"])], wide=True),
    ]


def cost(groups: Sequence[Group]) -> list[Table | Figure]:
    """Speed, duration and, where the number of ranks is known, rank hours."""
    rows: list[list[Any]] = []
    for group in groups:
        speed = [run.metrics["videos_per_second"] for run in group.runs if "videos_per_second" in run.metrics]
        hours = [(run.end - run.start) / 3600 for run in group.runs if run.start and run.end]
        ranks = [int(n) for run in group.runs if (n := run.params.get("world_size", "")).isdecimal()]
        mean_hours = float(np.mean(hours)) if hours else None
        total = mean_hours * float(np.mean(ranks)) if mean_hours is not None and ranks else None
        mean_speed = float(np.mean(speed)) if speed else None
        rows.append(
            [
                group.name,
                mean_speed,
                None if mean_hours is None else 60 * mean_hours,
                ranks[0] if ranks else None,
                total,
            ]
        )
    names = ("videos/s", "minutes", "ranks", "rank hours")
    table = Table(
        "Mean of each row's runs", [Column("run"), *(Column(name, "number") for name in names)], rows, page=50
    )
    quick = [row for row in rows if row[1] is not None][:SHOWN]
    if not quick:
        return [table]
    option = charts.level_bars([row[0] for row in quick], {"videos/s": [round(row[1], 2) for row in quick]}, "videos/s")
    fastest = max(quick, key=lambda row: float(row[1]))
    caption = f"The fastest is '{fastest[0]}', {fastest[1]:.4g} videos per second."
    return [table, Figure("Throughput", caption, option, height=min(700, 100 + 22 * len(quick)), wide=True)]
