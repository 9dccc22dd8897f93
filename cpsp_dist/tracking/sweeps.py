"""The run above a sweep's runs: made before them, ended after the last."""

from __future__ import annotations

import logging
from pathlib import Path

from cpsp_dist.config import Config
from cpsp_dist.errors import UserError
from cpsp_dist.tracking.runs import search
from cpsp_dist.tracking.store import PARENT, SWEEP, Store, StoreError, experiment_id, tracking_uri

logger = logging.getLogger(__name__)


def open_sweep(config: Config, folder: str, runs: int) -> str:
    """The id of the MLflow run above a sweep's `runs` runs; that of an earlier launch of the sweep, where there is one.

    Args:
        config: of any of its runs. folder: that holds the folders of its runs; its name is the sweep's.

    Raises:
        UserError: MLflow does not answer.
    """
    try:
        store = Store(tracking_uri(config))
        experiment, place = experiment_id(store, config), str(Path(folder).resolve())
        for run in reversed(search(store, experiment)):
            if SWEEP in run.data.tags and run.data.tags.get("output") == place:
                store.set_tag(run.info.run_id, SWEEP, str(runs))
                store.update_run(run.info.run_id, "RUNNING")
                return str(run.info.run_id)
        tags = {SWEEP: str(runs), "output": place}
        return str(store.create_run(experiment, run_name=Path(folder).name, tags=tags).info.run_id)
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
        if status is None:
            below = search(store, above.info.experiment_id, f"tags.`{PARENT}` = '{parent}'")
            states = {run.info.status for run in below}
            planned = above.data.tags.get(SWEEP, "")
            if not planned.isdecimal() or len(below) < int(planned) or not states <= {"FINISHED", "FAILED"}:
                return
            status = "FAILED" if "FAILED" in states else "FINISHED"
        if above.info.status != status:
            store.set_terminated(parent, status)
    except StoreError as error:
        logger.warning(f"MLflow: {error}; the sweep's own run {parent} stays as it is")
