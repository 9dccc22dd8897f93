"""A comparison as text that fits a terminal, as CSV, JSON and LaTeX."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cpsp_dist.metrics.statistics import ASSUMPTIONS, Interval
from cpsp_dist.tracking.compare import Comparison
from cpsp_dist.tracking.groups import Group, experiments, short, short_settings
from cpsp_dist.utils.console import table

#: What a column is called where its metric's name is long.
LABELS = {
    "accuracy/test": "test",
    "accuracy/best_val": "best val",
    "best_epoch": "at epoch",
    "accuracy/val": "last val",
    "loss/total": "loss",
    "videos_per_second": "videos/s",
}


def as_text(found: Comparison, width: int | None = None) -> str:
    """A table of at most `width` columns where that can be, and below it what its figures mean."""
    if not found.groups:
        return "no runs yet" if not found.grouped else "no run has finished yet"
    rows = [_row(found, group, merge=False) for group in found.groups]
    text = table(rows)
    if width is not None and found.settings and max(map(len, table(rows, fits=False).splitlines())) > width:
        text = table([_row(found, group, merge=True) for group in found.groups])
    return "\n".join([text, *_notes(found)])


def _row(found: Comparison, group: Group, *, merge: bool) -> dict[str, Any]:
    """merge: all settings in one column."""
    row: dict[str, Any] = {"runs" if found.grouped else "run": group.name}
    if any(
        len({run.experiment for run in each.runs} | {found.groups[0].runs[0].experiment}) > 1 for each in found.groups
    ):
        row["experiment"] = experiments(group)
    if any(run.status != "FINISHED" for each in found.groups for run in each.runs):
        row["state"] = group.runs[0].status.lower()
    if found.grouped:
        row["seeds"] = len(group.by_seed(found.metrics[0])) if found.metrics else len(group.runs)
    if merge:
        row["settings"] = short_settings(group.settings)
    else:
        row |= {short(key): value for key, value in group.settings.items()}
    for number, metric in enumerate(found.metrics):
        label = LABELS.get(metric, metric)
        row[label] = _figure(group, metric)
        if number == 0 and found.baseline is not None:
            row |= _difference(found, group, metric)
    return row


def _figure(group: Group, metric: str) -> str | None:
    seeds, interval = group.over_seeds(metric), group.interval(metric)
    if seeds is None or interval is None:
        return None
    return number(seeds.mean, metric) + _half(interval)


def _half(interval: Interval) -> str:
    return "" if math.isnan(interval.half) else f" ± {number(interval.half)}"


def _difference(found: Comparison, group: Group, metric: str) -> dict[str, Any]:
    test, name = found.difference(group, metric), f"- {found.baseline.name if found.baseline else ''}"
    if test is None:
        return {name: None, "p": None}
    sign = "+" if test.difference.mean >= 0 else ""
    p = None if math.isnan(test.p) else f"{test.p:.3f}" if test.p >= 0.001 else "<0.001"
    return {name: f"{sign}{number(test.difference.mean)}{_half(test.difference)}", "p": p}


def number(value: float, metric: str = "") -> str:
    """Two decimals; of counts, large and small ones, digits that matter."""
    if value != value:
        return "nan"
    if abs(value) >= 1000 or metric.endswith(("epoch", "steps", "bytes", "size")):
        return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"


def _notes(found: Comparison) -> list[str]:
    """What the intervals are, and what they presume."""
    used = set()
    for group in found.groups:
        for metric in found.metrics:
            interval = group.over_seeds(metric)
            if interval is not None and interval.count > 1:
                used.add("t")
            elif group.over_videos(metric) is not None:
                used.add("bootstrap")
    tests = [found.difference(group, found.metrics[0]) for group in found.groups if found.metrics]
    if any(test is not None and not math.isnan(test.p) for test in tests):
        used.add("paired t")
    lines = [ASSUMPTIONS[name] for name in ("t", "bootstrap", "paired t") if name in used]
    return ["", "±: half of the 95 % interval", *lines] if lines else []


def _records(found: Comparison) -> list[dict[str, Any]]:
    """Of each row everything, in full precision."""
    rows = []
    for group in found.groups:
        row: dict[str, Any] = {"runs": group.name} if found.grouped else {"run": group.name}
        row |= {"ids": [run.id for run in group.runs], "experiment": experiments(group)}
        row |= {"state": group.runs[0].status.lower(), "settings": group.settings, "metrics": {}}
        for metric in found.metrics:
            seeds, videos, test = group.over_seeds(metric), group.over_videos(metric), found.difference(group, metric)
            entry = None
            if seeds is not None:
                entry = {"mean": seeds.mean, "seeds": group.by_seed(metric)}
                entry |= {"over_seeds": _ends(seeds), "over_videos": _ends(videos)}
                if test is not None:
                    ends = _ends(test.difference)
                    entry["difference"] = {"mean": test.difference.mean, "interval": ends, "p": _plain(test.p)}
            row["metrics"][metric] = entry
        rows.append(row)
    return rows


def _ends(interval: Interval | None) -> list[float] | None:
    return None if interval is None or math.isnan(interval.low) else [interval.low, interval.high]


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def as_json(found: Comparison) -> str:
    baseline = None if found.baseline is None else found.baseline.name
    return json.dumps({"rows": _records(found), "baseline": baseline, "warnings": found.warnings}, indent=1)


def as_csv(found: Comparison) -> str:
    """A row each; of a metric the mean, the ends of the interval that the table shows, what that is over (seeds,
    videos), how many seeds there are, and with a baseline the difference to it, its ends and its p."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ["", " low", " high", " over", " seeds"]
    names += [" difference", " difference low", " difference high", " p"] if found.baseline is not None else []
    columns = [f"{metric}{name}" for metric in found.metrics for name in names]
    writer.writerow(["runs" if found.grouped else "run", "experiment", "state", *found.settings, *columns])
    for group in found.groups:
        row: list[Any] = [group.name, experiments(group), group.runs[0].status.lower()]
        row += [group.settings[key] for key in found.settings]
        for metric in found.metrics:
            row += _csv_figure(group, metric)
            if found.baseline is not None:
                test = found.difference(group, metric)
                row += _mean_and_ends(test.difference if test else None) + [_plain(test.p) if test else None]
        writer.writerow(row)
    return text.getvalue().rstrip("\n")


