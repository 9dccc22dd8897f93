"""What came out: the evaluation of a run, and the table of runs with what differs between them."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from typing import Any

from cpsp_dist.metrics import METRICS
from cpsp_dist.tracking.store import all_runs
from cpsp_dist.utils.console import table

#: Settings that differ between runs but get no column: the run's name has them.
NOT_COMPARED = ("output", "tracking.run_name", "tracking.parent")


def format_evaluation(found: dict[str, Any]) -> str:
    """Accuracy, by category and by second, for people."""
    rows = [
        {"category": name, "segments": shares["segments"]}
        | {key: f"{100 * shares[key]:.1f}" for key in ("precision", "recall", "f1")}
        for name, shares in found["categories"].items()
    ]
    summary = "\n".join(line for metric in METRICS.values() for line in metric.summary(found))
    return f"{found['split']}: {found['videos']} videos, weights of step {found['step']}\n{summary}\n\n{table(rows)}"


def compare(
    uri: str,
    experiment: str,
    metrics: Sequence[str],
    *,
    parent: str | None = None,
    mean: bool = False,
    as_json: bool = False,
) -> str:
    """A table of the experiment's runs: name, state, the settings in which they differ, their last metrics.

    With `parent`, those of one sweep (its name or MLflow id). With `mean`, runs alike in all but `train.seed` share a
    row: mean ± standard deviation over the seeds that finished.

    Raises:
        UserError: no such store or experiment, or no run in it.
    """
    runs = all_runs(uri, experiment, parent)
    keys = sorted(
        {key for run in runs for key in run["params"]} - set(NOT_COMPARED) - ({"train.seed"} if mean else set())
    )
    differing = [key for key in keys if len({run["params"].get(key) for run in runs}) > 1]
    rows = _means(runs, differing, metrics) if mean else [_row(run, differing, metrics) for run in runs]
    if as_json:
        return json.dumps(rows, indent=1)
    if not rows:
        return f"experiment '{experiment}' has no runs yet"
    return table(rows)


def _row(run: dict[str, Any], settings: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    row = {"run": run["name"], "state": run["status"].lower()}
    row |= {_short(key): run["params"].get(key, "-") for key in settings}
    return row | {name: run["metrics"].get(name) for name in metrics}


def _means(runs: Sequence[dict[str, Any]], settings: Sequence[str], metrics: Sequence[str]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for run in runs:
        if run["status"] == "FINISHED":
            groups.setdefault(tuple(run["params"].get(key, "-") for key in settings), []).append(run)
    rows = []
    for values, group in groups.items():
        # As the demo and sweeps name them.
        name = re.sub(rf"[-,]?\bseed=?{group[0]['params'].get('train.seed')}$", "", group[0]["name"])
        row: dict[str, Any] = {"runs": name or "all", "seeds": len(group)}
        row |= {_short(key): value for key, value in zip(settings, values, strict=True)}
        for name in metrics:
            points = [run["metrics"][name] for run in group if name in run["metrics"]]
            deviation = f" ± {statistics.stdev(points):.2f}" if len(points) > 1 else ""
            row[name] = f"{statistics.mean(points):.2f}{deviation}" if points else None
        rows.append(row)
    return rows


def _short(key: str) -> str:
    return key.removeprefix("objectives.").removeprefix("train.")
