"""MLflow down, refusing, silent, slow, or no MLflow at all: a bounded wait, one line, and no point is lost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpsp_dist.cli import main
from cpsp_dist.config import Config, load_config
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.metrics.predictions import Predictions
from cpsp_dist.tracking import mlflow
from cpsp_dist.tracking import store as stores
from cpsp_dist.tracking.mlflow import Tracker
from cpsp_dist.tracking.runs import TrackedRun, find_runs
from cpsp_dist.tracking.sweeps import close_sweep, open_sweep
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.logs import console
from tests.support.environment import REPO, free_port
from tests.support.fake_mlflow import Reply, fake_mlflow, good, http
from tests.support.limits import within_limits
from tests.support.mutations import damaged, replaced

SECONDS = 10.0


@pytest.fixture(autouse=True)
def printed(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Warnings are printed, as in a command."""
    with console():
        yield


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "ANSWER_SECONDS", 2.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


@pytest.fixture(scope="module")
def config_and_data(keypad_shards: Path) -> tuple[Config, Manifest]:
    config = load_config(REPO / "configs" / "keypad.yaml", [f"data.shards={keypad_shards}"])
    return config, Manifest.load(keypad_shards)


def in_folder(config: Config, folder: Path, flush_timeout: float = 2.0, **tracking: Any) -> Config:
    folder.mkdir(parents=True, exist_ok=True)
    settings = config.tracking.model_copy(update={"flush_timeout": flush_timeout, **tracking})
    return config.model_copy(update={"output": str(folder), "tracking": settings})


def tracked(config: Config, manifest: Manifest, steps: int = 3, run_id: str | None = None) -> Tracker:
    """What a run of so many steps logs."""
    with Tracker(config, manifest, 1, run_id=run_id, step=0, finished=False, enabled=True) as tracker:
        for step in range(1, steps + 1):
            tracker.log(step, {"loss/total": 1 / step})
        tracker.send()
    steps_logged = [json.loads(line)["step"] for line in Path(config.output, "metrics.jsonl").read_text().splitlines()]
    assert steps_logged == [*range(1, steps + 1)]
    return tracker


def track(config: Config, manifest: Manifest, steps: int = 3, run_id: str | None = None) -> str | None:
    """The id of its MLflow run, where there is one."""
    return tracked(config, manifest, steps, run_id).run_id


def silent(connection: Any, path: str, number: int) -> None:
    connection.wait(60)


def dripping(connection: Any, path: str, number: int) -> None:
    connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while not connection.wait(0.3):
        connection.send(b"x")


def always(data: bytes) -> Reply:
    return lambda connection, path, number: connection.send(data)


