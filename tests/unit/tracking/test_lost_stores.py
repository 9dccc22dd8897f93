"""Runs that are killed, stores and servers that are lost: each point arrives once, and nothing waits for them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cpsp_dist.config import load_config
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.tracking import mlflow as tracking
from cpsp_dist.tracking import pages
from cpsp_dist.tracking.known_runs import RunRecord, asked_run, started_as
from cpsp_dist.tracking.runs import find_runs
from cpsp_dist.tracking.store import EXPERIMENT_TAGS, RUN_FILE, Store, StoreError
from cpsp_dist.utils import files
from tests.support.environment import environment, free_port
from tests.support.runs import tracked_points
from tests.support.tracking import CONFIG, arguments, logged_steps, points_of


@pytest.mark.long
def test_tracking_uri_of_the_environment(prefork: Any, keypad_shards: Path, tmp_path: Path):
    store = tmp_path / "elsewhere.db"
    run = arguments(keypad_shards, tmp_path / "out" / "run")
    prefork.start(run, 1, MLFLOW_TRACKING_URI=f"sqlite:///{store}").finish()
    assert [run.status for run in find_runs(f"sqlite:///{store}", ["cpsp"])] == ["FINISHED"]
    assert not (tmp_path / "out" / "mlflow.db").exists()
    assert list((tmp_path / "mlartifacts").rglob("config.json")), "artifacts lie beside the store, not where one stands"


def send_often_and_stay_at_the_third_point(rank: int) -> None:
    tracking.SEND_EVERY_SECONDS = 0.2
    log, count = tracking.Tracker.log, iter(range(1000))

    def stay(self: tracking.Tracker, step: int, metrics: Mapping[str, float]) -> None:
        log(self, step, metrics)
        if "loss/total" in metrics and next(count) == 2:
            time.sleep(600)

    tracking.Tracker.log = stay  # type: ignore[method-assign]


@pytest.mark.long
def test_a_run_killed_three_times_is_one_run(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    """Its history is unbroken, each step once; it began with the first start and ended with the last."""
    from mlflow import MlflowClient

    run, store = arguments(keypad_shards, tmp_path / "run", "train.steps=14"), tmp_path / "mlflow.db"
    began = time.time()
    for last in (6, 8, 12):  # saved are the steps 3, 6 and 9
        launch = prefork.start(
            run, 1, patch="tests.unit.tracking.test_lost_stores:send_often_and_stay_at_the_third_point"
        )
        assert launch.until(lambda last=last: store.is_file() and points_of(store, last) > 0)
        launch.kill()
        launch.wait()
    prefork.start(run, 1).finish()
    client = MlflowClient(tracking_uri=f"sqlite:///{store}")
    (found,) = client.search_runs([client.get_experiment_by_name("cpsp").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.tags["restarts"] == "3"
    points = client.get_metric_history(found.info.run_id, "loss/total")
    assert [point.step for point in points] == [2, 4, 6, 8, 10, 12, 14]
    assert began <= found.info.start_time / 1000 < points[0].timestamp / 1000
    assert points[-1].timestamp <= found.info.end_time <= 1000 * time.time()


def die(*args: object, **kwargs: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_when_a_run_is_made(rank: int, moment: str) -> None:
    tracking.SEND_EVERY_SECONDS = 0.1
    if moment == "it is asked for":
        RunRecord.ask = die  # type: ignore[assignment]
    elif moment == "its id is not noted":
        RunRecord.write = die  # type: ignore[method-assign]
    elif moment == "its id is noted in part":
        write = RunRecord.write

        def write_in_part(self: RunRecord, run_id: str) -> None:
            files.sync = die
            write(self, run_id)

        RunRecord.write = write_in_part  # type: ignore[method-assign]
    else:
        pages.set_tags = die


def lose_the_answer(rank: int) -> None:
    """The store makes a run, and the process does not hear of it, the first time."""
    asked = Store.__getattr__
    lost: list[object] = []

    def ask(self: Store, name: str) -> Any:
        def call(*args: object, **kwargs: object) -> Any:
            answer = asked(self, name)(*args, **kwargs)
            if name == "create_run" and not lost:
                lost.append(answer)
                raise StoreError("no answer", silent=True)
            return answer

        return call

    Store.__getattr__ = ask  # type: ignore[method-assign]
    tracking.SEND_EVERY_SECONDS = 0.1


@pytest.mark.long
@pytest.mark.parametrize(
    "moment", ["it is asked for", "its id is not noted", "its id is noted in part", "it has no tags"]
)
def test_killed_while_its_run_is_made_it_is_one_run(
    prefork: Any, keypad_shards: Path, tmp_path: Path, moment: str
) -> None:
    began, run = time.time(), arguments(keypad_shards, tmp_path / "run")
    die_then = f"{__name__}:die_when_a_run_is_made"
    assert prefork.start(run, 1, patch=die_then, patch_args=[moment], hold=[2]).wait() == [-signal.SIGKILL]
    prefork.start(run, 1).finish()
    (found,) = find_runs(f"sqlite:///{tmp_path / 'mlflow.db'}", ["cpsp"])
    assert (found.status, found.tags["restarts"]) == ("FINISHED", "1")
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["time"]
    assert began < found.start < first
    assert tracked_points(tmp_path / "mlflow.db", "loss/total") == [2, 4, 6]


@pytest.mark.long
def test_a_run_whose_making_was_not_answered_is_one_run(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    run = arguments(keypad_shards, tmp_path / "run", "train.steps=14")
    launch = prefork.start(run, 1, patch=f"{__name__}:lose_the_answer")
    assert "no answer; points are in" in launch.finish()
    (found,) = find_runs(f"sqlite:///{tmp_path / 'mlflow.db'}", ["cpsp"])
    assert (found.status, found.tags["restarts"]) == ("FINISHED", "0")
    assert json.loads((tmp_path / "run" / RUN_FILE).read_text())["run_id"] == found.id


class NoSearch:
    """A store that does not search, or does not answer."""

    def __init__(self, silent: bool):
        self.silent = silent

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(lifecycle_stage="active", experiment_id="1", tags=EXPERIMENT_TAGS)

    def search_runs(self, *_: object, **__: object) -> Any:
        raise StoreError("no such call", silent=self.silent)


def test_a_store_that_does_not_search_gets_a_new_run(tmp_path: Path) -> None:
    """One that does not answer is asked again, with the same key."""
    config = load_config(CONFIG, [f"output={tmp_path}", "data.shards=shards"])
    record = RunRecord(config, "")
    assert asked_run(NoSearch(False), config, record) is None  # type: ignore[arg-type]
    key = record.ask()
    assert asked_run(NoSearch(False), config, record) is None  # type: ignore[arg-type]
    with pytest.raises(StoreError):
        asked_run(NoSearch(True), config, record)  # type: ignore[arg-type]
    assert record.ask() == RunRecord(config, "").ask() == key


def test_a_copy_of_a_folder_does_not_look_for_the_run_of_the_original(tmp_path: Path) -> None:
    """Only the key of a run whose id nobody noted leads to it."""
    config = load_config(CONFIG, [f"output={tmp_path}", "data.shards=shards"])
    key = RunRecord(config, "").ask()
    assert RunRecord(config, "").asked() == key
    assert RunRecord(config, "other data").asked() is None
    RunRecord(config, "").write("a" * 32)
    assert RunRecord(config, "").asked() is None
    assert RunRecord(config, "").read() == "a" * 32


@pytest.mark.long
def test_points_for_a_dead_server_are_sent_by_a_later_start(prefork: Any, keypad_shards: Path, tmp_path: Path):
    run = arguments(keypad_shards, tmp_path / "run", "tracking.flush_timeout=20")
    dead = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    printed = prefork.start(run, 1, **dead).finish()
    assert "warning: MLflow: " in printed
    assert "are sent later, training continues" in printed
    assert logged_steps(tmp_path / "run") == [2, 4, 6]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert not (tmp_path / "mlflow.db").exists()
    known = started_as(tmp_path / "run")  # what the page of a run has of its machine, whatever the store
    assert (known["host"], known["device"], known["restarts"]) == (socket.gethostname(), "CPU", "0")
    assert known["launcher"]

    for _ in range(2):  # the second time there is nothing left to send
        assert "(finished)" in prefork.start(run, 1).finish()
        assert tracked_points(tmp_path / "mlflow.db", "loss/total") == [2, 4, 6]
        assert tracked_points(tmp_path / "mlflow.db", "accuracy/test") == [6]
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results


@pytest.mark.long
def test_points_are_sent_when_the_store_comes_back(prefork: Any, keypad_shards: Path, tmp_path: Path):
    (tmp_path / "place").touch()  # a file where the store's folder should be
    store = tmp_path / "place" / "mlflow.db"
    more = ["train.steps=24", "tracking.every_steps=1", "checkpoint.every_steps=1"]
    run = arguments(keypad_shards, tmp_path / "run", *more)
    launch = prefork.start(run, 1, MLFLOW_TRACKING_URI=f"sqlite:///{store}")
    assert launch.until(lambda: "training continues" in launch.ranks[0].output)
    (tmp_path / "place").unlink()
    launch.finish()
    assert tracked_points(store, "loss/total") == list(range(1, 25))


def test_a_server_that_never_answers_holds_nothing_up(prefork: Any, keypad_shards: Path, tmp_path: Path):
    """It takes the connection and is silent; the client would wait 1,000 s for each request."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        silent = {
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{server.getsockname()[1]}",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "1000",
        }
        run = arguments(keypad_shards, tmp_path / "run", "tracking.flush_timeout=2")
        printed = prefork.start(run, 1, **silent).finish()
    assert "MLflow has not taken all points" in printed
    assert logged_steps(tmp_path / "run") == [2, 4, 6]
    assert (tmp_path / "run" / "results.json").is_file()