def _csv_figure(group: Group, metric: str) -> list[Any]:
    seeds, shown = group.over_seeds(metric), group.interval(metric)
    if seeds is None:
        return [None] * 5
    over = None if _ends(shown) is None else "seeds" if seeds.count > 1 else "videos"
    return [seeds.mean, *_mean_and_ends(shown)[1:], over, seeds.count]


def _mean_and_ends(interval: Interval | None) -> list[float | None]:
    return [None] * 3 if interval is None else [interval.mean, *(_ends(interval) or (None, None))]


def as_latex(found: Comparison) -> str:
    """A `tabular` for the package booktabs; with a baseline, the difference to it in the first metric, and its p."""
    names = ["runs" if found.grouped else "run", *map(short, found.settings), *found.metrics]
    texts = 1 + len(found.settings)
    if found.baseline is not None and found.metrics:
        names[texts + 1 : texts + 1] = [f"- {found.baseline.name}", "p"]
    rows = []
    for group in found.groups:
        cells: list[str | None] = [group.name, *(group.settings[key] for key in found.settings)]
        cells += [_figure(group, metric) for metric in found.metrics]
        if found.baseline is not None and found.metrics:
            cells[texts + 1 : texts + 1] = _difference(found, group, found.metrics[0]).values()
        rows.append([cell or "--" for cell in cells])
    lines = [r"% \usepackage{booktabs}; after ±: half of the 95 % interval"]
    lines += [rf"\begin{{tabular}}{{{'l' * texts}{'r' * (len(names) - texts)}}}", r"\toprule"]
    lines += [_latex_row(names), r"\midrule", *map(_latex_row, rows)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


_LATEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {c: f"${c}$" for c in "<>|"} | {c: f"\\{c}" for c in "&%$#_{}"}


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join("".join(_LATEX.get(c, c) for c in cell) for cell in cells) + r" \\"


FORMATS: Mapping[str, Callable[[Comparison], str]] = {"json": as_json, "csv": as_csv, "latex": as_latex}
