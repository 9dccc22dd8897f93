"""The runs in an MLflow store, as comparisons read them."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpsp_dist.config import Config
from cpsp_dist.tracking.store import PARENT, SWEEP, UI, Store, StoreError, sqlite_file, tracking_uri
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.redact import without_secrets

#: Where runs are looked for without flags and MLFLOW_TRACKING_URI.
DEFAULT_STORE = "sqlite:///runs/mlflow.db"
#: The experiment of a run that names no other.
EXPERIMENT = "cpsp"
#: The data set that a run was trained on, as MLflow's inputs call it.
TRAINING = "training"


@dataclass(frozen=True)
class TrackedRun:
    """One run.

    Attributes:
        status: MLflow's, as FINISHED. start, end: seconds since the epoch; None where there is none yet.
        params, tags: settings and what else is known of it. metrics: the last value of each.
        data: the digests of its data sets by context (training, val, test).
    """

    id: str
    name: str
    status: str
    experiment: str = ""
    start: float | None = None
    end: float | None = None
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)


def default_store() -> str:
    """MLFLOW_TRACKING_URI where it is set, else the store of `runs/`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE


def compare_command(config: Config, *more: str) -> str:
    """The command that compares a run with the others of its experiment."""
    words = ["cpsp-dist", "compare", *more]
    if config.tracking.experiment != EXPERIMENT:
        words += ["--experiment", config.tracking.experiment]
    uri, looked = tracking_uri(config), sqlite_file(default_store())
    file = sqlite_file(uri)
    if uri != default_store() and (file is None or looked is None or file != looked.resolve()):
        words += ["--uri", without_secrets(uri)]
    return shlex.join(words)


def find_runs(
    uri: str, experiments: Sequence[str], *, parent: str | None = None, wanted: Sequence[str] = ()
) -> list[TrackedRun]:
    """The runs of these experiments, oldest first; those above sweeps, which trained nothing, are left out.

    Args:
        parent: name or MLflow id of a sweep, for its runs alone; of sweeps with one name, the newest.
        wanted: names (with `*` and `?`) or ids of runs, for these alone.

    Raises:
        UserError: no such store, experiment, sweep or run; the text names those there are.
    """
    shown, file = without_secrets(uri), sqlite_file(uri)
    if file is not None and not _exists(file):
        raise UserError(f"no MLflow store at {shown}; give --uri or set MLFLOW_TRACKING_URI{_others(file)}")
    try:
        store = Store(uri)
        names = dict.fromkeys(experiments)
        every = [(name, run) for name in names for run in search(store, _experiment(store, name, shown))]
    except StoreError as error:
        raise UserError(f"MLflow at {error}; see to the store, or give another with --uri") from None
    every.sort(key=lambda found: found[1].info.start_time or 0)
    runs = [(name, run) for name, run in every if SWEEP not in run.data.tags]
    if parent is not None:
        above = {r.info.run_id: r.info.run_name for _, r in every if SWEEP in r.data.tags}
        chosen = [run_id for run_id, name in above.items() if parent in (run_id, name)]
        if not chosen:
            there = ", ".join(sorted({*above.values()})) or "none"
            where = f"experiment '{', '.join(experiments)}'"
            raise UserError(f"no sweep '{parent}' in {where} at {shown}; there are: {there}")
        runs = [(name, r) for name, r in runs if r.data.tags.get(PARENT) == chosen[-1]]
    return _chosen([tracked_run(name, run) for name, run in runs], wanted)


def _experiment(store: Store, name: str, shown: str) -> str:
    found = store.get_experiment_by_name(name)
    if found is None or not found.experiment_id:
        names = [e.name for e in store.search_experiments()]
        raise UserError(f"no experiment '{name}' at {shown}; {nearest(name, names)}")
    return str(found.experiment_id)


def experiment_page(uri: str, name: str) -> str:
    """The address of an experiment's runs and their charts where `mlflow ui` serves the store; that of the experiment
    alone opens on MLflow's pages for language models. Raises UserError."""
    return f"{UI}/#/experiments/{_experiment(Store(uri), name, without_secrets(uri))}/runs?compareRunsMode=CHART"


def nearest(name: str, names: Iterable[str]) -> str:
    """`did you mean 'a'? there are: a, b`: for an error about a name that is none of `names`."""
    listed = sorted(names)
    near = difflib.get_close_matches(name, listed, n=1)
    return (f"did you mean '{near[0]}'? " if near else "") + f"there are: {', '.join(listed) or 'none'}"


def tracked_run(experiment: str, run: Any) -> TrackedRun:
    """Of MLflow's own object."""
    info, data = run.info, {}
    for each in (run.inputs and run.inputs.dataset_inputs) or ():
        context = {tag.key: tag.value for tag in each.tags or ()}.get("mlflow.data.context", TRAINING)
        data[context] = each.dataset.digest
    return TrackedRun(
        info.run_id,
        info.run_name or info.run_id,
        info.status,
        experiment,
        info.start_time / 1000 if info.start_time else None,
        info.end_time / 1000 if info.end_time else None,
        params=dict(run.data.params),
        metrics=dict(run.data.metrics),
        tags=dict(run.data.tags),
        data=data,
    )


def _chosen(runs: list[TrackedRun], wanted: Sequence[str]) -> list[TrackedRun]:
    if not wanted:
        return runs
    for pattern in wanted:
        if not any(_is(run, pattern) for run in runs):
            raise UserError(f"--runs {pattern}: no such run; {nearest(pattern, {run.name for run in runs})}")
    return [run for run in runs if any(_is(run, pattern) for pattern in wanted)]


def _is(run: TrackedRun, pattern: str) -> bool:
    return pattern in (run.id, run.name) or fnmatch.fnmatchcase(run.name, pattern)


def _exists(file: Path) -> bool:
    try:
        file.stat()
    except PermissionError:
        return True  # what is wrong with it is said when it is opened
    except OSError:
        return False
    return True


def _others(file: Path) -> str:
    """Stores that are near where one was looked for."""
    found: list[Path] = []
    with contextlib.suppress(OSError):
        found = [path for path in sorted(Path().glob("*/mlflow.db"))[:3] if path != file]
    return f" (there is {', '.join(f'sqlite:///{path}' for path in found)})" if found else ""


def search(store: Store, experiment: str, filter_string: str = "") -> list[Any]:
    """All pages, oldest run first."""
    runs, token = list[Any](), None
    while True:
        page = store.search_runs([experiment], filter_string, order_by=["attributes.start_time ASC"], page_token=token)
        runs += page
        if not page or not page.token:
            return runs
        token = page.token
