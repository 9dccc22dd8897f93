"""A run's page in MLflow: what it was, and what it measured.

Every point is a line of `metrics.jsonl` in the run's folder first; from there rank 0 sends it, in batches. A tracking
server that is down or slow delays the page, never the training.
"""

from __future__ import annotations

import logging
import math
import re
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from cpsp_dist.config import Config, flat
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.tracking import pages
from cpsp_dist.tracking.describe import Start, run_tags
from cpsp_dist.tracking.known_runs import KEY, POINTS_FILE, RunRecord, asked_run, known_run
from cpsp_dist.tracking.library import import_mlflow
from cpsp_dist.tracking.models import log_model
from cpsp_dist.tracking.predictions import evaluation_files, evaluation_tags
from cpsp_dist.tracking.runs import compare_command
from cpsp_dist.tracking.store import PARENT, Store, experiment_id, page_of, tracking_uri
from cpsp_dist.utils.errors import Stopped, UserError
from cpsp_dist.utils.json_lines import JsonLines, parse_line, read_bytes, truncate_after_step
from cpsp_dist.utils.redact import url_without_secrets

logger = logging.getLogger(__name__)

SEND_EVERY_SECONDS = 15.0
PATIENCE_WHEN_STOPPED = 5.0
#: Names of metrics that every server takes.
_METRIC_NAME = re.compile(r"[\w.-][\w. /-]{0,199}")


