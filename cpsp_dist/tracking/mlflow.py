"""A run's page in MLflow: what it was, and what it measured.

Every point is a line of `metrics.jsonl` in the run's folder first; from there rank 0 sends it, in batches. A tracking
server that is down or slow delays the page, never the training.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from cpsp_dist import __version__
from cpsp_dist.config import Config, flat
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.errors import Stopped
from cpsp_dist.tracking.git import git_state
from cpsp_dist.tracking.store import PARENT, RUN_FILE, Store, StoreError, experiment_id, tracking_uri
from cpsp_dist.utils.json_lines import JsonLines, parse_line, read_bytes, truncate_after_step
from cpsp_dist.utils.redact import url_without_secrets, without_secrets

logger = logging.getLogger(__name__)

SEND_EVERY_SECONDS = 15.0
PATIENCE_WHEN_STOPPED = 5.0
#: The points; the settings, as MLflow keeps them.
POINTS_FILE, CONFIG_FILE = "metrics.jsonl", "config.json"
#: Characters of a parameter or tag that every server takes; names of metrics that it does.
LONGEST_VALUE, _METRIC_NAME = 5000, re.compile(r"[\w.-][\w. /-]{0,199}")
_PACKAGES = ("torch", "deepspeed", "numpy", "webdataset")


def import_mlflow() -> None:
    """Import the library, which takes seconds of CPU time and holds up all other threads meanwhile."""
    with contextlib.suppress(Exception):  # the first use reports it
        import mlflow  # noqa: F401


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
        self.file = self.folder / POINTS_FILE
        self.run_id = run_id
        self.points = JsonLines(self.file, partial(self._warn, "write"), "points")
        self.sender: threading.Thread | None = None
        self._wake, self._ended = threading.Event(), ""
        self._warned: set[str] = set()
        # Of the thread:
        self._sent_bytes = 0  # of the file, whose lines up to there the server has
        self._has: dict[str, set[int]] | None = None  # what the server has of a resumed run; None: ask it
        self._opened = False
        self._further: list[tuple[str, Callable[[], None]]] = []

    def __enter__(self) -> Tracker:
        if self.enabled:
            try:
                self._warn("read", truncate_after_step(self.file, self.step))
            except OSError as error:
                self._warn("write", f"{self.file}: {error.strerror}; training continues")
        if self.enabled and self.config.tracking.enabled:
            import_mlflow()  # here, before the first step: in the thread it would slow the first steps down
            self.sender = threading.Thread(target=self._work, name="mlflow", daemon=True)
            self.sender.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.points.write()
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
            self.points.append({"step": step, "time": round(time.time(), 3), **metrics})

    def _holds(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether an earlier start has logged this; it may have ended between its last step and the results."""
        try:
            return any(line["step"] == step and metrics.keys() <= line.keys() for line in self.points.lines())
        except OSError:
            return False

    def send(self) -> None:
        """Send what there is soon; returns at once."""
        self._wake.set()

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
                self._describe_further()
                if status:
                    if self.store.get_run(self.run_id).info.status != status:
                        self.store.set_terminated(self.run_id, status)
                    return
            except Exception as error:  # whatever comes of a server's answer: training continues
                self._has = None  # the server may have taken it all the same
                self._warn("send", f"MLflow: {str(error) or repr(error)}; points are in {self.file} and are sent "
                           "later, training continues")  # fmt: skip
                if status:
                    return

    def _open(self) -> None:
        config = self.config
        self.store = Store(tracking_uri(config))
        run = self._known_run()
        if run is None:
            name = url_without_secrets(config.tracking.run_name or self.folder.name)
            above = {PARENT: config.tracking.parent} if config.tracking.parent else None
            run = self.store.create_run(experiment_id(self.store, config), run_name=name, tags=above)
            self.run_id = run.info.run_id
            with contextlib.suppress(OSError):
                (self.folder / RUN_FILE).write_text(json.dumps(self._identity(self.run_id)), encoding="utf-8")
            self._has, self._sent_bytes = {}, 0
        else:
            self.run_id = run.info.run_id
            if not self.finished:
                self.store.update_run(self.run_id, "RUNNING")
            if config.tracking.parent not in (None, run.data.tags.get(PARENT)):
                self.store.set_tag(self.run_id, PARENT, config.tracking.parent)
        self._describe(run)
        self._opened = True

    def _known_run(self) -> Any:
        """The run of an earlier start; None where there was none, or it is not there any more, or another folder's."""
        for run_id in dict.fromkeys(known for known in (self._run_of_this_start(), self.run_id) if known):
            try:
                run = self.store.get_run(run_id)
            except StoreError as error:
                if error.code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
                self._warn("run", f"MLflow has no run {run_id} any more; a new one gets all points of {self.file}")
                continue
            place, here = run.data.tags.get("output"), str(self.folder.resolve())
            if run.info.lifecycle_stage != "active":
                reason = "was deleted"
            elif place and place != here and _holds_a_run(Path(place)):
                reason = f"belongs to {place}, of which {here} is a copy"
            else:
                return run
            self._warn("run", f"MLflow's run {run_id} {reason}; a new one gets all points of {self.file}")
        return None

    def _run_of_this_start(self) -> str | None:
        """The MLflow run that this folder names, if it was the same run: maybe one that ended before a checkpoint."""
        try:
            known = json.loads(read_bytes(self.folder / RUN_FILE))
            return known["run_id"] if known == self._identity(known["run_id"]) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def _identity(self, run_id: str | None) -> dict[str, Any]:
        store = without_secrets(tracking_uri(self.config))
        return {"run_id": run_id, "store": store, "config": flat(self.config), "data": self.manifest.fingerprint}

    def _send(self) -> None:
        from mlflow.entities import Metric

        text = read_bytes(self.file, self._sent_bytes)
        text = text[: text.rfind(b"\n") + 1]
        points = []
        for line in text.splitlines(keepends=True):
            content = parse_line(line)
            if content is None:
                self._warn("line", f"{self.file}: a damaged line is not sent to MLflow")
                continue
            step, at = content.pop("step"), _number(content.pop("time", 0))
            at = int(1000 * at) if 0 <= at < 2**40 else 0
            points += [
                Metric(name, _number(value), at, step)
                for name, value in content.items()
                if math.isfinite(_number(value)) and _METRIC_NAME.fullmatch(name)
            ]
        if points and self._has is None:
            history = self.store.get_metric_history
            self._has = {name: {p.step for p in history(self.run_id, name)} for name in {p.key for p in points}}
        has = self._has or {}
        points = [point for point in points if point.step not in has.get(point.key, ())]
        for start in range(0, len(points), 1000):  # the server's limit for one batch
            self.store.log_batch(self.run_id, metrics=points[start : start + 1000])
        self._sent_bytes += len(text)
        self._has = {}

    def _describe(self, run: Any) -> None:
        """What the run is: what of it the store does not have yet. An earlier start may have ended in between."""
        from mlflow import __version__ as mlflow_version
        from mlflow.entities import Param, RunTag

        if not run.data.params:
            settings = flat(self.config) | {"world_size": self.world}
            params = [Param(key, str(value)[:LONGEST_VALUE]) for key, value in settings.items()]
            tags = {f"version.{name}": version(name) for name in _PACKAGES}
            tags |= {"version.cpsp_dist": __version__, "version.python": platform.python_version()}
            tags |= {"version.mlflow": mlflow_version}  # in a plain install, of the package mlflow-skinny
            tags |= {"command": without_secrets(" ".join(sys.argv))} | git_state()
            self.store.log_batch(self.run_id, tags=[RunTag(key, value[:LONGEST_VALUE]) for key, value in tags.items()])
            for start in range(0, len(params), 100):  # the server's limit for one batch
                self.store.log_batch(self.run_id, params=params[start : start + 100])
        place = str(self.folder.resolve())
        if run.data.tags.get("output") != place:
            self.store.set_tag(self.run_id, "output", place[:LONGEST_VALUE])
        if not (run.inputs and run.inputs.dataset_inputs):
            self._further.append(("the data set's fingerprint", self._log_dataset))
        self._further.append((CONFIG_FILE, self._log_config))

    def _log_dataset(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        shards = self.manifest.place if self.manifest.remote else str(self.manifest.folder.resolve())
        kind = shards.partition("://")[0] if self.manifest.remote else "local"
        source, name = json.dumps({"uri": shards}), Path(shards).name
        dataset = Dataset(name, self.manifest.fingerprint[:32], source_type=kind, source=source)
        self.store.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def _log_config(self) -> None:
        if not any(file.path == CONFIG_FILE for file in self.store.list_artifacts(self.run_id)):
            self.store.log_dict(self.run_id, self.config.model_dump(mode="json"), CONFIG_FILE)

    def _describe_further(self) -> None:
        """Some servers lack a call for it, others cannot store files: the points do not wait for that."""
        while self._further:
            what, call = self._further.pop(0)
            try:
                call()
            except StoreError as error:
                self._warn(what, f"MLflow does not take {what}: {error}; a later start of the command tries again")

    def _warn(self, about: str, text: str) -> None:
        """Once for each kind of trouble; nothing where there is none."""
        if text and about not in self._warned:
            self._warned.add(about)
            logger.warning(text)


def _number(value: Any) -> float:
    """nan for what is none, or none that a float can hold."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


def _holds_a_run(folder: Path) -> bool:
    try:
        return (folder / POINTS_FILE).is_file()
    except OSError:  # not permitted: somebody else's
        return True
