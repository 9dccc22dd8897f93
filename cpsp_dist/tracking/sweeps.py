"""The run above a sweep's runs: made before them, ended after the last."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpsp_dist.config import Config
from cpsp_dist.tracking.compare import Question, compare_runs
from cpsp_dist.tracking.compare_formats import as_csv, as_text
from cpsp_dist.tracking.describe import repeat_command, started_tags
from cpsp_dist.tracking.pages import LONGEST_VALUE
from cpsp_dist.tracking.runs import TrackedRun, search, tracked_run
from cpsp_dist.tracking.store import (
    NOTE,
    PARENT,
    SWEEP,
    Store,
    StoreError,
    active_experiment,
    experiment_id,
    sqlite_file,
    tracking_uri,
)
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.files import require_can_be_made
from cpsp_dist.utils.redact import without_secrets

logger = logging.getLogger(__name__)


def open_sweep(config: Config, folder: str, runs: int) -> str:
    """The id of the MLflow run above a sweep's `runs` runs; that of an earlier launch of the sweep, where there is one.

    Args:
        config: of any of its runs. folder: that holds the folders of its runs; its name is the sweep's.

    Raises:
        UserError: MLflow does not answer.
    """
    with _explained():
        store = Store(tracking_uri(config))
        experiment, place = experiment_id(store, config), os.path.realpath(folder)
        for run in reversed(search(store, experiment)):
            if SWEEP in run.data.tags and run.data.tags.get("output") == place:
                store.set_tag(run.info.run_id, SWEEP, str(runs))
                store.update_run(run.info.run_id, "RUNNING")
                return str(run.info.run_id)
        note = f"A sweep of {runs} runs in `{place}`; they are listed below it, their table is `comparison.csv`."
        tags = {SWEEP: str(runs), "output": place, NOTE: note} | started_tags(repeat_command(1))
        return str(store.create_run(experiment, run_name=Path(folder).name, tags=tags).info.run_id)


def require_store(config: Config) -> None:
    """Refuse what `open_sweep` would; nothing is made. Raises UserError."""
    uri = tracking_uri(config)
    file = sqlite_file(uri)
    with _explained():
        if file is None or os.path.exists(file):
            active_experiment(Store(uri), config)
            return
        try:
            require_can_be_made(file.parent)
        except OSError as error:
            raise StoreError(f"{without_secrets(uri)}: {error.strerror}") from None


@contextmanager
def _explained() -> Iterator[None]:
    """Raises UserError, with what to do, for a StoreError inside."""
    try:
        yield
    except StoreError as error:
        raise UserError(
            f"MLflow at {error}; a sweep is one run there with its runs below it: fix the store, or set "
            "tracking.enabled=false"
        ) from None


def close_sweep(config: Config, status: str | None = None) -> None:
    """End the run above a sweep: with `status`, or, where all its runs have ended by what MLflow knows, with theirs.

    A failure is only reported: no run depends on it.
    """
    parent = config.tracking.parent
    if parent is None or not config.tracking.enabled:
        return
    try:
        store = Store(tracking_uri(config))
        above = store.get_run(parent)
        below = search(store, above.info.experiment_id, f"tags.`{PARENT}` = '{parent}'")
        _log_table(store, above, [tracked_run(config.tracking.experiment, run) for run in below])
        if status is None:
            states = {run.info.status for run in below}
            planned = above.data.tags.get(SWEEP, "")
            if not planned.isdecimal() or len(below) < int(planned) or not states <= {"FINISHED", "FAILED"}:
                return
            status = "FAILED" if "FAILED" in states else "FINISHED"
        if above.info.status != status:
            store.set_terminated(parent, status)
    except StoreError as error:
        logger.warning(f"MLflow: {error}; the sweep's own run {parent} stays as it is")


def _log_table(store: Store, above: Any, runs: list[TrackedRun]) -> None:
    """The comparison of a sweep's runs, as artifacts of the run above them and in its note."""
    found = compare_runs(runs, Question())
    if not found.groups:
        return
    parent, text = above.info.run_id, as_text(found)
    store.log_text(parent, as_csv(found) + "\n", "comparison.csv")
    store.log_text(parent, text + "\n", "comparison.txt")
    first = above.data.tags.get(NOTE, "").partition("\n\n")[0]
    store.set_tag(parent, NOTE, f"{first}\n\n```\n{text}\n```\n"[:LONGEST_VALUE])
