"""Calls that fill a run's page in MLflow with more than points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cpsp_dist.config import Config
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.tracking.describe import CONTEXTS, dataset_of
from cpsp_dist.tracking.store import Store

#: The settings, as an artifact.
CONFIG_FILE = "config.json"
#: Characters of a parameter or tag that every server takes; parameters of one request.
LONGEST_VALUE, BATCH = 5000, 100


def set_params(store: Store, run_id: str, settings: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    params = [Param(key, str(value)[:LONGEST_VALUE]) for key, value in settings.items()]
    for start in range(0, len(params), BATCH):
        store.log_batch(run_id, params=params[start : start + BATCH])


def set_tags(store: Store, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    listed = [RunTag(key, value[:LONGEST_VALUE]) for key, value in tags.items()]
    for start in range(0, len(listed), BATCH):
        store.log_batch(run_id, tags=listed[start : start + BATCH])


def log_datasets(store: Store, run_id: str, manifest: Manifest) -> None:
    """Train, val and test, each with schema, profile and fingerprint."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = [
        DatasetInput(Dataset(**dataset_of(manifest, split)), [InputTag("mlflow.data.context", context)])
        for split, context in CONTEXTS.items()
        if split in manifest.splits
    ]
    store.log_inputs(run_id, inputs)


def log_config(store: Store, run_id: str, config: Config) -> None:
    if not any(file.path == CONFIG_FILE for file in store.list_artifacts(run_id)):
        store.log_dict(run_id, config.model_dump(mode="json"), CONFIG_FILE)