def killed_making_the_store(rank: int) -> None:
    """SIGKILL when mlflow comes to its tenth table."""
    from alembic.ddl.impl import DefaultImpl

    create_table, count = DefaultImpl.create_table, iter(range(1000))

    def create(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(count) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return create_table(self, *args, **kwargs)

    DefaultImpl.create_table = create


@pytest.mark.long
def test_killed_while_the_store_is_made(prefork: Any, keypad_shards: Path, tmp_path: Path):
    """A half-made SQLite file would be one that no later start can use."""
    run = arguments(keypad_shards, tmp_path / "run")
    launch = prefork.start(run, 1, patch="tests.unit.tracking.test_lost_stores:killed_making_the_store")
    assert launch.wait() == [-signal.SIGKILL]
    assert not (tmp_path / "mlflow.db").exists()
    prefork.start(run, 1).finish()
    assert tracked_points(tmp_path / "mlflow.db", "loss/total") == [2, 4, 6]


def test_the_library_is_imported_before_training_begins(
    keypad_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By the thread that trains, and not beside its first steps."""
    seen: list[threading.Thread] = []
    monkeypatch.setattr(tracking, "import_mlflow", lambda uri: seen.append(threading.current_thread()))
    config = load_config(CONFIG, [f"data.shards={keypad_shards}", f"output={tmp_path / 'out'}"])
    tracker = tracking.Tracker(
        config, Manifest.load(keypad_shards), 1, run_id=None, step=0, finished=False, enabled=True
    )
    monkeypatch.setattr(tracker, "_work", lambda: None)
    with tracker:
        assert seen == [threading.main_thread()]


def test_nothing_is_printed_after_the_last_line(
    keypad_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that has waited long enough removes temporary files of the thread that still sends."""
    reached, ended = threading.Event(), threading.Event()

    def log_config(*_: object) -> None:
        reached.set()
        assert ended.wait(60)
        raise FileNotFoundError(2, "No such file or directory", "config.json")

    monkeypatch.setattr(tracking.pages, "log_config", log_config)
    settings = [f"data.shards={keypad_shards}", f"output={tmp_path / 'out'}", "tracking.flush_timeout=0"]
    settings += [f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}"]
    tracker = tracking.Tracker(
        load_config(CONFIG, settings),
        Manifest.load(keypad_shards),
        1,
        run_id=None,
        step=0,
        finished=False,
        enabled=True,
    )
    with tracker:
        tracker.send()
        assert reached.wait(60)
    printed = caplog.messages[-1]
    assert "MLflow has not taken all points" in printed
    ended.set()
    assert tracker.sender is not None
    tracker.sender.join(60)
    assert not tracker.sender.is_alive()
    assert caplog.messages[-1] == printed


@pytest.mark.long
def test_the_sender_imports_nothing_large(tmp_path: Path) -> None:
    """What SQLite needs of MLflow, too: it slowed the steps down that followed the first 15 s."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    code = "import sys; from cpsp_dist.tracking.store import Store, import_mlflow; import_mlflow(sys.argv[1]); "
    code += "before = len(sys.modules); Store(sys.argv[1]).search_experiments(); print(len(sys.modules) - before)"
    done = subprocess.run(
        [sys.executable, "-c", code, uri], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40
