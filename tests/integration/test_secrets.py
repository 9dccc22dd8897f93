"""A secret in every place that takes a URL, searched for in all that a run, a failed run and a sweep print and leave:
output, logs, files, databases, what is submitted, and what MLflow is sent."""

from __future__ import annotations

import base64
import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.environment import free_port
from tests.support.fake_mlflow import fake_mlflow, good, http
from tests.support.forked_command import Ended, run
from tests.support.runs import KEYPAD, overrides
from tests.support.servers import AiohttpServer

TRAIN = "cpsp_dist.train"
#: The password that the shards' server wants, and what every other secret here contains.
SECRET = "s3cret"
QUICK = ("train.steps=2", "tracking.every_steps=1", "engine.kind=ddp", "data.log_samples=true")
#: Of the environment: proxies of protocols that nothing here uses, and secrets by their name.
ENVIRONMENT = {
    "HTTPS_PROXY": f"http://me:{SECRET}-proxy@127.0.0.1:1",
    "FTP_PROXY": f"http://me:{SECRET}-proxy@127.0.0.1:1",
    "AWS_SECRET_ACCESS_KEY": f"{SECRET}-aws",
    "AWS_SESSION_TOKEN": f"{SECRET}-session",
    "FSSPEC_S3_SECRET": f"{SECRET}-fsspec",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "CPSP_DEBUG": "1",
}
#: For the shards' server, where a URL without password is known: a run keeps no other.
_HEADER = base64.b64encode(f"me:{SECRET}".encode()).decode()
AUTHORIZED = json.dumps({"headers": {"Authorization": f"Basic {_HEADER}"}})


def forms(secret: str) -> list[bytes]:
    """As it stands, as in the header of a request, and as text of two bytes a character."""
    encoded = [base64.b64encode(f"{user}:{secret}".encode()) for user in ("me", "alice")]
    return [secret.encode(), secret.encode("utf-16-le"), *encoded]


def found_in(folder: Path, ended: Ended) -> list[str]:
    """Where the secret is, the names of files too; every database is read as its rows also."""
    found = [name for name, text in (("stdout", ended.out), ("stderr", ended.err)) if SECRET in text]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = str(path.relative_to(folder)).encode() + path.read_bytes()
        if path.suffix == ".db":
            with sqlite3.connect(path) as database:
                content += "\n".join(database.iterdump()).encode()
        found += [str(path)] if any(form in content for form in forms(SECRET)) else []
    return found


@pytest.fixture(scope="module")
def site(keypad_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AiohttpServer]:
    server = AiohttpServer(tmp_path_factory.mktemp("site"))
    shutil.copytree(keypad_shards, server.folder / "keypad")
    yield server
    server.stop()


def private(site: AiohttpServer, password: str = SECRET) -> str:
    return f"http://me:{password}@127.0.0.1:{site.port}/private/keypad?X-Amz-Signature={SECRET}-signature"


@contextmanager
def tracking() -> Iterator[tuple[str, list[bytes]]]:
    """The URL of an MLflow server with a password in it, and all that is sent there but the header with it."""
    sent: list[bytes] = []

    def reply(connection: Any, path: str, number: int) -> None:
        sent.append(path.encode() + connection.body)
        connection.send(http(200, good(path)))

    with fake_mlflow(reply) as url:
        yield url.replace("://", f"://alice:{SECRET}-mlflow@"), sent


def training(url: str, output: Path, *more: str) -> list[str]:
    name = f"tracking.run_name=of https://me:{SECRET}-name@host/x"
    settings = [*overrides(Path("x"), output, *QUICK, f"data.cache={output.parent / 'cache'}", name, *more)][1:]
    return ["--config", str(KEYPAD), f"data.shards={url}", *settings]


@pytest.mark.long
def test_a_complete_run(prefork: Any, site: AiohttpServer, tmp_path: Path) -> None:
    """To a server, then to a SQLite file; and what reads a run."""
    with tracking() as (uri, sent):
        env = ENVIRONMENT | {"MLFLOW_TRACKING_URI": uri}
        ended = run(prefork, tmp_path, training(private(site), tmp_path / "run"), command=TRAIN, env=env)
        assert ended.code == 0, ended
        assert found_in(tmp_path, ended) == []
        compared = run(prefork, tmp_path, ["compare", "--uri", uri], env=ENVIRONMENT)
        assert compared.code == 0, compared
        assert found_in(tmp_path, compared) == []
    assert b"accuracy/test" in b"".join(sent), "points arrived"
    assert not [part for part in sent for form in forms(SECRET) if form in part]
    ended = run(prefork, tmp_path, training(private(site), tmp_path / "other"), command=TRAIN, env=ENVIRONMENT)
    assert ended.code == 0, ended
    assert (tmp_path / "mlflow.db").is_file()
    assert found_in(tmp_path, ended) == []
    env = ENVIRONMENT | {"CPSP_CACHE": str(tmp_path / "cache")}
    for argv in (
        ["evaluate", tmp_path / "run", "--shards", private(site)],
        ["export", tmp_path / "run", "--out", tmp_path / "model"],
        ["predict", tmp_path / "model", private(site), "--out", tmp_path / "p.jsonl"],
        ["shards", "info", private(site)],
        ["shards", "preview", private(site)],
        ["shards", "verify", private(site)],
        ["doctor", *training(private(site), tmp_path / "run"), "--timeout", "20"],
    ):
        authorized = {"FSSPEC_HTTP": AUTHORIZED} if "export" in argv else {}
        ended = run(prefork, tmp_path, argv, env=env | authorized)
        assert ended.code == 0, ended
        assert found_in(tmp_path, ended) == [], argv


@pytest.mark.long
def test_failed_runs(prefork: Any, site: AiohttpServer, tmp_path: Path) -> None:
    """A wrong password, a shard that is gone, a server that is down, a store without a driver."""
    config = tmp_path.parent / "secret.yaml"
    config.write_text(f"extends: {KEYPAD}\ndata: {{shards: [{private(site)!r}]}}\ntrack: {private(site)!r}\n")
    down = f"http://alice:{SECRET}@127.0.0.1:{free_port()}/?token={SECRET}-token"
    (site.folder / "keypad" / "val-000000.tar").rename(site.folder / "away")
    try:
        for argv, uri, code in (
            (training(private(site, f"{SECRET}-wrong"), tmp_path / "a"), down, 2),
            (training(private(site), tmp_path / "b", "tracking.flush_timeout=5"), down, 2),
            (training(private(site), tmp_path / "c"), f"postgresql://alice:{SECRET}@127.0.0.1:1/x", 2),
            (["--config", config], down, 2),
            (["--config", private(site)], down, 2),
            (training(private(site), tmp_path / "d", f"extends={private(site)}"), down, 2),
            (training(private(site), tmp_path / "d", "--dry-run"), down, 0),
        ):
            ended = run(prefork, tmp_path, argv, command=TRAIN, env=ENVIRONMENT | {"MLFLOW_TRACKING_URI": uri})
            assert ended.code == code, ended
            assert found_in(tmp_path, ended) == [], argv
    finally:
        (site.folder / "away").rename(site.folder / "keypad" / "val-000000.tar")
    assert {"logs", "metrics.jsonl"} <= {path.name for path in (tmp_path / "b").iterdir()}


@pytest.mark.long
def test_a_sweep(prefork: Any, site: AiohttpServer, tmp_path: Path) -> None:
    """With what submitit writes; a password in a setting or a line of the batch script is refused, for the environment
    serves as well."""
    sweep = ["--sweep", "train.seed=1", "--local"]
    with tracking() as (uri, sent):
        env = ENVIRONMENT | {"MLFLOW_TRACKING_URI": uri, "FSSPEC_HTTP": AUTHORIZED}
        settings = training(f"http://127.0.0.1:{site.port}/private/keypad", tmp_path / "sweep")[1:]
        settings = [text for text in settings if not text.startswith("tracking.run_name")]
        ended = run(prefork, tmp_path, ["launch", *settings, *sweep], env=env, timeout=200)
        assert ended.code == 0, ended
        assert found_in(tmp_path, ended) == []
        assert sum(path.name.endswith("_submitted.pkl") for path in tmp_path.rglob("*")) == 1
        assert not [part for part in sent for form in forms(SECRET) if form in part]
        for more in (
            [f"data.shards={private(site)}"],
            ["--dry-run", "--setup", f"export http_proxy=http://me:{SECRET}@proxy"],
            ["--dry-run", "--slurm", f"comment=http://me:{SECRET}@proxy"],
        ):
            ended = run(prefork, tmp_path, ["launch", *settings, *more], env=env)
            assert ended.code == 2, ended
            assert " is given with a password or signature" in ended.err
            assert found_in(tmp_path, ended) == []
