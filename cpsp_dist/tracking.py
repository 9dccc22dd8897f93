"""MLflow: what a run was, what it measured, and the table of runs. The only module that knows mlflow.

Points are buffered and sent in batches by rank 0; every point also goes to `metrics.jsonl` in the run's folder. A
tracking server that fails costs the page, never the training.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from cpsp_dist import __version__
from cpsp_dist.config import Config, flat
from cpsp_dist.errors import UserError
from cpsp_dist.manifest import Manifest

SEND_EVERY_SECONDS = 15.0
_PACKAGES = ("torch", "deepspeed", "numpy", "webdataset", "mlflow")


def tracking_uri(output: str | Path) -> str:
    """MLFLOW_TRACKING_URI where it is set, else a SQLite file beside the run folders."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(output).resolve().parent / 'mlflow.db'}"


class Tracker:
    """One MLflow run, as a context: the run ends FINISHED, or FAILED when the block raises.

    With `run_id` an earlier run goes on after its step `step`: each step is in its history once, also when a killed
    process had told of steps that are now done again.
    Disabled (other ranks, or `tracking.enabled: false`) it does nothing.
    """

    def __init__(self, config: Config, manifest: Manifest, world: int, *, run_id: str | None, step: int, enabled: bool):
        self.config, self.manifest, self.world = config, manifest, world
        self.run_id, self.enabled = run_id, enabled and config.tracking.enabled
        self.file = Path(config.output) / "metrics.jsonl" if enabled else None
        self.step = step
        self.pending: list[tuple[str, float, int, int]] = []
        self.sent_up_to = -1
        self.last_sent = time.monotonic()
        self.client: Any = None

    def __enter__(self) -> Tracker:
        if self.file is not None:
            self._take_back()
        if self.enabled:
            self._guard(self._open, "start a run")
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.send()
        if self.client is not None:
            self._guard(
                lambda: self.client.set_terminated(self.run_id, "FAILED" if kind else "FINISHED"), "end the run"
            )

    def _take_back(self) -> None:
        """Remove lines of steps after the one that the run goes on from, and a line that was cut short."""
        assert self.file is not None
        lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True) if self.file.exists() else []
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= self.step]
        if kept != lines:
            self.file.write_text("".join(kept), encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics after optimizer step `step` (counted from 1). Values that are not finite go to the file only."""
        if self.file is not None:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self.client is None or step <= self.sent_up_to:
            return
        now = int(time.time() * 1000)
        self.pending += [(name, float(value), now, step) for name, value in metrics.items() if math.isfinite(value)]
        if time.monotonic() - self.last_sent > SEND_EVERY_SECONDS:
            self.send()

    def send(self) -> None:
        """Send what is buffered."""
        if self.client is not None and self.pending:
            self._guard(self._send, "send metrics")
        self.last_sent = time.monotonic()

    def _send(self) -> None:
        from mlflow.entities import Metric

        for start in range(0, len(self.pending), 1000):  # the server's limit for one batch
            self.client.log_batch(self.run_id, metrics=[Metric(*point) for point in self.pending[start : start + 1000]])
        self.pending.clear()

    def _open(self) -> None:
        client = _client(tracking_uri(self.config.output))
        if self.run_id is not None:
            self.client = client
            client.update_run(self.run_id, "RUNNING")
            history = client.get_metric_history(self.run_id, "loss/total")
            self.sent_up_to = max((point.step for point in history), default=-1)
            return
        run = client.create_run(
            _experiment(client, self.config), run_name=self.config.tracking.run_name or Path(self.config.output).name
        )
        self.run_id = run.info.run_id
        self.client = client
        self._describe()

    def _describe(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        settings = flat(self.config) | {"world_size": self.world}
        tags = {f"version.{name}": version(name) for name in _PACKAGES}
        tags |= {"version.cpsp_dist": __version__, "version.python": platform.python_version()}
        tags |= {"command": " ".join(sys.argv), "output": str(Path(self.config.output).resolve())} | _git_state()
        self.client.log_batch(
            self.run_id,
            params=[Param(key, str(value)) for key, value in settings.items()],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )
        self.client.log_dict(self.run_id, self.config.model_dump(mode="json"), "config.json")
        shards = self.manifest.folder.resolve()
        source = json.dumps({"uri": str(shards)})
        dataset = Dataset(shards.name, self.manifest.fingerprint[:32], source_type="local", source=source)
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def _guard(self, action: Any, what: str) -> None:
        try:
            action()
        except Exception as error:  # whatever a client library or server throws: training goes on
            first = str(error).strip().splitlines()
            print(f"warning: MLflow could not {what}: {first[0] if first else error!r}; "
                  f"points are in {self.file}, training goes on", file=sys.stderr, flush=True)  # fmt: skip


def all_runs(uri: str, experiment: str) -> list[dict[str, Any]]:
    """All runs of an experiment, oldest first: {'name', 'status', 'params': {}, 'metrics': {}}.

    Raises:
        UserError: no such store or experiment; the text names the experiments there are.
    """
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise UserError(f"no MLflow store at {uri}; give --uri or set MLFLOW_TRACKING_URI")
    client = _client(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        names = ", ".join(e.name for e in client.search_experiments())
        raise UserError(f"no experiment '{experiment}' at {uri}; there are: {names}")
    runs = []
    token = None
    while True:
        page = client.search_runs([found.experiment_id], order_by=["attributes.start_time ASC"], page_token=token)
        runs += [
            {"name": r.info.run_name, "status": r.info.status, "params": r.data.params, "metrics": r.data.metrics}
            for r in page
        ]
        token = page.token
        if not token:
            return runs


def _client(uri: str) -> Any:
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    # A server that is down is noticed within seconds; mlflow's own default is minutes for each request.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    import logging

    import mlflow

    for name in ("mlflow", "alembic"):  # migrations of a new SQLite file are no news
        logging.getLogger(name).setLevel(logging.ERROR)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return mlflow.MlflowClient(tracking_uri=uri)


def _experiment(client: Any, config: Config) -> str:
    name = config.tracking.experiment
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    local = "MLFLOW_TRACKING_URI" not in os.environ
    place = (Path(config.output).resolve().parent / "mlartifacts").as_uri() if local else None
    return client.create_experiment(name, artifact_location=place)


def _git_state() -> dict[str, str]:
    """Commit of this program's checkout and whether it has changes; nothing where there is no git."""
    try:
        top = Path(__file__).resolve().parents[1]
        run = {"capture_output": True, "text": True, "timeout": 10, "check": True, "cwd": top}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()  # type: ignore[call-overload]
        changed = subprocess.run(["git", "status", "--porcelain"], **run).stdout.strip()  # type: ignore[call-overload]
        return {"git.commit": commit, "git.changed": str(bool(changed)).lower()}
    except (OSError, subprocess.SubprocessError):
        return {}
