"""An exported model in MLflow: logged with signature and input example, and registered."""

from __future__ import annotations

import datetime
import json
import platform
import shutil
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cpsp_dist import __version__
from cpsp_dist.tracking.store import Store, StoreError

#: On a run: its logged model.
MODEL_TAG = "logged_model"
LOADER = "cpsp_dist.inference.pyfunc"
_EXAMPLE, _FOLDER = "input_example.json", "model"


@dataclass(frozen=True)
class ModelFolder:
    """A folder of `cpsp-dist export`, and what MLflow shows of it.

    Attributes:
        inputs, outputs: name -> shape of one video, all float32.
        example: input name -> nested lists for one video, with the batch's dimension.
        register: the registered model that it becomes a version of; None: of none.
    """

    folder: Path
    name: str
    inputs: Mapping[str, Sequence[int]]
    outputs: Mapping[str, Sequence[int]]
    example: Mapping[str, Any]
    register: str | None = None


def log_model(store: Store, experiment: str, run_id: str, model: ModelFolder, step: int) -> None:
    """Log it as the run's model, and register it; what an earlier call did is not done again. Raises StoreError."""
    from mlflow.entities import LoggedModelOutput

    known = store.get_run(run_id).data.tags.get(MODEL_TAG)
    if known is None:
        logged = store.create_logged_model(experiment, model.name, source_run_id=run_id, model_type="cpsp")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as part:  # the process may end meanwhile
            _write(Path(part), model, logged.model_id, run_id)
            store.log_model_artifacts(logged.model_id, part)
        store.finalize_logged_model(logged.model_id, "READY")
        store.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step)])
        store.set_tag(run_id, MODEL_TAG, logged.model_id)
        known = logged.model_id
    if model.register is not None:
        _register(store, run_id, known, model.register)


def _register(store: Store, run_id: str, model_id: str, name: str) -> None:
    try:
        store.create_registered_model(name)
    except StoreError as error:
        if error.code != "RESOURCE_ALREADY_EXISTS":
            raise
    if not any(version.run_id == run_id for version in store.search_model_versions(f"run_id = '{run_id}'")):
        source = store.get_logged_model(model_id).artifact_location
        version = store.create_model_version(name, source=source, run_id=run_id, model_id=model_id)
        # As `mlflow.register_model` does: the model's own page shows it.
        named = json.dumps([{"name": name, "version": version.version}])
        store.set_logged_model_tags(model_id, {"mlflow.modelVersions": named})


def _write(folder: Path, model: ModelFolder, model_id: str, run_id: str) -> None:
    """As MLflow lays out a model; by hand, so that a plain install (mlflow-skinny) can."""
    shutil.copytree(model.folder, folder / _FOLDER)
    (folder / _EXAMPLE).write_text(json.dumps(model.example), encoding="utf-8")
    requirements = [f"cpsp-dist=={__version__}", "mlflow>=3.0,<4"]
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
    signature = {
        "inputs": json.dumps([_tensor(name, shape) for name, shape in model.inputs.items()]),
        "outputs": json.dumps([_tensor(name, shape) for name, shape in model.outputs.items()]),
        "params": None,
    }
    content = {
        "flavors": {
            "python_function": {
                "loader_module": LOADER,
                "data": _FOLDER,
                "python_version": platform.python_version(),
                "env": {"virtualenv": "python_env.yaml"},
            }
        },
        "model_id": model_id,
        "model_uuid": uuid.uuid4().hex,
        "run_id": run_id,
        "saved_input_example_info": {"artifact_path": _EXAMPLE, "type": "ndarray", "format": "tf-serving"},
        "signature": signature,
        "utc_time_created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S.%f"),
    }
    python = {
        "python": platform.python_version(),
        "build_dependencies": ["pip"],
        "dependencies": ["-r requirements.txt"],
    }
    (folder / "python_env.yaml").write_text(yaml.safe_dump(python), encoding="utf-8")
    (folder / "MLmodel").write_text(yaml.safe_dump(content), encoding="utf-8")


def _tensor(name: str, shape: Sequence[int]) -> dict[str, Any]:
    return {"name": name, "type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, *shape]}}
