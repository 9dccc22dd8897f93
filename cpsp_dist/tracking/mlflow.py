"""MLflow: what a run was, what it measured, and the table of runs. The only module that knows mlflow.

Every point is a line of `metrics.jsonl` in the run's folder first; from there rank 0 sends it, in batches. A tracking
server that is down or slow delays the page, never the training.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from cpsp_dist import __version__
from cpsp_dist.config import Config, flat
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.urls import without_secrets
from cpsp_dist.errors import Stopped, UserError

SEND_EVERY_SECONDS = 15.0
PATIENCE_WHEN_STOPPED = 5.0
#: Lines that wait in memory while the disk is full, at most.
KEPT_LINES = 100_000
#: Which MLflow run the folder belongs to, before its first checkpoint.
RUN_FILE = "mlflow_run.json"
#: MLflow's own tag for the run above one, and the one on the run above a sweep: how many runs it has.
PARENT, SWEEP = "mlflow.parentRunId", "cpsp_dist.sweep"
_PACKAGES = ("torch", "deepspeed", "numpy", "webdataset", "mlflow")


def tracking_uri(output: str | Path) -> str:
    """MLFLOW_TRACKING_URI where it is set, else a SQLite file beside the run folders."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(output).resolve().parent / 'mlflow.db'}"


