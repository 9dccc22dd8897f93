"""Shards at a URL whose server or network fails: what comes out is as packed, or one clear error."""

from __future__ import annotations

import os
import shutil
import threading

import pytest

from cpsp_dist.data import fetch as fetch_module
from cpsp_dist.data.cache import Cache
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.reader import EvalStream, ReaderOptions
from cpsp_dist.utils.errors import DataError
from tests.support import servers
from tests.support.remote import PIECE, fetch, files, original
from tests.support.tiny_shards import assert_as_written
from tests.support.tiny_shards import real_rows as real


@pytest.mark.parametrize(
    "fault", [servers.busy, servers.cut, servers.too_long_announced], ids=["503", "cut", "Content-Length too long"]
)
def test_a_failing_connection_is_tried_again_where_it_stopped(remote, front, served, fault):
    shard = remote.shards[0]
    front.fault(shard.url, fault, times=3, after=1)
    assert fetch(remote, 0) == original(served, 0)
    firsts = [first for first, _ in front.ranges(shard.url)]
    assert firsts[:5] == [0, PIECE, PIECE, PIECE, PIECE]
    assert firsts.count(0) == 1


def test_a_content_length_that_is_too_short_loses_nothing(remote, front, served):
    """The bytes behind it are not valid HTTP, for the answer itself or for the next request on that connection."""
    front.fault(remote.shards[0].url, servers.too_short_announced, times=3, after=1)
    assert fetch(remote, 0) == original(served, 0)
    assert [first for first, _ in front.ranges(remote.shards[0].url)].count(0) == 1


def test_a_content_length_that_stays_too_long_is_an_error(remote, front):
    front.fault(remote.shards[0].url, servers.too_long_announced)
    with pytest.raises(DataError, match="7 times in a row; check its server"):
        fetch(remote, 0)
    assert len(front.ranges(remote.shards[0].url)) == 7


def test_an_answer_that_is_not_http_is_an_error_after_retries(remote, front):
    front.fault(remote.shards[0].url, servers.garbled)
    with pytest.raises(DataError, match="the answer is not valid HTTP, 7 times in a row; check its server"):
        fetch(remote, 0)


def test_requests_become_smaller_while_they_fail(remote, front, served):
    """So a connection that is cut again and again still makes progress."""
    shard = remote.shards[0]
    front.fault(shard.url, servers.cut, times=3)
    assert fetch(remote, 0) == original(served, 0)
    assert [end - first for first, end in front.ranges(shard.url)][:4] == [PIECE, PIECE // 2, PIECE // 4, PIECE // 8]


def test_a_server_that_stays_busy_is_an_error(remote, front):
    shard = remote.shards[0]
    front.fault(shard.url, servers.busy)
    with pytest.raises(DataError) as caught:
        fetch(remote, 0)
    assert str(caught.value) == (
        f"{front.url}/tiny/{shard.url}: the server answers 503 Service Unavailable, 7 times in a row; check its"
        " server, then start again"
    )
    assert len(front.ranges(shard.url)) == 7


@pytest.mark.parametrize("sent", [0, 5000], ids=["nothing", "a part"])
def test_a_server_that_stops_answering_is_an_error(remote, front, monkeypatch, sent):
    monkeypatch.setattr(fetch_module, "PIECE_SECONDS", 0.2)
    monkeypatch.setattr(fetch_module, "ATTEMPTS", 2)
    gate = threading.Event()
    front.fault(remote.shards[0].url, servers.held(threading.Event(), gate, sent))
    with pytest.raises(DataError, match="no answer within 0 s, 2 times in a row"):
        fetch(remote, 0)
    gate.set()


def test_a_server_that_does_not_run_is_an_error(front, tmp_path):
    from tests.support.environment import free_port

    with pytest.raises(DataError, match="7 times in a row"):
        Manifest.load(f"http://127.0.0.1:{free_port()}/x", Cache(tmp_path))


def test_a_missing_file_is_an_error_at_once(remote, front, tmp_path):
    with pytest.raises(DataError, match=r"/nothing/index\.json: no such file; check the URL"):
        Manifest.load(f"{front.url}/nothing", Cache(tmp_path))
    assert len(front.ranges("/nothing/index.json")) == 1


@pytest.mark.parametrize("kind", ["shorter", "empty", "damaged"])
def test_wrong_content_is_fetched_once_more_and_then_an_error(remote, front, served, kind):
    shard = remote.shards[0]
    to = {"shorter": PIECE + 5000, "empty": 0, "damaged": 0}[kind]
    front.fault(shard.url, servers.damaged if kind == "damaged" else servers.shortened(to))
    with pytest.raises(DataError) as caught:
        fetch(remote, 0)
    found = "its sha256 differs" if kind == "damaged" else f"it ends after {to:,} bytes, not {shard.filesize:,}"
    assert str(caught.value) == (
        f"{front.url}/tiny/{shard.url}: not the file that the index describes ({found}), twice; copy the shards there"
        " again, index.json last"
    )
    assert [first for first, _ in front.ranges(shard.url)].count(0) == 2
    assert shard.sha256 not in files(remote.folder)
    front.faults.clear()  # fixed, it is fetched
    assert fetch(remote, 0) == original(served, 0)


def test_one_wrong_answer_costs_one_fetch_from_the_start(remote, front, served):
    front.fault(remote.shards[0].url, servers.damaged, times=1, after=1)
    assert fetch(remote, 0) == original(served, 0)
    assert [first for first, _ in front.ranges(remote.shards[0].url)].count(0) == 2


def test_a_longer_file_is_not_delivered_as_the_shard(served, front, tmp_path):
    """Bytes behind the shard's end are not even asked for; the shard itself is as packed."""
    folder = front.folder / "longer"
    shutil.copytree(served.folder, folder, dirs_exist_ok=True)
    manifest = Manifest.load(f"{front.url}/longer", Cache(tmp_path / "cache"))
    with open(folder / manifest.shards[0].url, "ab") as file:
        file.write(b"more")
    assert fetch(manifest, 0) == original(served, 0)


def test_a_server_without_ranges_serves(remote, front, served):
    front.fault(remote.shards[0].url, servers.without_ranges, after=1)  # as when a fetch resumes
    assert fetch(remote, 0) == original(served, 0)
    assert [first for first, _ in front.ranges(remote.shards[0].url)].count(0) == 1


def test_a_shard_that_cannot_be_fetched_is_an_error_at_its_batch_or_skipped(remote, front):
    front.fault(remote.shards[2].url, servers.damaged)
    with EvalStream(remote, "train", batch=9) as stream:
        batches = iter(stream)
        assert real(next(batches)) + real(next(batches)) == list(range(18))
        with pytest.raises(DataError, match=f"{remote.shards[2].url}: not the file that the index describes"):
            next(batches)
    asked = len(front.ranges(remote.shards[2].url))
    with EvalStream(remote, "train", batch=9, options=ReaderOptions(on_error="skip")) as stream:
        assert [row for batch in stream for row in real(batch)] == [r for r in range(72) if r not in range(18, 27)]
        assert stream.skipped == 9
    assert len(front.ranges(remote.shards[2].url)) == 2 * asked, "once for all of its samples"


def test_a_damaged_file_in_the_cache_is_reported_with_the_remedy(remote, served):
    fetch(remote, 0)
    path = remote.path(remote.shards[0])
    content = bytearray(path.read_bytes())
    content[int(remote.samples[4]["visual"])] ^= 1
    path.write_bytes(content)
    with EvalStream(remote, "train", batch=9) as stream, pytest.raises(DataError) as caught:
        next(iter(stream))
    assert str(caught.value).startswith(f"{path}: sample ")
    assert f"delete this file of the cache, and it is fetched again from {remote.place}" in str(caught.value)
    path.unlink()
    with EvalStream(remote, "train", batch=9) as stream:
        assert_as_written(next(iter(stream)), served)


def test_a_file_cut_short_in_the_cache_is_fetched_again(remote, served):
    fetch(remote, 0)
    os.truncate(remote.path(remote.shards[0]), 1000)
    assert fetch(remote, 0) == original(served, 0)
