"""The MLflow store: where it is, a client whose every answer comes within a limit, the runs in it, and sweeps.

Whatever a server, a database or a client library does instead of answering becomes one `StoreError` of one line.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from cpsp_dist.config import Config
from cpsp_dist.errors import UserError
from cpsp_dist.utils import files
from cpsp_dist.utils.redact import without_secrets
from cpsp_dist.utils.text import first_line

logger = logging.getLogger(__name__)

#: Seconds that one request to the store may take, retries and all.
ANSWER_SECONDS = 60.0
SQLITE = "sqlite:///"
#: MLflow's own tag for the run above one, and the one on the run above a sweep: how many runs it has.
PARENT, SWEEP = "mlflow.parentRunId", "cpsp_dist.sweep"


class StoreError(UserError):
    """The store does not answer, or not as MLflow does; the text has no secrets.

    Attributes:
        code: MLflow's own word for it, such as RESOURCE_DOES_NOT_EXIST; '' where it has none.
    """

    def __init__(self, text: str, code: str = ""):
        super().__init__(text)
        self.code = code


def tracking_uri(output: str | Path) -> str:
    """MLFLOW_TRACKING_URI where it is set, else a SQLite file beside the run folders. It may hold a password."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    return uri or f"{SQLITE}{_quoted(Path(output).resolve().parent / 'mlflow.db')}"


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store; None where it is another kind."""
    return Path(unquote(uri.removeprefix(SQLITE).partition("?")[0])) if uri.startswith(SQLITE) else None


def _quoted(path: Path) -> str:
    """As part of a database's URL, in which these characters mean something else."""
    return "".join(quote(c) if c in "%?#" else c for c in str(path))


class Store:
    """MlflowClient's methods, each answered within ANSWER_SECONDS. Raises StoreError from all of them."""

    def __init__(self, uri: str):
        self._uri = uri
        self._client = self._bounded(lambda: _client(uri))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        return lambda *args, **kwargs: self._bounded(lambda: method(*args, **kwargs))

    def _bounded(self, call: Callable[[], Any]) -> Any:
        result: list[Any] = []
        failure: list[BaseException] = []

        def work() -> None:
            try:
                result.append(call())
            except BaseException as error:  # whatever a client library or server throws
                failure.append(error)

        thread = threading.Thread(target=work, name="mlflow request", daemon=True)
        thread.start()
        thread.join(ANSWER_SECONDS)
        if failure:
            raise self._error(failure[0]) from None
        if not result:
            raise StoreError(f"{without_secrets(self._uri)}: no answer within {ANSWER_SECONDS:.0f} s")
        return result[0]

    def _error(self, error: BaseException) -> StoreError:
        if isinstance(error, StoreError):
            return error
        text = first_line(error) if isinstance(error, Exception) else repr(error)
        # A server that is no MLflow server answers with pages.
        code = getattr(error, "error_code", "")
        return StoreError(f"{without_secrets(self._uri)}: {text[:300]}", str(code or ""))


def _client(uri: str) -> Any:
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    # A server that is down is noticed within seconds; mlflow's own default is minutes for each request.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import mlflow

    for name in ("mlflow", "alembic", "urllib3.connectionpool"):  # migrations of a new file, a line for each retry
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db").setLevel(logging.CRITICAL)  # it prints a traceback of what it raises
    file = sqlite_file(uri)
    if re.fullmatch(r"sqlite(\+\w+)?:/{0,3}(:memory:)?(\?.*)?", uri):
        raise StoreError(f"{without_secrets(uri)}: a database in memory keeps no runs; give sqlite:///PATH/mlflow.db")
    if file is None:
        return mlflow.MlflowClient(tracking_uri=uri)
    _make_store(file)
    _require_sqlite(file)
    return _sqlite_client(uri)


def _sqlite_client(uri: str) -> Any:
    import mlflow

    try:
        return mlflow.MlflowClient(tracking_uri=uri)
    finally:
        raw = Path(uri.removeprefix(SQLITE))
        if raw != sqlite_file(uri):  # mlflow makes a folder of the quoted name
            with contextlib.suppress(OSError):
                os.removedirs(raw.parent)


