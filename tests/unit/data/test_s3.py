"""Shards in S3: moto's server, asked by a real client (s3fs over botocore). The oracle is the folder that was uploaded.

Credentials and the endpoint are environment variables alone, as on a cluster.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from cpsp_dist.cli import main
from cpsp_dist.data import fetch as fetch_module
from cpsp_dist.data.cache import Cache
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.reader import EvalStream, TrainStream
from cpsp_dist.utils.errors import DataError
from tests.support.environment import REPO, environment, free_port
from tests.support.remote import PIECE, fetch, files, original
from tests.support.runs import overrides
from tests.support.tiny_shards import Written, assert_as_written
from tests.support.tiny_shards import real_rows as real

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE0KEY0ID00",
    "AWS_SECRET_ACCESS_KEY": "s3cret-of-the-test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment variables of a user of an S3 server with the bucket `bucket`."""
    port = free_port()
    log = tmp_path_factory.mktemp("moto") / "log"
    # `timeout`, so that it ends even if the tests were killed.
    command = ["timeout", "1800", sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with open(log, "wb") as output:
        process = subprocess.Popen(command, env=environment(**CREDENTIALS), stdout=output, stderr=output)
    limit = time.monotonic() + 120
    while True:  # it does not report that it is ready; until then a connection is refused
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < limit, f"moto does not answer: {log.read_text()}"
            time.sleep(0.05)
    yield CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    process.terminate()
    process.wait(timeout=20)


@pytest.fixture
def s3(moto: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    """A client with the credentials of the environment; no other test's client is used again."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in moto.items():
        monkeypatch.setenv(name, value)
    client = fsspec.get_filesystem_class("s3")
    client.clear_instance_cache()
    filesystem = client()
    if not filesystem.exists("bucket"):
        filesystem.mkdir("bucket")
    yield filesystem
    client.clear_instance_cache()


@pytest.fixture
def tiny(s3: fsspec.AbstractFileSystem, served: Written) -> str:
    """The URL of the tiny shards in the bucket."""
    if not s3.exists("bucket/tiny/index.json"):
        s3.put(str(served.folder), "bucket/tiny", recursive=True)
    return "s3://bucket/tiny"


def test_an_epoch_has_each_sample_once_with_the_arrays_as_written(tiny, served, quick, tmp_path):
    manifest = Manifest.load(tiny, Cache(tmp_path / "cache"))
    assert manifest.fingerprint == served.manifest.fingerprint
    with TrainStream(manifest, "train", global_batch=8, seed=3) as stream:
        rows = []
        for batch in stream.batches(count=9):
            assert_as_written(batch, served)
            rows += real(batch)
    assert sorted(rows) == list(range(72))
    with EvalStream(manifest, "val", batch=4) as stream:
        assert [row for batch in stream for row in real(batch)] == list(range(72, 90))
    content = b"".join(path.read_bytes() for path in (tmp_path / "cache").iterdir())
    assert not any(CREDENTIALS[name].encode() in content for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))


def test_packed_and_uploaded_shards_are_verified_and_train_as_the_folder(
    s3, moto, prefork, keypad_shards, tmp_path, monkeypatch, capsys
):
    """The same losses as from the folder, and no file that training writes holds the credentials."""
    s3.put(str(keypad_shards), "bucket/keypad", recursive=True)
    url = "s3://bucket/keypad"
    monkeypatch.setenv("CPSP_CACHE", str(tmp_path / "cache"))
    assert main(["shards", "info", url]) == main(["shards", "verify", url]) == 0
    shown = capsys.readouterr().out
    assert f"{url}: 80 samples of" in shown
    assert f"{url}: 80 samples in 3 shards, every byte as packed" in shown
    assert {shard.sha256 for shard in Manifest.load(keypad_shards).shards} < files(tmp_path / "cache")

    def train(shards: str, name: str) -> list[str]:
        settings = ["train.steps=3", "engine.kind=ddp", "tracking.every_steps=1", "data.order=interleaved"]
        settings += [f"data.cache={tmp_path}/training", "tracking.flush_timeout=100"]
        arguments = ["--config", str(REPO / "configs" / "keypad.yaml")]
        arguments += overrides(Path("x"), tmp_path / "out" / name, *settings, f"data.shards={shards}")
        output = prefork.start(arguments, 1, **moto).finish(timeout=200)
        assert not any(CREDENTIALS[key] in output for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
        return [line.split("loss")[1].split()[0] for line in output.splitlines() if line.startswith("step ")]

    losses = train(url, "s3")
    assert len(losses) == 3
    assert losses == train(str(keypad_shards), "folder")
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert not [content for content in written if CREDENTIALS[key].encode() in content]


def test_a_fetch_resumes_where_it_stopped(tiny, served, quick, tmp_path):
    manifest = Manifest.load(tiny, Cache(tmp_path / "cache"))
    shard = manifest.shards[0]
    part = tmp_path / "cache" / f"{shard.sha256}.{shard.filesize}.part"
    part.write_bytes(original(served, 0)[: PIECE + 5])
    assert fetch(manifest, 0) == original(served, 0)
    assert manifest.remote.cache.bytes_received >= shard.filesize - PIECE - 5
    assert np.array_equal(
        np.frombuffer(manifest.remote.read_part(shard.url, 100, 300, shard.filesize), np.uint8),
        np.frombuffer(original(served, 0)[100:300], np.uint8),
    )


def test_a_shorter_object_is_an_error(s3, tiny, served, quick, tmp_path):
    s3.put(str(served.folder), "bucket/shorter", recursive=True)
    shard = served.manifest.shards[0]
    s3.pipe_file(f"bucket/shorter/{shard.url}", original(served, 0)[: PIECE + 5000])
    manifest = Manifest.load("s3://bucket/shorter", Cache(tmp_path / "cache"))
    with pytest.raises(DataError) as caught:
        fetch(manifest, 0)
    assert str(caught.value) == (
        f"s3://bucket/shorter/{shard.url}: not the file that the index describes (it ends after {PIECE + 5000:,} bytes,"
        f" not {shard.filesize:,}), twice; copy the shards there again, index.json last"
    )


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket/nothing", "s3://bucket/nothing/index.json: no such file; check the URL"),
        ("s3://no-such-bucket/tiny", "s3://no-such-bucket/tiny/index.json: no such file; check the URL"),
        ("s3://Wrong!/x", "s3://Wrong!/x/index.json: ParamValidationError"),
        ("s3://me:s3cret@bucket/tiny", "s3://bucket/tiny/index.json: credentials in an s3:// URL are not supported"),
    ],
)
def test_a_wrong_url_is_one_clear_line_at_once(s3, tmp_path, monkeypatch, capsys, url, expected):
    monkeypatch.setenv("CPSP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch_module, "FIRST_WAIT", 1e6)  # another attempt would never end
    assert main(["shards", "info", url]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {expected}")
    assert error.count("\n") == 1
    assert "s3cret" not in error


def test_without_credentials_it_is_one_clear_line_at_once(s3, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_module, "FIRST_WAIT", 1e6)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.aws
    type(s3).clear_instance_cache()
    with pytest.raises(DataError, match="no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        Manifest.load(tiny, Cache(tmp_path / "cache"))


def test_a_server_that_does_not_run_is_an_error_after_retries(s3, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_module, "ATTEMPTS", 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    type(s3).clear_instance_cache()
    with pytest.raises(DataError, match="EndpointConnectionError, 2 times in a row; check its server"):
        Manifest.load("s3://bucket/tiny", Cache(tmp_path / "cache"))


def test_without_s3fs_the_extra_is_named(tmp_path):
    """As on a machine where `pip install cpsp-dist` alone was given."""
    (tmp_path / "s3fs.py").write_text("raise ModuleNotFoundError(\"No module named 's3fs'\", name='s3fs')\n")
    done = subprocess.run(
        [sys.executable, "-m", "cpsp_dist", "shards", "info", "s3://bucket/tiny"],
        env=environment(PYTHONPATH=f"{tmp_path}:{REPO}"),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: s3://bucket/tiny/index.json: s3:// needs the package s3fs: pip install 'cpsp-dist[s3]'\n"
    )
