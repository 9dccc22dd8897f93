"""Figures and tables of a model's answers on a split: by category, by second, calibration, timelines, the map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cpsp_dist.report import charts
from cpsp_dist.report.answers import Answers, calibrate, principal_map, recall_by_length
from cpsp_dist.report.page import Column, Figure, Table

#: Categories with a colour of their own in the map; of the others one.
COLOURED = 7


def confusion(answers: Answers, counts: Sequence[Sequence[int]], beside: str) -> Figure:
    """counts: [K+1, K+1] segments of label i that were given label j. beside: what others have right, in words."""
    names = [*answers.categories, "background"]
    table = np.asarray(counts)
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    cells = [(int(j), int(i), round(float(shares[i, j]), 3)) for i, j in np.argwhere(table > 0)]
    wrong = table.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:100]
    pairs = [divmod(int(k), len(names)) for k in order if wrong.flat[k]]
    rows = [[names[i], names[j], int(table[i, j]), float(shares[i, j])] for i, j in pairs]
    most = f"Most often, '{rows[0][0]}' is taken for '{rows[0][1]}' ({rows[0][2]:,} segments). " if rows else ""
    columns = [Column("label"), Column("predicted as"), Column("segments", "number"), Column("share", "percent")]
    return Figure(
        "Confusion of labels",
        f"Share of the segments of each label (row) by the label they were given (column). {most}"
        f"Empty cells never happened. Right, on the diagonal: {beside}.",
        charts.heatmap(cells, ("predicted", names), ("label", names), (0, 1)),
        height=min(900, 180 + 22 * len(names)),
        wide=True,
        canvas=True,
        least_width=560,
        table=Table("The most frequent mistakes", columns, rows),
    )


def by_category(answers: Answers, results: dict[str, Any], others: dict[str, dict[str, Any]]) -> Figure:
    """results: of all metrics; others: by name, those of other answers, beside them."""
    ordered = sorted(results["categories"].items(), key=lambda item: item[1]["f1"])
    videos = np.bincount(answers.truth_category[answers.truth_category >= 0], minlength=len(answers.categories))
    counts = {**dict(zip(answers.categories, videos.tolist(), strict=True)), "background": None}
    rows = [
        [name, each["f1"], each["precision"], each["recall"], int(each["segments"]), counts[name]]
        + [other["categories"][name]["f1"] for other in others.values()]
        for name, each in ordered
    ]
    columns = [Column("category"), *(Column(name, "percent") for name in ("F1", "precision", "recall"))]
    columns += [Column("segments", "number"), Column("videos", "number")]
    columns += [Column(f"F1, {name}", "percent") for name in others]
    shown = {"this model": results, **others}
    series = {name: [round(each["categories"][key]["f1"], 4) for key, _ in ordered] for name, each in shown.items()}
    names = [f"{name} ({int(each['segments']):,})" for name, each in ordered]
    return Figure(
        "F1 by category",
        f"The weakest is '{ordered[0][0]}' ({100 * ordered[0][1]['f1']:.1f} %), the strongest '{ordered[-1][0]}' "
        f"({100 * ordered[-1][1]['f1']:.1f} %). In brackets: segments of the category.",
        charts.level_bars(names, series, "F1", share=True),
        height=min(760, 110 + 14 * len(names) * len(series)),
        wide=True,
        table=Table("F1, precision and recall by category", columns, rows, page=50),
    )


def by_second(answers: Answers, others: dict[str, Answers]) -> Figure:
    """others: by name, other answers, beside them."""
    ends = [round(answers.seconds * t, 3) for t in range(answers.truth.shape[1])]
    right = {"this model": (answers.labels == answers.truth).mean(0)}
    right |= {name: (each.labels == each.truth).mean(0) for name, each in others.items()}
    series = {
        name: [(s, round(float(v), 4)) for s, v in zip(ends, values, strict=True)] for name, values in right.items()
    }
    rows = [[s, *(float(values[t]) for values in right.values())] for t, s in enumerate(ends)]
    columns = [Column("second", "number"), *(Column(name, "percent") for name in right)]
    own = right["this model"]
    return Figure(
        "Accuracy at each second",
        f"From {100 * own.min():.1f} % (second {ends[int(own.argmin())]:g}) to {100 * own.max():.1f} % "
        f"(second {ends[int(own.argmax())]:g}), beside answers that need no look at the features.",
        charts.lines(series, "seconds from the begin", "accuracy", share=True),
        table=Table("Accuracy at each second", columns, rows),
    )


def calibration(answers: Answers) -> list[Figure]:
    known = answers.truth_category >= 0
    sure = answers.category_probability.max(1)[known]
    cases = [
        ("event of a segment", answers.probability, answers.truth_event, "the segment is an event"),
        ("category of a video", sure, (answers.category == answers.truth_category)[known], "the category is right"),
    ]
    figures = []
    for name, probability, right, what in cases:
        found = calibrate(probability, right)
        filled = np.flatnonzero(found.count)
        points = [(round(float(found.probability[i]), 4), round(float(found.right[i]), 4)) for i in filled]
        rows = [
            [
                f"{i / 10:.1f} to {(i + 1) / 10:.1f}",
                float(found.probability[i]),
                float(found.right[i]),
                int(found.count[i]),
            ]
            for i in filled
        ]
        columns = [
            Column("probability"),
            Column("mean", "percent"),
            Column("share", "percent"),
            Column("count", "number"),
        ]
        base = {"always the same": round(float(right.mean()), 4)}
        series = {"model": points, "perfectly calibrated": [(0.0, 0.0), (1.0, 1.0)]}
        option = charts.lines(series, "probability", "share that is right", share=True, levels=base)
        option["xAxis"] |= {"min": 0, "max": 1}
        figures.append(
            Figure(
                f"Calibration: {name}",
                f"How often {what}, by the probability that the model gives it. Expected calibration error "
                f"{100 * found.error:.1f} %. The dotted line: what always the same probability would be right in.",
                option,
                table=Table(f"Calibration: {name}", columns, rows),
            )
        )
    return figures


def by_length(answers: Answers, others: dict[str, Answers]) -> Figure | None:
    """others: by name, other answers, beside them."""
    found = recall_by_length(answers)
    if not found:
        return None
    names = [f"{each.length * answers.seconds:g}" for each in found]
    series = {
        "found": [round(each.found, 4) for each in found],
        "found, with the right category": [round(each.right, 4) for each in found],
    }
    series |= {name: [round(each.found, 4) for each in recall_by_length(other)] for name, other in others.items()}
    rows = [[each.length, each.videos, each.found, each.right] for each in found]
    columns = [Column("event segments", "number"), Column("videos", "number"), Column("found", "percent")]
    return Figure(
        "Recall by the length of the event",
        f"Share of the event segments that the model finds, from {100 * min(e.found for e in found):.1f} % to "
        f"{100 * max(e.found for e in found):.1f} %. An event everywhere finds all.",
        charts.bars(names, series, "seconds of event in the video", "recall", share=True),
        table=Table("Recall by the length of the event", [*columns, Column("right category", "percent")], rows),
    )


def timelines(answers: Answers) -> Table:
    """All videos, those with most errors first."""
    order = np.argsort(-answers.errors, kind="stable").tolist()
    percents = np.floor(100 * answers.probability).astype(int).clip(0, 99)
    percents = np.where(answers.probability > 0.5, percents.clip(51), percents.clip(max=50))
    sure = answers.category_probability.max(1)
    rows = []
    for row in order:
        true = int(answers.truth_category[row])
        rows.append(
            [
                answers.keys[row],
                [percents[row].tolist(), answers.truth_event[row].astype(int).tolist()],
                int(answers.errors[row]),
                answers.categories[true] if true >= 0 else None,
                answers.categories[int(answers.category[row])],
                round(float(sure[row]), 3),
            ]
        )
    # What a narrow window shows without scrolling comes first.
    columns = [Column("video"), Column("event at each second", "seconds"), Column("wrong segments", "number")]
    columns += [Column("category"), Column("predicted"), Column("probability", "percent")]
    return Table("Timelines of all videos, most errors first", columns, rows, page=20)


def embedding_map(answers: Answers) -> list[Figure]:
    """None where the embeddings are not known."""
    if answers.embedding is None:
        return []
    points, shares = principal_map(answers.embedding)
    largest = np.bincount(answers.truth_category[answers.truth_category >= 0], minlength=len(answers.categories))
    own = np.argsort(-largest, kind="stable")[: COLOURED if len(largest) > COLOURED + 1 else COLOURED + 1].tolist()
    series: dict[str, list[list[Any]]] = {answers.categories[k]: [] for k in sorted(own)}
    for row, (x, y) in enumerate(points.tolist()):
        true = int(answers.truth_category[row])
        name = answers.categories[true] if true >= 0 else "no category"
        text = f"{answers.keys[row]}: {name}"
        series.setdefault(name if true in own or true < 0 else "other categories", []).append(
            [round(x, 3), round(y, 3), text]
        )
    figure = Figure(
        "Map of the videos",
        "Each video's mean fused feature, along the two directions of most variance (PCA: "
        f"{100 * shares[0]:.0f} % and {100 * shares[1]:.0f} % of it). Videos of one category should lie together.",
        charts.scatter({name: found for name, found in series.items() if found}, "first direction", "second direction"),
        height=460,
        canvas=len(points) > 2000,
        wide=True,
    )
    return [figure]