def _require_sqlite(file: Path) -> None:
    """Raises StoreError where it is no database: mlflow would try again for minutes."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise StoreError(f"{file}: not a regular file")
        database = sqlite3.connect(f"file:{quote(str(file))}?mode=rw", uri=True, timeout=ANSWER_SECONDS / 4)
        try:
            database.execute("select count(*) from sqlite_master").fetchone()
        finally:
            database.close()
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"{file}: not a usable MLflow store: {error}; move it away, and a new one is made") from None


def _make_store(file: Path) -> None:
    """A new SQLite file appears complete: mlflow makes it table by table for seconds, and cannot use one whose
    making a kill has ended, or where two runs begin at once."""
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-") as part:
        made = Path(part) / file.name
        _sqlite_client(f"{SQLITE}{_quoted(made)}").search_experiments(max_results=1)
        try:
            os.link(made, file)
        except FileExistsError:
            pass  # another run was faster
        except OSError:  # a file system without hard links
            files.rename(made, file)


def experiment_id(store: Store, config: Config) -> str:
    """Of `tracking.experiment`, made where there is none.

    Raises:
        StoreError: it was deleted, or the store does not answer.
    """
    name, uri = config.tracking.experiment, tracking_uri(config.output)
    found = store.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage != "active":
            raise StoreError(
                f"{without_secrets(uri)}: experiment '{name}' was deleted; restore it (`mlflow experiments restore "
                f"--experiment-id {found.experiment_id}`), or set tracking.experiment to another name"
            )
        return str(found.experiment_id)
    # Beside a SQLite file; mlflow would take whatever folder the command was given in. A server decides for itself.
    file = sqlite_file(uri)
    place = file.resolve().parent / "mlartifacts" if file else None
    return str(store.create_experiment(name, artifact_location=place.as_uri() if place else None))


def all_runs(uri: str, experiment: str, parent: str | None = None) -> list[dict[str, Any]]:
    """All runs of an experiment, oldest first: {'name', 'status', 'params': {}, 'metrics': {}}.

    The runs above sweeps, which trained nothing, are left out.

    Args:
        parent: name or MLflow id of a sweep, for its runs alone; of sweeps with one name, the newest.

    Raises:
        UserError: no such store, experiment or sweep; the text names those there are.
    """
    shown, file = without_secrets(uri), sqlite_file(uri)
    if file is not None and not _exists(file):
        raise UserError(f"no MLflow store at {shown}; give --uri or set MLFLOW_TRACKING_URI")
    try:
        store = Store(uri)
        found = store.get_experiment_by_name(experiment)
        if found is None or not found.experiment_id:
            names = ", ".join(e.name for e in store.search_experiments())
            raise UserError(f"no experiment '{experiment}' at {shown}; there are: {names}")
        every = _search(store, found.experiment_id)
    except StoreError as error:
        raise UserError(f"MLflow at {error}; see to the store, or give another with --uri") from None
    runs = [r for r in every if SWEEP not in r.data.tags]
    if parent is not None:
        above = {r.info.run_id: r.info.run_name for r in every if SWEEP in r.data.tags}
        chosen = [run_id for run_id, name in above.items() if parent in (run_id, name)]
        if not chosen:
            names = ", ".join(sorted({*above.values()})) or "none"
            raise UserError(f"no sweep '{parent}' in experiment '{experiment}' at {shown}; there are: {names}")
        runs = [r for r in runs if r.data.tags.get(PARENT) == chosen[-1]]
    return [
        {"name": r.info.run_name, "status": r.info.status, "params": r.data.params, "metrics": r.data.metrics}
        for r in runs
    ]


def _exists(file: Path) -> bool:
    try:
        file.stat()
    except PermissionError:
        return True  # what is wrong with it is said when it is opened
    except OSError:
        return False
    return True


def _search(store: Store, experiment: str, filter_string: str = "") -> list[Any]:
    """All pages, oldest run first."""
    runs, token = list[Any](), None
    while True:
        page = store.search_runs([experiment], filter_string, order_by=["attributes.start_time ASC"], page_token=token)
        runs += page
        if not page or not page.token:
            return runs
        token = page.token


def reach(uri: str, limit: float) -> None:
    """Ask the store at `uri` something. Raises StoreError where it does not answer, within `limit` seconds."""
    os.environ.update(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT=str(max(1, int(limit / 2))))
    Store(uri).search_experiments(max_results=1)


def open_sweep(config: Config, folder: str, runs: int) -> str:
    """The id of the MLflow run above a sweep's `runs` runs; that of an earlier launch of the sweep, where there is one.

    Args:
        config: of any of its runs. folder: that holds the folders of its runs; its name is the sweep's.

    Raises:
        UserError: MLflow does not answer.
    """
    try:
        store = Store(tracking_uri(config.output))
        experiment, place = experiment_id(store, config), str(Path(folder).resolve())
        for run in reversed(_search(store, experiment)):
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
        store = Store(tracking_uri(config.output))
        above = store.get_run(parent)
        if status is None:
            below = _search(store, above.info.experiment_id, f"tags.`{PARENT}` = '{parent}'")
            states = {run.info.status for run in below}
            planned = above.data.tags.get(SWEEP, "")
            if not planned.isdecimal() or len(below) < int(planned) or not states <= {"FINISHED", "FAILED"}:
                return
            status = "FAILED" if "FAILED" in states else "FINISHED"
        if above.info.status != status:
            store.set_terminated(parent, status)
    except StoreError as error:
        logger.warning(f"MLflow: {error}; the sweep's own run {parent} stays as it is")