class Tracker:
    """One MLflow run, as a context: the run ends FINISHED, KILLED when it was stopped to resume later, FAILED else.

    A thread sends the lines of `metrics.jsonl` that the server does not have yet, so that neither a dead nor a slow one
    holds up the training. What could not be sent is sent later: by the thread, or when the command is given again. A
    resumed run has each step in its history once, also those that a killed process had logged and not saved.

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
        start: Start | None = None,
    ):
        """finished: nothing is to come but what an earlier start could not write or send."""
        self.start = start or Start()
        self.config, self.manifest, self.world = config, manifest, world
        self.folder, self.step = Path(config.output), step
        self.finished, self.enabled, self.run_id = finished, enabled, run_id
        self.file = self.folder / POINTS_FILE
        self.record = RunRecord(config, manifest.fingerprint)
        self.experiment = ""
        self.points = JsonLines(self.file, partial(self._warn, "write"), "points")
        self.sender: threading.Thread | None = None
        self._wake, self._ended = threading.Event(), ""
        self._warned: set[str] = set()
        self._left = False  # nobody waits for the thread any more
        # Of the thread:
        self._sent_bytes = 0  # of the file, whose lines up to there the server has
        self._steps_on_server: dict[str, set[int]] | None = {}  # by metric, as asked; None: a new run
        self._opened = False
        self._further: deque[tuple[str, Callable[[], None]]] = deque()

    def __enter__(self) -> Tracker:
        if self.enabled:
            if not self.finished:
                self.record.note_start(self.step, self.start.tags)
            try:
                self._warn("read", truncate_after_step(self.file, self.step))
            except OSError as error:
                self._warn("write", f"{self.file}: {error.strerror}; training continues")
        if self.enabled and self.config.tracking.enabled:
            # Here, before the first step: in the thread it would slow the first steps down.
            import_mlflow(tracking_uri(self.config))
            self.sender = threading.Thread(target=self._work, name="mlflow", daemon=True)
            self.sender.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._warn("lost", self.points.close())
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
            self._left = True

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

    def keep(self, file: Path) -> None:
        """Make a file of the run's folder an artifact of the same path, once it can be; it has to stay as it is."""
        if self.sender is not None:
            place = file.parent.relative_to(self.folder).as_posix().strip(".") or None
            self._further.append((file.name, lambda: self.store.log_artifact(self.run_id, str(file), place)))

    def keep_results(self, step: int) -> None:
        """`keep` the evaluations in the run's folder and the page, and log the model; step: of its weights."""
        for file in evaluation_files(self.folder):
            self.keep(file)
        self.add_tags(evaluation_tags(self.folder))
        if self.sender is None:
            return
        if self.start.export is not None:
            self._further.append(("the model", lambda: self._log_model(step)))
        self.send()  # meanwhile
        if self.start.report is not None and self.config.tracking.report:
            for file in self.start.report(self.folder):
                self.keep(file)

    def _log_model(self, step: int) -> None:
        assert self.start.export is not None
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as part:  # the process may end meanwhile
            model = self.start.export(self.config.output, Path(part))
            log_model(self.store, self.experiment, str(self.run_id), model, step)

    def where(self) -> str:
        """Where the run is to be seen and compared; where MLflow has no run of it yet, how it gets one."""
        if not self.experiment:
            return f"MLflow has no page of it yet; the same command, given again, sends what is in {self.file}"
        page = page_of(tracking_uri(self.config), self.experiment, self.run_id or "")
        return f"its MLflow page: {page}\nto compare it: {compare_command(self.config)}"

    def add_tags(self, tags: Mapping[str, str]) -> None:
        """Add tags to the run, once that can be."""
        if self.sender is not None:
            what = f"the tags {', '.join(tags)}"
            self._further.append((what, lambda: pages.set_tags(self.store, str(self.run_id), tags)))

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
                missing = self._describe_further()
                if status:
                    if missing:
                        self._warn("missing", f"MLflow never took {', '.join(missing)}; a later start tries again")
                    if self.store.get_run(self.run_id).info.status != status:
                        self.store.set_terminated(self.run_id, status)
                    return
            except Exception as error:  # whatever comes of a server's answer: training continues
                self._steps_on_server = {}  # the server may have taken it all the same
                self._warn("send", f"MLflow: {str(error) or repr(error)}; points are in {self.file} and are sent "
                           "later, training continues")  # fmt: skip
                if status:
                    return

    def _open(self) -> None:
        config = self.config
        self.store = Store(tracking_uri(config))
        run = known_run(
            self.store,
            (self.record.read(), asked_run(self.store, config, self.record), self.run_id),
            self.folder,
            lambda reason: self._warn("run", f"{reason}; a new one gets all points of {self.file}"),
        )
        if run is None:
            name = url_without_secrets(config.tracking.run_name or self.folder.name)
            above = {PARENT: config.tracking.parent} if config.tracking.parent else {}
            began = round(1000 * self._began())
            experiment = experiment_id(self.store, config)
            tags = {KEY: self.record.ask(), **above}
            run = self.store.create_run(experiment, began, run_name=name, tags=tags)
            self._steps_on_server, self._sent_bytes = None, 0
        elif not self.finished:
            self.store.update_run(run.info.run_id, "RUNNING")
        self.run_id, self.experiment = str(run.info.run_id), run.info.experiment_id
        if self.record.read() != self.run_id:
            self.record.write(self.run_id)
        if config.tracking.parent not in (None, run.data.tags.get(PARENT)):
            self.store.set_tag(self.run_id, PARENT, config.tracking.parent)
        self._describe(run)
        self._opened = True

    def _began(self) -> float:
        """Of the run's first start, or its first point where an earlier start made no MLflow run."""
        first = next(self.points.lines(), {"time": math.inf})
        at = _number(first.get("time"))
        return min(self.start.began, at) if at > 0 else self.start.began

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
        if self._steps_on_server is not None:  # for later lines, too: a killed process may have sent more than it saved
            for name in {point.key for point in points} - self._steps_on_server.keys():
                self._steps_on_server[name] = {point.step for point in self.store.get_metric_history(self.run_id, name)}
            points = [point for point in points if point.step not in self._steps_on_server[point.key]]
        for start in range(0, len(points), 1000):  # the server's limit for one batch
            self.store.log_batch(self.run_id, metrics=points[start : start + 1000])
        self._sent_bytes += len(text)

    def _describe(self, run: Any) -> None:
        """What the run is: what of it the store does not have yet. An earlier start may have ended in between."""
        from mlflow import __version__ as mlflow_version

        store, run_id = self.store, str(self.run_id)
        tags = {"output": str(self.folder.resolve()), **self.start.tags}
        if not run.data.params:
            pages.set_params(store, run_id, flat(self.config) | {"world_size": self.world})
            # In a plain install the version is of the package mlflow-skinny.
            tags |= run_tags(self.config, self.manifest, self.world) | {"version.mlflow": mlflow_version}
        tags["restarts"] = str(self.record.restarts())
        pages.set_tags(store, run_id, tags)
        if not (run.inputs and run.inputs.dataset_inputs):
            self._further.append(("the data sets", lambda: pages.log_datasets(store, run_id, self.manifest)))
        self._further.append((pages.CONFIG_FILE, lambda: pages.log_config(store, run_id, self.config)))

    def _describe_further(self) -> list[str]:
        """What the points do not wait for: some servers lack a call for it, others cannot store files. Returns what was
        not taken; it is tried again."""
        missing = []
        for _ in range(len(self._further)):
            what, call = self._further.popleft()
            try:
                call()
            except (UserError, OSError) as error:
                missing.append((what, call))
                self._warn(what, f"MLflow does not take {what}: {error}; it is tried again")
        self._further.extendleft(reversed(missing))
        return [what for what, _ in missing]

    def _warn(self, about: str, text: str) -> None:
        """Once for each kind of trouble; nothing where there is none, or where the process ends without the thread: it
        has printed its last line, and removes the thread's temporary files."""
        if text and not self._left and about not in self._warned:
            self._warned.add(about)
            logger.warning(text)


def _number(value: Any) -> float:
    """nan for what is none, or none that a float can hold."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan
