"""The predictions that a run stored: in its folder, and among its artifacts."""

from __future__ import annotations

import functools
import json
import logging
import tempfile
from pathlib import Path

from cpsp_dist.metrics.predictions import Predictions
from cpsp_dist.tracking.groups import Stored
from cpsp_dist.tracking.runs import TrackedRun
from cpsp_dist.tracking.store import RUN_FILE, AskedStore, StoreError
from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.json_lines import read_bytes

logger = logging.getLogger(__name__)

#: On a run: the splits of which it stored predictions, by commas.
STORED_TAG = "predictions"


def predictions_file(split: str) -> str:
    """Its name in a run's folder, and as an artifact."""
    return f"predictions_{split}.npz"


def evaluation_files(folder: Path) -> list[Path]:
    """What the evaluations at a run's end left in its folder."""
    names = [(f"evaluation_{split}.json", predictions_file(split)) for split in ("val", "test")]
    return [folder / name for pair in names for name in pair if (folder / name).is_file()]


def evaluation_tags(folder: Path) -> dict[str, str]:
    """Of these: the splits of which there are predictions, and what is wrong with the answers."""
    kept = [split for split in ("val", "test") if (folder / predictions_file(split)).is_file()]
    return {STORED_TAG: ",".join(kept)} | flags_of(folder, "val") | flags_of(folder, "test")


def flags_of(folder: Path, split: str) -> dict[str, str]:
    """A tag where the answers of a run on a split are trivial, by its evaluation: what is wrong with them."""
    try:
        content = json.loads(read_bytes(folder / f"evaluation_{split}.json", limit=1 << 24))
        found = "; ".join(content["flags"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {f"flags.{split}": found} if found else {}


def stored_predictions(store: AskedStore) -> Stored:
    """What reads the predictions of runs in a store, each file once. None where a run has none."""

    @functools.cache
    def read(run_id: str, output: str, split: str) -> Predictions | None:
        try:
            file = Path(output) / predictions_file(split)
            if output and file.is_file() and belongs(Path(output), run_id):
                return Predictions.load(file)
            with tempfile.TemporaryDirectory() as folder:
                path = store.ask("download_artifacts", run_id, file.name, folder)
                return None if path is None else Predictions.load(Path(path))
        except (StoreError, DataError, OSError) as error:
            logger.warning("%s, predictions of %s: %s", run_id, split, error)
            return None

    def stored(run: TrackedRun, split: str) -> Predictions | None:
        if split not in run.tags.get(STORED_TAG, "").split(","):
            return None
        return read(run.id, run.tags.get("output", ""), split)

    return stored


def belongs(folder: Path, run_id: str) -> bool:
    """Whether the folder is that run's still."""
    try:
        return bool(json.loads(read_bytes(folder / RUN_FILE, limit=1 << 24))["run_id"] == run_id)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
