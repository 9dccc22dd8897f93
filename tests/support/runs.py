"""Small training runs over the keypad corpus: their arguments, and what they left in their output folder."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_file

from cpsp_dist.training.checkpoint import OPTIMIZER, PROGRESS, WEIGHTS, Checkpoints
from tests.support.environment import REPO


def loss_history(output: Path) -> list[dict[str, float]]:
    """The logged loss terms of a run, in order: {'loss/total': …}; to the last digit, to compare equal runs."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith("loss/")} for line in lines if "loss/total" in line]


KEYPAD = REPO / "configs" / "keypad.yaml"


def overrides(shards: Path, output: Path, *more: str) -> list[str]:
    """A small run that is the same on any world size: no dropout. Without a page about it, which takes a second."""
    small = [
        "train.global_batch=8",
        "train.steps=20",
        "model.dropout=0",
        "evaluation.every_epochs=99",
        "data.reader_threads=1",
        "tracking.report=false",
    ]
    return [f"data.shards={shards}", f"output={output}", *small, *more]


def newest_weights(output: Path) -> dict[str, torch.Tensor]:
    checkpoints = Checkpoints(output)
    weights = load_file(checkpoints.path(checkpoints.steps()[-1]) / WEIGHTS)
    return {name: tensor.clone() for name, tensor in weights.items()}  # the file itself is only mapped


def saved_precision(output: Path) -> str:
    """In which the run of the newest checkpoint trains."""
    checkpoints = Checkpoints(output)
    described = json.loads((checkpoints.path(checkpoints.steps()[-1]) / PROGRESS).read_text())
    return str(described["config"]["train"]["precision"])


def newest_state(output: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a run's newest checkpoint."""
    checkpoints = Checkpoints(output)
    folder = checkpoints.path(checkpoints.steps()[-1])
    tensors = {name: load_file(folder / name) for name in (WEIGHTS, OPTIMIZER)}
    return {f"{file}/{name}": tensor.clone() for file, found in tensors.items() for name, tensor in found.items()}


def arguments(shards: Path, output: Path, *more: str) -> list[str]:
    quick = ["tracking.enabled=false", "tracking.every_steps=1", "model.dropout=0.1", "train.global_batch=4"]
    quick += [] if "engine.kind=ddp" in more else ["engine.zero=2"]
    return ["--config", str(KEYPAD), *overrides(shards, output, *quick, *more)]


def audited(output: Path) -> dict[int, list[str]]:
    """{step: keys of the samples that all ranks together trained on}, from the run's audit log."""
    steps: dict[int, list[str]] = defaultdict(list)
    for file in sorted((output / "audit").glob("rank*.jsonl")):
        found = [json.loads(line) for line in file.read_text().splitlines()]
        assert len({line["step"] for line in found}) == len(found), f"{file}: a step twice"
        for line in found:
            steps[line["step"]] += line["keys"]
    return dict(sorted(steps.items()))


def tracked_points(store: Path, name: str) -> list[int]:
    """Steps of a metric of the one run in an SQLite store."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{store}")
    (run,) = client.search_runs([client.get_experiment_by_name("cpsp").experiment_id])
    assert run.info.status == "FINISHED"
    return [point.step for point in client.get_metric_history(run.info.run_id, name)]


def sweep_parents(folder: Path) -> list[dict[str, str]]:
    """The MLflow runs above sweeps, in the store of a sweep's folder: beside it."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder.parent / 'mlflow.db'}")
    (found,) = [e for e in client.search_experiments() if e.name == "cpsp"]
    runs = client.search_runs([found.experiment_id])
    return [
        {"id": run.info.run_id, "name": run.info.run_name, "status": run.info.status}
        for run in runs
        if "cpsp_dist.sweep" in run.data.tags
    ]


def plain_arguments(shards: Path, output: Path, *more: str) -> list[str]:
    return ["--config", str(KEYPAD), *overrides(shards, output, *more)]