def truncate_after_step(file: Path, step: int) -> None:
    """Remove the JSON lines of steps after `step`, and a line that was cut short; completely or not at all."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
    if kept != lines:
        part = file.with_suffix(".part")
        part.write_text("".join(kept), encoding="utf-8")
        part.replace(file)


class Tracker:
    """One MLflow run, as a context: the run ends FINISHED, KILLED when it was stopped to resume later, FAILED else.

    Every point is a line of `metrics.jsonl` in the run's folder; a thread sends the lines that the server does not have
    yet, so that neither a dead nor a slow server holds up the training. What could not be sent is sent later: by the
    thread, or when the command is given again. A resumed run has each step in its history once, also when a killed
    process had logged steps that are now done again. Where the disk is full, lines wait in memory.

    Disabled (other ranks) it does nothing; with `tracking.enabled: false` there is the file alone.
    """

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        world: int,
        *,
        run_id: str | None,
        step: int,
        finished: bool,
        enabled: bool,
    ):
        """finished: nothing is to come but what an earlier start could not write or send."""
        self.config, self.manifest, self.world = config, manifest, world
        self.folder, self.step = Path(config.output), step
        self.finished, self.enabled = finished, enabled
        self.file = self.folder / "metrics.jsonl"
        self.run_id = run_id
        self.unwritten: deque[str] = deque(maxlen=KEPT_LINES)
        self.sender: threading.Thread | None = None
        self._wake, self._ended = threading.Event(), ""
        self._warned: set[str] = set()
        # Of the thread:
        self._sent_bytes = 0  # of the file, whose lines up to there the server has
        self._has: dict[str, set[int]] | None = None  # what the server has of a resumed run; None: ask it
        self._opened = False

    def __enter__(self) -> Tracker:
        if self.enabled:
            try:
                truncate_after_step(self.file, self.step)
            except OSError as error:
                self._warn("write", f"{self.file}: {error.strerror}; training continues")
        if self.enabled and self.config.tracking.enabled:
            self.run_id = self.run_id or self._run_of_this_start()
            self.sender = threading.Thread(target=self._work, name="mlflow", daemon=True)
            self.sender.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if self.unwritten:
            self._write()
        if self.sender is None:
            return
        stopped = isinstance(value, Stopped)
        self._ended = "KILLED" if stopped else "FAILED" if kind else "FINISHED"
        self._wake.set()
        # A scheduler that asked for the end has little patience itself.
        self.sender.join(min(PATIENCE_WHEN_STOPPED, self.config.tracking.flush_timeout) if stopped else
                         self.config.tracking.flush_timeout)  # fmt: skip
        if self.sender.is_alive():
            self._warn("send", f"MLflow has not taken all points; they are in {self.file}, and are sent when the same "
                       "command is given again")  # fmt: skip

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics after optimizer step `step` (counted from 1). Values that are not finite go to the file only."""
        if self.enabled and not (self.finished and self._holds(step, metrics)):
            self.unwritten.append(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")
            self._write()

    def _holds(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether an earlier start has logged this; it may have ended between its last step and the results."""
        try:
            lines = [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError):
            return False
        return any(line["step"] == step and metrics.keys() <= line.keys() for line in lines)

    def send(self) -> None:
        """Send what there is soon; returns at once."""
        self._wake.set()

    def _write(self) -> None:
        try:
            lines = "".join(self.unwritten).encode()
            with open(self.file, "ab", buffering=0) as file:
                size = file.tell()
                if file.write(lines) != len(lines):  # a disk that is just full takes a part, without an error
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.unwritten.clear()
        except OSError as error:
            self._warn("write", f"{self.file}: {error.strerror}; points wait in memory, training continues")

    def _run_of_this_start(self) -> str | None:
        """The MLflow run of a start that ended before its first checkpoint, if it was the same run."""
        try:
            known = json.loads((self.folder / RUN_FILE).read_text(encoding="utf-8"))
            return known["run_id"] if known == self._identity(known["run_id"]) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _identity(self, run_id: str) -> dict[str, Any]:
        store = tracking_uri(self.config.output)
        return {"run_id": run_id, "store": store, "config": flat(self.config), "data": self.manifest.fingerprint}

    def _work(self) -> None:
        """The thread: send every SEND_EVERY_SECONDS, and a last time at the end, until that went well."""
        while True:
            self._wake.wait(SEND_EVERY_SECONDS)
            self._wake.clear()
            status = self._ended
            try:
                if not self._opened:
                    self._open()
                self._send()
                if status:
                    if self.client.get_run(self.run_id).info.status != status:
                        self.client.set_terminated(self.run_id, status)
                    return
            except Exception as error:  # whatever a client library or server throws: training continues
                self._has = None  # the server may have taken it all the same
                first = str(error).strip().splitlines()
                self._warn("send", f"MLflow: {first[0] if first else repr(error)}; points are in {self.file} and are "
                           "sent later, training continues")  # fmt: skip
                if status:
                    return

    def _open(self) -> None:
        self.client = _client(tracking_uri(self.config.output))
        if self.run_id is None:
            name = self.config.tracking.run_name or self.folder.name
            above = {PARENT: self.config.tracking.parent} if self.config.tracking.parent else None
            run = self.client.create_run(_experiment(self.client, self.config), run_name=name, tags=above)
            self.run_id = run.info.run_id
            with contextlib.suppress(OSError):
                (self.folder / RUN_FILE).write_text(json.dumps(self._identity(self.run_id)), encoding="utf-8")
            self._has = {}
        else:
            run = self.client.get_run(self.run_id)
            if not self.finished:
                self.client.update_run(self.run_id, "RUNNING")
            if self.config.tracking.parent not in (None, run.data.tags.get(PARENT)):
                self.client.set_tag(self.run_id, PARENT, self.config.tracking.parent)
        if not run.data.params:  # also where an earlier start ended just before this
            self._describe()
        self._opened = True

    def _send(self) -> None:
        from mlflow.entities import Metric

        if not self.file.exists():
            return
        with open(self.file, "rb") as file:
            file.seek(self._sent_bytes)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        points = []
        for line in text.splitlines():
            content = json.loads(line)
            step, at = content.pop("step"), int(1000 * content.pop("time", 0))
            points += [Metric(name, value, at, step) for name, value in content.items() if math.isfinite(value)]
        if points and self._has is None:
            history = self.client.get_metric_history
            self._has = {name: {p.step for p in history(self.run_id, name)} for name in {p.key for p in points}}
        has = self._has or {}
        points = [point for point in points if point.step not in has.get(point.key, ())]
        for start in range(0, len(points), 1000):  # the server's limit for one batch
            self.client.log_batch(self.run_id, metrics=points[start : start + 1000])
        self._sent_bytes += len(text)
        self._has = {}

    def _describe(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        settings = flat(self.config) | {"world_size": self.world}
        tags = {f"version.{name}": version(name) for name in _PACKAGES}
        tags |= {"version.cpsp_dist": __version__, "version.python": platform.python_version()}
        tags |= {"command": without_secrets(" ".join(sys.argv)), "output": str(self.folder.resolve())} | _git_state()
        self.client.log_batch(
            self.run_id,
            params=[Param(key, str(value)) for key, value in settings.items()],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )
        self.client.log_dict(self.run_id, self.config.model_dump(mode="json"), "config.json")
        shards = self.manifest.place if self.manifest.remote else str(self.manifest.folder.resolve())
        kind = shards.partition("://")[0] if self.manifest.remote else "local"
        source, name = json.dumps({"uri": shards}), Path(shards).name
        dataset = Dataset(name, self.manifest.fingerprint[:32], source_type=kind, source=source)
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def _warn(self, about: str, text: str) -> None:
        """Once for each kind of trouble."""
        if about not in self._warned:
            self._warned.add(about)
            print(f"warning: {text}", file=sys.stderr, flush=True)


def all_runs(uri: str, experiment: str, parent: str | None = None) -> list[dict[str, Any]]:
    """All runs of an experiment, oldest first: {'name', 'status', 'params': {}, 'metrics': {}}.

    The runs above sweeps, which trained nothing, are left out.

    Args:
        parent: name or MLflow id of a sweep, for its runs alone; of sweeps with one name, the newest.

    Raises:
        UserError: no such store, experiment or sweep; the text names those there are.
    """
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise UserError(f"no MLflow store at {uri}; give --uri or set MLFLOW_TRACKING_URI")
    client = _client(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        names = ", ".join(e.name for e in client.search_experiments())
        raise UserError(f"no experiment '{experiment}' at {uri}; there are: {names}")
    every = _search(client, found.experiment_id)
    runs = [r for r in every if SWEEP not in r.data.tags]
    if parent is not None:
        above = {r.info.run_id: r.info.run_name for r in every if SWEEP in r.data.tags}
        chosen = [run_id for run_id, name in above.items() if parent in (run_id, name)]
        if not chosen:
            names = ", ".join(sorted({*above.values()})) or "none"
            raise UserError(f"no sweep '{parent}' in experiment '{experiment}' at {uri}; there are: {names}")
        runs = [r for r in runs if r.data.tags.get(PARENT) == chosen[-1]]
    return [
        {"name": r.info.run_name, "status": r.info.status, "params": r.data.params, "metrics": r.data.metrics}
        for r in runs
    ]


def _search(client: Any, experiment_id: str, filter_string: str = "") -> list[Any]:
    """All pages, oldest run first."""
    runs, token = [], None
    while True:
        page = client.search_runs(
            [experiment_id], filter_string, order_by=["attributes.start_time ASC"], page_token=token
        )
        runs += page
        token = page.token
        if not token:
            return runs


def reach(uri: str, limit: float) -> None:
    """Ask the store at `uri` something. Raises what mlflow raises where it does not answer, within `limit` seconds."""
    os.environ.update(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT=str(max(1, int(limit / 2))))
    _client(uri).search_experiments(max_results=1)


def open_sweep(config: Config, folder: str, runs: int) -> str:
    """The id of the MLflow run above a sweep's `runs` runs; that of an earlier launch of the sweep, where there is one.

    Args:
        config: of any of its runs. folder: that holds the folders of its runs; its name is the sweep's.

    Raises:
        UserError: MLflow does not answer.
    """
    try:
        client = _client(tracking_uri(config.output))
        experiment, place = _experiment(client, config), str(Path(folder).resolve())
        for run in reversed(_search(client, experiment)):
            if SWEEP in run.data.tags and run.data.tags.get("output") == place:
                client.set_tag(run.info.run_id, SWEEP, str(runs))
                client.update_run(run.info.run_id, "RUNNING")
                return str(run.info.run_id)
        tags = {SWEEP: str(runs), "output": place}
        return str(client.create_run(experiment, run_name=Path(folder).name, tags=tags).info.run_id)
    except Exception as error:  # whatever a client library or server throws
        first = str(error).strip().splitlines() or [repr(error)]
        raise UserError(
            f"MLflow at {without_secrets(tracking_uri(config.output))}: {first[0]}; a sweep is one run there with its "
            "runs below it: fix the store, or set tracking.enabled=false"
        ) from None


def close_sweep(config: Config, status: str | None = None) -> None:
    """End the run above a sweep: with `status`, or, where all its runs have ended by what MLflow knows, with theirs.

    A failure is only reported: no run depends on it.
    """
    parent = config.tracking.parent
    if parent is None or not config.tracking.enabled:
        return
    try:
        client = _client(tracking_uri(config.output))
        above = client.get_run(parent)
        if status is None:
            below = _search(client, above.info.experiment_id, f"tags.`{PARENT}` = '{parent}'")
            states = {run.info.status for run in below}
            if len(below) < int(above.data.tags[SWEEP]) or not states <= {"FINISHED", "FAILED"}:
                return
            status = "FAILED" if "FAILED" in states else "FINISHED"
        if above.info.status != status:
            client.set_terminated(parent, status)
    except Exception as error:
        first = str(error).strip().splitlines() or [repr(error)]
        print(f"warning: MLflow: {first[0]}; the sweep's own run {parent} stays as it is", file=sys.stderr, flush=True)


def _client(uri: str) -> Any:
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    # A server that is down is noticed within seconds; mlflow's own default is minutes for each request.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import logging

    import mlflow

    for name in ("mlflow", "alembic"):  # migrations of a new SQLite file are no news
        logging.getLogger(name).setLevel(logging.ERROR)
    if uri.startswith("sqlite:///"):
        _make_store(Path(uri.removeprefix("sqlite:///").partition("?")[0]))
    return mlflow.MlflowClient(tracking_uri=uri)


def _make_store(file: Path) -> None:
    """A new SQLite file appears complete: mlflow makes it table by table for seconds, and cannot use one whose
    making a kill has ended, or where two runs begin at once."""
    if file.exists():
        return
    import mlflow

    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-") as part:
        made = Path(part) / file.name
        mlflow.MlflowClient(tracking_uri=f"sqlite:///{made}").search_experiments(max_results=1)
        try:
            os.link(made, file)
        except FileExistsError:
            pass  # another run was faster
        except OSError:  # a file system without hard links
            made.rename(file)


def _experiment(client: Any, config: Config) -> str:
    name = config.tracking.experiment
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    uri = tracking_uri(config.output)
    # Beside a SQLite file; mlflow would take whatever folder the command was given in. A server decides for itself.
    local = uri.startswith("sqlite:///")
    place = Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts" if local else None
    return str(client.create_experiment(name, artifact_location=place.as_uri() if place else None))


def _git_state() -> dict[str, str]:
    """Commit of this program's checkout and whether it has changes; nothing where there is no git."""
    try:
        top = Path(__file__).resolve().parents[2]
        run = {"capture_output": True, "text": True, "timeout": 10, "check": True, "cwd": top}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()  # type: ignore[call-overload]
        changed = subprocess.run(["git", "status", "--porcelain"], **run).stdout.strip()  # type: ignore[call-overload]
        return {"git.commit": commit, "git.changed": str(bool(changed)).lower()}
    except (OSError, subprocess.SubprocessError):
        return {}