SERVICES: dict[str, Reply] = {
    "silent": silent,
    "dripping": dripping,
    "500": always(http(500, b'{"error_code": "INTERNAL_ERROR", "message": "disk\\nfull"}')),
    "404": always(http(404, b"<html>not\nhere</html>", "text/html")),
    "401": always(http(401, b"You are not authenticated.", "text/plain")),
    "page": always(http(200, b"<html>\nlog in</html>", "text/html")),
    "list": always(http(200, b"[]")),
    "null": always(http(200, b"null")),
    "empty": always(http(200, b"{}")),
    "not http": always(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "closes": always(b""),
}
LONG = ("401", "page", "null", "not http", "404")


@pytest.mark.parametrize("name", [*(pytest.param(n, marks=pytest.mark.long if n in LONG else ()) for n in SERVICES)])
def test_a_service_that_is_none(
    config_and_data: tuple[Config, Manifest],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """For each thing that talks to it: comparing, a sweep's begin and end, training."""
    config, manifest = config_and_data
    with fake_mlflow(SERVICES[name]) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        began = time.monotonic()
        assert main(["compare"]) == 2
        shown = capfd.readouterr()
        assert (shown.out, shown.err.count("\n")) == ("", 1), shown.err
        assert shown.err.startswith("error: ")
        assert url in shown.err
        if name != "empty":
            with pytest.raises(UserError, match=r"or set tracking\.enabled=false") as caught:
                open_sweep(config, str(tmp_path / "sweep"), 2)
            assert "\n" not in str(caught.value)
        close_sweep(in_folder(config, tmp_path / "a", parent="0" * 32))
        track(in_folder(config, tmp_path / "run"), manifest)
        assert time.monotonic() - began < 4 * SECONDS
    lines = capfd.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("warning: ") for line in lines), lines


def test_every_damaged_answer_is_one_line_or_harmless(
    config_and_data: tuple[Config, Manifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config, manifest = config_and_data
    draw = random.Random(11)

    def reply(connection: Any, path: str, number: int) -> None:
        content = good(path)
        if draw.random() < 0.5:
            (content,) = damaged(content, draw.randrange(10**6), 1)
        connection.send(http(draw.choice((200, 200, 200, 200, 400, 403, 404, 429, 500, 503)), content))

    with fake_mlflow(reply) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        ended = []
        for number in range(60):
            with within_limits(number):
                ended.append(main(["compare"]))
            shown = capfd.readouterr()
            assert shown.err.count("\n") == (ended[-1] == 2), shown.err
        assert {*ended} == {0, 2}
        for number in range(6):
            began = time.monotonic()
            with within_limits(number):
                track(in_folder(config, tmp_path / str(number)), manifest)
            assert time.monotonic() - began < SECONDS
        assert "Traceback" not in capfd.readouterr().err


def test_a_store_that_is_no_database(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mlflow.db"
    contents = [b"SQLite format 3\0" + b"\xff" * 5000, b"no database" * 100]
    for content in contents:
        file.write_bytes(content)
        assert main(["compare", "--uri", f"sqlite:///{file}"]) == 2
        shown = capfd.readouterr()
        assert shown.err.count("\n") == 1, shown.err
        assert f"{file}: not a usable MLflow store" in shown.err
    file.unlink()
    for what in replaced(file):
        assert main(["compare", "--uri", f"sqlite:///{file}"]) == 2, what
        shown = capfd.readouterr()
        assert shown.err.count("\n") == 1, shown.err


def test_another_programs_database_stays_as_it_is(tmp_path: Path) -> None:
    """mlflow would add its tables to it."""
    file = tmp_path / "places.db"
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("create table places (name)")
    content = file.read_bytes()
    with pytest.raises(stores.StoreError, match=r"places\.db: a database of something else"):
        stores.Store(f"sqlite:///{file}")
    assert file.read_bytes() == content


def test_the_import_of_mlflow_is_no_part_of_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine it takes longer than an answer may."""
    seen: list[threading.Thread] = []
    monkeypatch.setattr(stores, "import_mlflow", lambda uri: seen.append(threading.current_thread()))
    with pytest.raises(stores.StoreError, match="a database in memory keeps no runs"):
        stores.Store("sqlite://")
    assert seen == [threading.main_thread()]


def test_a_store_that_another_program_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not to be moved away."""
    monkeypatch.setattr(stores, "ANSWER_SECONDS", 2.0)
    file = tmp_path / "mlflow.db"
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as database:
        database.execute("create table experiments (name)")
        database.execute("begin exclusive")
        with pytest.raises(stores.StoreError, match=r"database is locked; another program holds it"):
            stores.Store(f"sqlite:///{file}")


@pytest.fixture(scope="module")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of MLflow, without a run; made once, which takes seconds."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    stores.Store(f"sqlite:///{file}").search_experiments(max_results=1)
    return file


def runs_in(uri: str) -> list[TrackedRun]:
    return find_runs(uri, ["cpsp"])


def inputs_of(uri: str) -> list[str]:
    with sqlite3.connect(stores.sqlite_file(uri) or "") as database:
        return [digest for (digest,) in database.execute("select digest from datasets")]


@pytest.fixture
def store(new_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(stores, "ANSWER_SECONDS", 60.0)
    (tmp_path / "mlflow.db").write_bytes(new_store.read_bytes())
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def test_the_fingerprint_is_there_where_artifacts_cannot_be_stored(
    config_and_data: tuple[Config, Manifest], tmp_path: Path, store: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config, manifest = config_and_data
    stores.Store(store).create_experiment("cpsp", artifact_location="/proc/nowhere/art")
    track(in_folder(config, tmp_path / "run", flush_timeout=60), manifest)
    (run,) = runs_in(store)
    assert run.metrics == {"loss/total": 1 / 3}
    assert run.status == "FINISHED"
    assert len(inputs_of(store)) == len(manifest.splits)
    first, last = capfd.readouterr().err.splitlines()
    assert first.startswith("warning: MLflow does not take config.json: ")
    assert last == "warning: MLflow never took config.json; a later start tries again"


@pytest.mark.long
def test_artifacts_are_tried_again(
    config_and_data: tuple[Config, Manifest],
    tmp_path: Path,
    store: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The place of artifacts fails during all of a first start, and until the second has tried once."""
    config, manifest = config_and_data
    monkeypatch.setattr(mlflow, "SEND_EVERY_SECONDS", 0.05)
    failed, warn = threading.Event(), Tracker._warn
    last = "predictions_test.npz"

    def note(self: Tracker, about: str, text: str) -> None:
        warn(self, about, text)
        if about == last:
            failed.set()

    monkeypatch.setattr(Tracker, "_warn", note)
    place = tmp_path / "artifacts"
    place.write_text("a file where a folder should be")
    client = stores.Store(store)
    client.create_experiment("cpsp", artifact_location=str(place))
    here = in_folder(config, tmp_path / "run", flush_timeout=60)
    Predictions("test", 1, ["a"], *(np.zeros((1, 1)),) * 6).save(tmp_path / "run" / last)

    def start(recovers: bool) -> None:
        failed.clear()
        with Tracker(here, manifest, 1, run_id=None, step=0, finished=False, enabled=True) as tracker:
            tracker.log(1, {"loss/total": 1.0})
            tracker.keep_results(1)
            assert failed.wait(60)
            if recovers:
                place.unlink()

    start(recovers=False)
    *tried, never = capfd.readouterr().err.splitlines()
    names = {"config.json", last}
    assert len(tried) == 2, "each once"
    assert {line.removeprefix("warning: MLflow does not take ").partition(":")[0] for line in tried} == names
    taken = never.removeprefix("warning: MLflow never took ").removesuffix("; a later start tries again")
    assert {*taken.split(", ")} == names
    (run,) = runs_in(store)
    assert (run.status, run.metrics) == ("FINISHED", {"loss/total": 1.0})
    start(recovers=True)
    assert "never took" not in capfd.readouterr().err
    assert {file.path for file in client.list_artifacts(run.id)} == names
    (run,) = runs_in(store)
    assert run.status == "FINISHED"


def test_a_deleted_or_copied_run_gets_a_new_one_with_all_points(
    config_and_data: tuple[Config, Manifest], tmp_path: Path, store: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config, manifest = config_and_data
    first = in_folder(config, tmp_path / "first", flush_timeout=60)
    run_id = track(first, manifest)
    copy = in_folder(config, tmp_path / "copy", flush_timeout=60)
    assert track(copy, manifest, run_id=run_id) not in (None, run_id)
    assert f"belongs to {tmp_path}/first, of which {tmp_path}/copy is a copy" in capfd.readouterr().err
    assert [run.metrics for run in runs_in(store)] == [{"loss/total": 1 / 3}] * 2
    os.rename(tmp_path / "first", tmp_path / "moved")
    (tmp_path / "moved" / "metrics.jsonl").unlink()
    assert track(in_folder(config, tmp_path / "moved", flush_timeout=60), manifest, run_id=run_id) == run_id
    stores.Store(store).delete_run(run_id)
    assert track(in_folder(config, tmp_path / "after", flush_timeout=60), manifest, run_id=run_id) != run_id
    assert "was deleted; a new one gets all points" in capfd.readouterr().err
    assert track(in_folder(config, tmp_path / "last", flush_timeout=60), manifest, run_id="f" * 32) is not None
    assert "MLflow has no run ffff" in capfd.readouterr().err


def test_a_deleted_experiment_is_named(
    config_and_data: tuple[Config, Manifest], tmp_path: Path, store: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config, manifest = config_and_data
    client = stores.Store(store)
    client.delete_experiment(client.create_experiment("cpsp"))
    track(in_folder(config, tmp_path / "run", flush_timeout=60), manifest)
    (line,) = capfd.readouterr().err.splitlines()
    assert "experiment 'cpsp' was deleted; restore it" in line
    with pytest.raises(UserError, match="was deleted; restore it"):
        open_sweep(config, str(tmp_path / "sweep"), 2)


@pytest.mark.long
@pytest.mark.parametrize("name", ["pct%25z", "a?b#ü", 'it\'s "here"', "a :b\\c"])
def test_a_folder_whose_name_means_something_in_a_url_or_in_sql(
    config_and_data: tuple[Config, Manifest], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of the store, and the one in which the command is given."""
    monkeypatch.setattr(stores, "ANSWER_SECONDS", 60.0)
    config, manifest = config_and_data
    here = in_folder(config, tmp_path / name / "run", flush_timeout=60)
    monkeypatch.chdir(tmp_path / name)
    track(here, manifest)
    assert (tmp_path / name / "mlflow.db").is_file()
    assert [run.metrics for run in runs_in(stores.tracking_uri(here))] == [{"loss/total": 1 / 3}]
    store, artifacts = stores.Store(stores.tracking_uri(here)), tmp_path / name / "mlartifacts"
    assert [*artifacts.rglob("config.json")]
    assert store.get_experiment("0").artifact_location == f"{artifacts.as_uri()}/0"
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert {path.name for path in Path.cwd().iterdir()} == {"run", "mlflow.db", "mlartifacts"}


def test_a_port_where_nobody_listens(
    config_and_data: tuple[Config, Manifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config, manifest = config_and_data
    for uri in (f"http://127.0.0.1:{free_port()}", "nonsense://x", "http://", "postgresql://u:s3cretpw@127.0.0.1:1/x"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert main(["compare"]) == 2
        tracker = tracked(in_folder(config, tmp_path / "run"), manifest)
        assert tracker.where() == (
            "MLflow has no page of it yet; the same command, given again, sends what is in "
            f"{tmp_path}/run/metrics.jsonl"
        )
        (tmp_path / "run" / "metrics.jsonl").unlink()
        shown = capfd.readouterr().err
        assert shown.count("\n") == 2, shown
        assert "s3cretpw" not in shown


@pytest.mark.parametrize(
    "uri", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite+pysqlite://", "sqlite://?timeout=3"]
)
def test_a_database_in_memory_is_refused(uri: str) -> None:
    """In memory it is another one for each connection: runs would be lost, and mlflow prints a traceback."""
    with pytest.raises(stores.StoreError, match=r"^sqlite.*: a database in memory keeps no runs; give sqlite:///PATH/"):
        stores.Store(uri)
