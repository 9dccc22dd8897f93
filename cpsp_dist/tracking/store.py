"""The MLflow store: where it is, and a client whose every answer comes within a limit.

Whatever a server, a database or a client library does instead of answering becomes one `StoreError` of one line.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import sqlite3
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from cpsp_dist.config import Config
from cpsp_dist.tracking.library import import_mlflow, new_sqlite_client
from cpsp_dist.utils import files
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.redact import without_secrets
from cpsp_dist.utils.text import first_line

logger = logging.getLogger(__name__)

#: Seconds that one request to the store may take, retries and all.
ANSWER_SECONDS = 60.0
SQLITE = "sqlite:///"
#: A table of every version of MLflow; a file with others alone is something else.
EXPERIMENTS = "experiments"
#: MLflow's own tag for the run above one, and the one on the run above a sweep: how many runs it has.
PARENT, SWEEP = "mlflow.parentRunId", "cpsp_dist.sweep"
#: The text that MLflow shows on the page of a run, and of an experiment.
NOTE = "mlflow.note.content"
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # its page opens on the runs
    "mlflow.experiment.primaryMetric.name": "accuracy/test",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
    NOTE: "Trainings of CPSP-dist: audio-visual event localization. `accuracy/test` and `accuracy/best_val` are the "
    "percentages of segments that the weights which were best on val label right; `accuracy/val` is the course of it. "
    "`cpsp-dist compare` prints the runs side by side, with intervals.",
}
#: Where `mlflow ui` serves its pages.
UI = "http://127.0.0.1:5000"
#: In a run's folder: which MLflow run it belongs to.
RUN_FILE = "mlflow_run.json"


class StoreError(UserError):
    """The store does not answer, or not as MLflow does; the text has no secrets.

    Attributes:
        code: MLflow's own word for it, such as RESOURCE_DOES_NOT_EXIST; '' where it has none.
        silent: no answer came, or only failures of the server until the client gave up; the next request would wait
            as long.
    """

    def __init__(self, text: str, code: str = "", *, silent: bool = False):
        super().__init__(text)
        self.code, self.silent = code, silent


def tracking_uri(config: Config) -> str:
    """`tracking.uri`, else MLFLOW_TRACKING_URI, else the store by `default_uri`. It may hold a password."""
    return config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(config.output)


def default_uri(output: str | Path) -> str:
    """The SQLite file `mlflow.db` in the nearest folder `runs` above an output folder, where `cpsp-dist compare` looks;
    without such a folder that can be written to, beside the output folder."""
    folder = Path(os.path.realpath(output))  # of a link that leads to itself, too
    shared = (above for above in folder.parents if above.name == "runs" and _may_write(above))
    return f"{SQLITE}{_quoted(next(shared, folder.parent) / 'mlflow.db')}"


def _may_write(folder: Path) -> bool:
    """Or make it."""
    return not folder.exists() or os.access(folder, os.W_OK | os.X_OK)


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store; None where it is another kind."""
    return Path(unquote(uri.removeprefix(SQLITE).partition("?")[0])) if uri.startswith(SQLITE) else None


def _artifacts(file: Path) -> str:
    """The URI of the folder beside a SQLite file; mlflow would take whatever folder the command was given in."""
    return (Path(os.path.realpath(file)).parent / "mlartifacts").as_uri()


def _quoted(path: Path) -> str:
    """As part of a database's URL, in which these characters mean something else."""
    return "".join(quote(c) if c in "%?#" else c for c in str(path))


class Store:
    """MlflowClient's methods, each answered within ANSWER_SECONDS. Raises StoreError from all of them."""

    def __init__(self, uri: str):
        import_mlflow(uri)  # it is no part of the answer, and takes a minute on a busy machine
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
            raise StoreError(f"{without_secrets(self._uri)}: no answer within {ANSWER_SECONDS:.0f} s", silent=True)
        return result[0]

    def _error(self, error: BaseException) -> StoreError:
        if isinstance(error, StoreError):
            return error
        text = first_line(error) if isinstance(error, Exception) else repr(error)
        # A server that is no MLflow server answers with pages.
        code = getattr(error, "error_code", "")
        silent = code == "TEMPORARILY_UNAVAILABLE" or _unanswered(error)
        return StoreError(f"{without_secrets(self._uri)}: {text[:300]}", str(code or ""), silent=silent)


