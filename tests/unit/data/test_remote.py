"""Shards at a URL, by two servers: what comes out is always as packed.

The oracle is the folder that is served: the same samples, read from disk.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading

import fsspec
import numpy as np
import pytest

from cpsp_dist.config import Config, flat, load_config
from cpsp_dist.data.cache import Cache
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.reader import EvalStream, ReaderOptions, TrainStream
from cpsp_dist.data.reader import remote as stream_remote
from cpsp_dist.data.reader import ring as stream_ring
from cpsp_dist.training.checkpoint import Checkpoints
from cpsp_dist.training.resume import changes
from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.redact import without_secrets
from tests.support import servers
from tests.support.environment import REPO, environment
from tests.support.remote import PIECE, fetch, files, original
from tests.support.tiny_shards import assert_as_written
from tests.support.tiny_shards import real_rows as real


def test_an_epoch_has_each_sample_once_with_the_arrays_as_written(site, served, quick, tmp_path):
    manifest = Manifest.load(f"{site.url}/tiny/", Cache(tmp_path / "cache"))
    assert manifest.fingerprint == served.manifest.fingerprint
    assert np.array_equal(manifest.samples, served.manifest.samples)
    with TrainStream(manifest, "train", global_batch=8, seed=3) as stream:
        rows = []
        for batch in stream.batches(count=9):
            assert_as_written(batch, served)
            rows += real(batch)
    assert sorted(rows) == list(range(72))
    kept = {shard.sha256 for shard in manifest.shards if shard.split == "train"}
    assert kept < files(tmp_path / "cache")


def test_remote_shards_are_read_interleaved_and_resume_anywhere(remote, served):
    """As the same shards from a folder with order="interleaved"."""
    with TrainStream(
        served.manifest, "train", global_batch=8, seed=3, options=ReaderOptions(order="interleaved")
    ) as stream:
        wanted = [real(batch) for batch in stream.batches(count=30)]
    for step in (0, 7, 20):
        with TrainStream(remote, "train", global_batch=8, seed=3, options=ReaderOptions(threads=3)) as stream:
            assert [real(batch) for batch in stream.batches(8 * step, count=10)] == wanted[step : step + 10]


def test_each_shard_is_fetched_once_by_ranges(remote, front, served):
    for _ in range(2):
        with EvalStream(remote, "train", batch=16) as stream:
            for batch in stream:
                assert_as_written(batch, served)
    for shard in remote.shards[:8]:
        ends = [*range(PIECE, shard.filesize, PIECE), shard.filesize]
        assert front.ranges(shard.url) == list(zip([0, *ends], ends, strict=False))


def test_the_first_batch_comes_while_other_shards_are_still_being_fetched(remote, front, served):
    reached, gate = threading.Event(), threading.Event()
    front.fault(remote.shards[1].url, servers.held(reached, gate), times=1)
    with EvalStream(remote, "train", batch=3) as stream:
        batches = iter(stream)
        assert real(next(batches)) == [0, 1, 2]
        assert reached.wait(20), "the second shard is asked for before its turn"
        assert real(next(batches)) + real(next(batches)) == list(range(3, 9))
        gate.set()
        assert [row for batch in batches for row in real(batch)] == list(range(9, 72))


def test_shards_ahead_are_fetched_before_they_are_needed(remote, front):
    """Without a further batch asked for."""
    last = threading.Event()
    front.fault(remote.shards[7].url, servers.held(last, last), times=1)
    with EvalStream(remote, "train", batch=3) as stream:
        batches = iter(stream)
        next(batches)
        assert last.wait(20)


def test_looking_ahead_ends_at_its_limit(remote, front, monkeypatch):
    monkeypatch.setattr(stream_ring, "AHEAD", 3)
    monkeypatch.setattr(stream_remote, "LOOK_AHEAD", 12)
    with EvalStream(remote, "train", batch=3, options=ReaderOptions(depth=1)) as stream:
        batches = iter(stream)
        next(batches)
        fetching = stream._files._fetching
        for thread in list(fetching._threads):
            thread.join(20)
        numbers = [n for n in range(8) if front.ranges(remote.shards[n].url)]
        # Two batches of 3 in slots, two that the kernel is asked for, and up to 12 samples beyond.
        assert numbers in ([0, 1], [0, 1, 2])
        assert [row for batch in batches for row in real(batch)] == list(range(3, 72))


def test_a_shard_behind_the_reader_is_closed(remote, monkeypatch):
    monkeypatch.setattr(stream_ring, "AHEAD", 4)
    with EvalStream(remote, "train", batch=1, options=ReaderOptions(depth=1)) as stream:
        for batch in stream:
            if int(batch.index) == 70:
                assert not {0, 1, 2, 3} & set(stream._files._open)
                assert 7 in stream._files._open


def test_no_fetcher_outlives_its_stream(remote):
    before = set(threading.enumerate())
    with TrainStream(remote, "train", global_batch=8, seed=0) as stream:
        next(stream.batches())
        next(stream.batches(16))
    left = {thread for thread in set(threading.enumerate()) - before if thread.name in ("fetcher", "reader")}
    assert not left


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_any_url_of_fsspec_serves(served, tmp_path, protocol):
    url = f"file://{served.folder}"
    if protocol == "memory":
        url = "memory://test_remote/shards"
        fsspec.filesystem("memory").put(str(served.folder), "/test_remote/shards", recursive=True)
    manifest = Manifest.load(url, Cache(tmp_path / "cache"))
    with EvalStream(manifest, "val", batch=4) as stream:
        rows = []
        for batch in stream:
            assert_as_written(batch, served)
            rows += real(batch)
    assert rows == list(range(72, 90))


def test_passwords_and_queries_are_left_out_of_messages():
    shown = without_secrets(
        "data.shards=https://me:s3c@ret@host:8/a/b?X-Sig=s3cret&y=1 at s3://bucket/x and 'file:///y'"
    )
    assert shown == "data.shards=https://host:8/a/b at s3://bucket/x and 'file:///y'"


def test_a_password_is_used_and_never_printed(site, served, tmp_path):
    place = f"127.0.0.1:{site.port}/private/tiny"
    manifest = Manifest.load(f"http://me:s3cret@{place}?token=s3cret", Cache(tmp_path / "cache"))
    assert manifest.place == f"http://{place}"
    assert "s3cret" not in repr(manifest)
    assert fetch(manifest, 0) == original(served, 0)
    for url in (f"http://me:wr0ng@{place}", f"http://me:wr0ng@{place}x?token=wr0ng"):
        with pytest.raises(DataError) as caught:
            Manifest.load(url, Cache(tmp_path / "cache"))
        assert str(caught.value).startswith(f"http://{place}")
        assert "401 Unauthorized" in str(caught.value)
        assert "wr0ng" not in str(caught.value)
    config = Config.model_validate({"data": {"shards": f"http://me:s3cret@{place}"}})
    assert config.data.shards == f"http://me:s3cret@{place}"
    assert "s3cret" not in str(flat(config))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("nosuch://x/y", "Protocol not known: nosuch"),
        ("file://x::http://y", "chained URLs"),
        ("pipe:cat index.json", "no such folder"),
    ],
)
def test_urls_that_are_refused(tmp_path, url, expected):
    with pytest.raises(DataError, match=expected):
        Manifest.load(url, Cache(tmp_path))


def test_the_order_follows_from_the_shards_and_is_recorded():
    def order(**data: str) -> str:
        return flat(Config.model_validate({"data": data}))["data.order"]

    assert order(shards="folder") == "full"
    assert order(shards="s3://bucket/x") == "interleaved"
    assert order(shards="s3://bucket/x", order="full") == "full"


def test_verify_info_and_preview_of_a_url(site, keypad_shards, tmp_path):
    shutil.copytree(keypad_shards, site.folder / "keypad", dirs_exist_ok=True)
    url = f"{site.url}/keypad"

    def output_of(*command: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "cpsp_dist", "shards", *command],
            env=environment(CPSP_CACHE=str(tmp_path / "cache")),
            capture_output=True,
            text=True,
            cwd=REPO,
            timeout=120,
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    assert f"{url}: 80 samples of" in output_of("info", url)
    local = output_of("preview", str(keypad_shards), "-n", "3")
    assert output_of("preview", url, "-n", "3") == local
    assert f"{url}: 80 samples in 3 shards, every byte as packed" in output_of("verify", url)
    kept = tmp_path / "cache" / Manifest.load(keypad_shards).shards[0].sha256
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(content)
    assert str(kept) in output_of("verify", url, code=2)


@pytest.mark.long
def test_training_from_a_url(front, keypad_shards, tmp_path):
    """It trains on the samples that the folder has at the same positions in interleaved order; resuming in another
    order is refused; and nothing written holds the password."""
    shutil.copytree(keypad_shards, front.folder / "keypad", dirs_exist_ok=True)
    url = f"http://me:s3cret@127.0.0.1:{front.port}/private/keypad"
    output = tmp_path / "out" / "run"
    settings = ["train.global_batch=8", "train.steps=3", "tracking.every_steps=1", "evaluation.every_epochs=99"]
    settings += [
        "tracking.flush_timeout=120",
        "engine.kind=ddp",
        "data.log_samples=true",
        f"output={output}",
        f"data.cache={tmp_path / 'cache'}",
    ]
    keypad = str(REPO / "configs" / "keypad.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "cpsp_dist.train", "--config", keypad, *settings, f"data.shards={url}"],
        env=environment(),
        capture_output=True,
        text=True,
        cwd=REPO,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "s3cret" not in done.stdout + done.stderr
    manifest = Manifest.load(keypad_shards)
    assert {shard.sha256 for shard in manifest.shards} < files(tmp_path / "cache")
    trained = [json.loads(line)["keys"] for line in (output / "audit" / "rank0.jsonl").read_text().splitlines()]
    with TrainStream(manifest, "train", global_batch=8, seed=1, options=ReaderOptions(order="interleaved")) as stream:
        assert trained == [[manifest.samples[r]["key"].decode() for r in real(b)] for b in stream.batches(count=3)]
    progress = Checkpoints(output).load(3)[1]
    assert changes(progress, load_config(keypad, [*settings, f"data.shards={url}"]), manifest) == []
    moved = load_config(keypad, [*settings, f"data.shards={keypad_shards}"])
    assert changes(progress, moved, manifest) == ["data.order 'interleaved' -> 'full'"]
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"mlflow.db", "progress.json", "metrics.jsonl"} <= {path.name for path in written}
    assert not [path for path in written if b"s3cret" in path.read_bytes()]
