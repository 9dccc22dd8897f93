"""The values of a run's metrics over its steps: from its folder where that is here, else from MLflow."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from cpsp_dist.tracking.predictions import belongs
from cpsp_dist.tracking.runs import TrackedRun
from cpsp_dist.tracking.store import AskedStore, StoreError
from cpsp_dist.utils.json_lines import parse_line, read_bytes

logger = logging.getLogger(__name__)

#: {metric: (step, value) in the order of the steps}
History = dict[str, list[tuple[int, float]]]


def curves_of(runs: Iterable[TrackedRun]) -> list[str]:
    """Metrics that are drawn over the steps: those of each evaluation on val, loss terms, throughput; in this order."""
    known = sorted({name for run in runs for name in run.metrics})
    on_val = [name for name in known if name.endswith("/val")]
    return [*on_val, *(name for name in known if name.startswith("loss/")), *({"videos_per_second"} & {*known})]


def read_histories(store: AskedStore, runs: Iterable[TrackedRun], metrics: Sequence[str]) -> dict[str, History]:
    """Of each run, by its id, the points of those metrics that it has. What cannot be read is left out with a
    warning."""
    found: dict[str, History] = {}
    for run in runs:
        wanted = [name for name in metrics if name in run.metrics]
        try:
            local = _of_folder(run, wanted)
            found[run.id] = _of_store(store, run.id, wanted) if local is None else local
        except (StoreError, OSError) as error:
            logger.warning("%s, its history: %s", run.name, error)
    return found


def _of_folder(run: TrackedRun, metrics: Sequence[str]) -> History | None:
    folder = Path(run.tags.get("output", ""))
    if "output" not in run.tags or not belongs(folder, run.id):
        return None
    history: History = {name: [] for name in metrics}
    for line in read_bytes(folder / "metrics.jsonl").splitlines(keepends=True):
        content = parse_line(line) or {}
        for name in metrics:
            if isinstance(value := content.get(name), int | float):
                history[name].append((content["step"], float(value)))
    return {name: points for name, points in history.items() if points}


def _of_store(store: AskedStore, run_id: str, metrics: Sequence[str]) -> History:
    answers = {name: store.ask("get_metric_history", run_id, name) for name in metrics}
    return {name: sorted((p.step, p.value) for p in points) for name, points in answers.items() if points is not None}