class AskedStore:
    """A store that is opened when it is first asked, and asked no more after a request without an answer: for what
    many requests would fetch, of which each would wait again."""

    def __init__(self, uri: str):
        self._uri, self._silent = uri, False
        self._store: Store | None = None

    def ask(self, method: str, *args: Any) -> Any:
        """What `Store`'s method returns; None where there is no answer, now or before: one warning for all.

        Raises:
            StoreError: the answer is an error.
        """
        if self._silent:
            return None
        try:
            self._store = self._store or self._opened()
            return getattr(self._store, method)(*args)
        except StoreError as error:
            if not error.silent:
                raise
            self._silent = True
            logger.warning("MLflow at %s; it is asked no more: what only it has of these runs is left out", error)
            return None

    def _opened(self) -> Store:
        try:
            return Store(self._uri)
        except StoreError as error:
            raise StoreError(str(error), error.code, silent=True) from None


def _unanswered(error: BaseException | None) -> bool:
    """Whether an exception of `requests` without a response is among those that led to this one."""
    while error is not None:
        if isinstance(error, OSError) and getattr(error, "response", error) is None:
            return True
        error = error.__cause__ or error.__context__
    return False


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
    return _sqlite_client(uri, _artifacts(file))


def _sqlite_client(uri: str, artifacts: str) -> Any:
    try:
        return new_sqlite_client(uri, artifacts)
    finally:
        raw = Path(uri.removeprefix(SQLITE))
        if raw != sqlite_file(uri):  # mlflow makes a folder of the quoted name
            with contextlib.suppress(OSError):
                os.removedirs(raw.parent)


def _require_sqlite(file: Path) -> None:
    """Raises StoreError where it is no database, or one of something else, to which mlflow would add its tables; mlflow
    would also try again for minutes."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise StoreError(f"{file}: not a regular file")
        database = sqlite3.connect(f"file:{quote(str(file))}?mode=rw", uri=True, timeout=ANSWER_SECONDS / 4)
        try:
            tables = {name for (name,) in database.execute("select name from sqlite_master where type = 'table'")}
        finally:
            database.close()
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"{file}: not a usable MLflow store: {error}; {_remedy(error)}") from None
    if tables and EXPERIMENTS not in tables:
        raise StoreError(f"{file}: a database of something else, without MLflow's tables; give another file")


def _remedy(error: Exception) -> str:
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return "another program holds it; end that, or try again"
    if isinstance(error, PermissionError):
        return "it is somebody else's; give another, or ask for permission"
    return "move it away, and a new one is made"


def _make_store(file: Path) -> None:
    """A new SQLite file appears complete: mlflow makes it table by table for seconds, and cannot use one whose
    making a kill has ended, or where two runs begin at once."""
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-", ignore_cleanup_errors=True) as part:
        made = Path(part) / file.name
        _sqlite_client(f"{SQLITE}{_quoted(made)}", _artifacts(file)).search_experiments(max_results=1)
        try:
            os.link(made, file)
        except FileExistsError:
            pass  # another run was faster
        except OSError:  # a file system without hard links
            files.rename(made, file)


def active_experiment(store: Store, config: Config) -> Any:
    """`tracking.experiment`, as MLflow has it; None where there is none.

    Raises:
        StoreError: it was deleted, or the store does not answer.
    """
    name, uri = config.tracking.experiment, tracking_uri(config)
    found = store.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage != "active":
        raise StoreError(
            f"{without_secrets(uri)}: experiment '{name}' was deleted; restore it (`mlflow experiments restore "
            f"--experiment-id {found.experiment_id}`), or set tracking.experiment to another name"
        )
    return found


def experiment_id(store: Store, config: Config) -> str:
    """Of `tracking.experiment`, made where there is none. Raises StoreError as `active_experiment`."""
    name, uri = config.tracking.experiment, tracking_uri(config)
    found = active_experiment(store, config)
    if found is not None:
        if missing := EXPERIMENT_TAGS.keys() - (found.tags or {}).keys():
            for key in sorted(missing):
                store.set_experiment_tag(found.experiment_id, key, EXPERIMENT_TAGS[key])
        return str(found.experiment_id)
    file = sqlite_file(uri)
    location = _artifacts(file) if file else None  # a server decides for itself
    return str(store.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS))


def page_of(uri: str, experiment: str, run: str = "") -> str:
    """Where a run's page is, or an experiment's: an address, or the command that serves it and the address then."""
    place = f"/#/experiments/{experiment}" + (f"/runs/{run}" if run else "")
    shown = without_secrets(uri)
    if shown.startswith(("http://", "https://")):
        return shown.rstrip("/") + place
    return f"{UI}{place} after `mlflow ui --backend-store-uri {shlex.quote(shown)}`"


def reach(uri: str, limit: float) -> None:
    """Ask the store at `uri` something. Raises StoreError where it does not answer, within `limit` seconds."""
    os.environ.update(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT=str(max(1, int(limit / 2))))
    Store(uri).search_experiments(max_results=1)
