"""A store that does not answer is asked once in a comparison, and named in one warning."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from cpsp_dist.tracking import store as store_module
from cpsp_dist.tracking.history import read_histories
from cpsp_dist.tracking.predictions import STORED_TAG, stored_predictions
from cpsp_dist.tracking.runs import TrackedRun
from cpsp_dist.tracking.store import AskedStore
from tests.support.environment import environment

RUNS = [TrackedRun(str(n), f"run{n}", "FINISHED", metrics={"a": 1.0}, tags={STORED_TAG: "test"}) for n in range(3)]


class ClientError(Exception):
    """As mlflow's: of a request that failed, or of an answer with an error."""

    error_code = "INTERNAL_ERROR"


class Client:
    """MLflow's, with the two methods that a comparison asks for each run."""

    def __init__(self, fails: Callable[[], Any]):
        self.fails, self.asked = fails, 0

    def get_metric_history(self, run_id: str, name: str) -> Any:
        self.asked += 1
        return self.fails()

    def download_artifacts(self, run_id: str, path: str, folder: str) -> Any:
        self.asked += 1
        return self.fails()


def refused() -> None:
    """As mlflow raises it: requests' exception is the context only."""
    try:
        raise requests.exceptions.ConnectionError("refused")
    except OSError as error:
        raise ClientError(f"API request failed with exception {error}")  # noqa: B904


def answered_404() -> None:
    try:
        raise requests.exceptions.HTTPError("404", response=requests.Response())
    except OSError as error:
        raise ClientError("no such artifact") from error


def compared(monkeypatch: pytest.MonkeyPatch, client: Client, *, history_first: bool) -> None:
    monkeypatch.setattr(store_module, "_client", lambda uri: client)
    store = AskedStore("http://store:5000")
    stored = stored_predictions(store)
    if history_first:
        assert not any(read_histories(store, RUNS, ["a"]).values())
    assert [stored(run, "test") for run in RUNS] == [None] * 3
    if not history_first:
        assert not any(read_histories(store, RUNS, ["a"]).values())


@pytest.mark.parametrize("history_first", [True, False])
@pytest.mark.parametrize("kind", ["refuses", "hangs"])
def test_without_an_answer_it_is_asked_once(
    kind: str, history_first: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ended = threading.Event()
    client = Client(refused if kind == "refuses" else ended.wait)
    monkeypatch.setattr(store_module, "ANSWER_SECONDS", 60 if kind == "refuses" else 0.05)
    with caplog.at_level(logging.WARNING):
        compared(monkeypatch, client, history_first=history_first)
    ended.set()
    assert client.asked == 1
    (line,) = caplog.messages
    assert line.startswith("MLflow at http://store:5000: ")
    assert line.endswith("; it is asked no more: what only it has of these runs is left out")


def test_an_answer_that_is_an_error_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = Client(answered_404)
    with caplog.at_level(logging.WARNING):
        compared(monkeypatch, client, history_first=True)
    assert client.asked == len(caplog.messages) == 6


def test_a_store_that_cannot_be_opened_is_opened_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = []

    def open_client(uri: str) -> None:
        opened.append(uri)
        raise ValueError("no such scheme")

    monkeypatch.setattr(store_module, "_client", open_client)
    with caplog.at_level(logging.WARNING):
        assert not any(read_histories(AskedStore("odd://store"), RUNS, ["a"]).values())
    assert (len(opened), len(caplog.messages)) == (1, 1)


ENDS_MEANWHILE = """
import contextlib, itertools, sys, threading
from pathlib import Path
from cpsp_dist.tracking import store

begun = threading.Event()

def client(uri, artifacts):  # as SQLite does, it writes beside its file as long as the process lives
    folder = Path(uri.removeprefix(store.SQLITE)).parent
    for number in itertools.count():
        with contextlib.suppress(OSError):
            (folder / str(number)).touch()
        if number == 5000:
            begun.set()

store._sqlite_client = client
threading.Thread(target=store._make_store, args=(Path(sys.argv[1]),), daemon=True).start()
assert begun.wait(60)
"""


def test_a_process_that_ends_while_a_store_is_made_is_silent(tmp_path: Path) -> None:
    """Python removes the temporary folder at its end, while the thread still writes there."""
    command = [sys.executable, "-c", ENDS_MEANWHILE, str(tmp_path / "mlflow.db")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
