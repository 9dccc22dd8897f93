"""Shards at a URL: a real nginx, with everything in between that may go wrong; what comes out is always as packed.

The oracle is the folder that nginx serves: the same samples, read from disk.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from cpsp_dist.config import Config, flat, load_config
from cpsp_dist.data import cache as cache_module
from cpsp_dist.data.cache import Cache, without_secrets
from cpsp_dist.data.manifest import Manifest, Shard
from cpsp_dist.data.reader import EvalStream, TrainStream
from cpsp_dist.data.reader import remote as stream_remote
from cpsp_dist.data.reader import ring as stream_ring
from cpsp_dist.errors import DataError
from cpsp_dist.training.checkpoint import Checkpoints
from cpsp_dist.training.resume import changes
from tests.support import servers
from tests.support.environment import REPO, environment
from tests.support.servers import Front, Nginx
from tests.support.skips import skip
from tests.support.tiny_shards import Written, assert_as_written, write_shards
from tests.support.tiny_shards import real_rows as real

PIECE = 16384
SIZES = [9] * 8


@pytest.fixture(scope="session")
def nginx(tmp_path_factory) -> Iterator[Nginx]:
    binary = shutil.which("nginx")
    if binary is None:
        skip("nginx", "it is not on the PATH (it may lie in /usr/sbin)")
    folder = tmp_path_factory.mktemp("served")
    server = Nginx(binary, folder, folder.parent / "nginx")
    yield server
    server.stop()


@pytest.fixture(scope="session")
def served(nginx, tmp_path_factory) -> Written:
    """Eight shards of nine samples (about 45 kB each) for training and three for val, which nginx serves."""
    written = write_shards(tmp_path_factory.mktemp("tiny") / "shards", {"train": SIZES, "val": [5, 6, 7]})
    shutil.copytree(written.folder, served_folder(nginx) / "tiny")
    return written


def served_folder(nginx: Nginx) -> Path:
    return Path(next(line for line in _config(nginx) if line.startswith("root ")).split()[1].rstrip(";"))


def _config(nginx: Nginx) -> list[str]:
    return (Path(nginx.process.args[-1])).read_text().splitlines()


@pytest.fixture
def front(nginx, served, monkeypatch) -> Iterator[Front]:
    """Quick retries and small pieces, so that a shard takes a few requests."""
    monkeypatch.setattr(cache_module, "PIECE", PIECE)
    monkeypatch.setattr(cache_module, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(cache_module, "LONGEST_WAIT", 0.01)
    server = Front(nginx)
    yield server
    server.close()


@pytest.fixture
def remote(front, tmp_path) -> Manifest:
    return Manifest.load(f"{front.url}/tiny", Cache(tmp_path / "cache"))


def fetch(manifest: Manifest, number: int) -> bytes:
    with manifest.at_hand(manifest.shards[number]) as path:
        return path.read_bytes()


def original(served: Written, number: int) -> bytes:
    return (served.folder / served.manifest.shards[number].url).read_bytes()


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def test_an_epoch_from_nginx_has_each_sample_once_with_the_arrays_as_written(nginx, served, tmp_path):
    manifest = Manifest.load(f"{nginx.url}/tiny/", Cache(tmp_path / "cache"))
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


def test_remote_shards_are_read_in_lanes_and_resume_anywhere(remote, served):
    """As the same shards from a folder with order="lanes"."""
    with TrainStream(served.manifest, "train", global_batch=8, seed=3, order="lanes") as stream:
        wanted = [real(batch) for batch in stream.batches(count=30)]
    for step in (0, 7, 20):
        with TrainStream(remote, "train", global_batch=8, seed=3, threads=3) as stream:
            assert [real(batch) for batch in stream.batches(8 * step, count=10)] == wanted[step : step + 10]


def test_each_shard_is_fetched_once_by_ranges_and_then_no_more(remote, front, served):
    for _ in range(2):
        with EvalStream(remote, "train", batch=16) as stream:
            for batch in stream:
                assert_as_written(batch, served)
    for shard in remote.shards[:8]:
        ends = [*range(PIECE, shard.filesize, PIECE), shard.filesize]
        assert front.ranges(shard.url) == list(zip([0, *ends], ends, strict=False))


def test_the_first_batch_comes_while_other_shards_are_still_on_their_way(remote, front, served):
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
    with EvalStream(remote, "train", batch=3, depth=1) as stream:
        batches = iter(stream)
        next(batches)
        fetching = stream._files._fetching
        for thread in list(fetching._threads):
            thread.join(20)
        numbers = [n for n in range(8) if front.ranges(remote.shards[n].url)]
        # Two batches of 3 in slots, two that the kernel is asked for, and up to 12 samples beyond.
        assert numbers in ([0, 1], [0, 1, 2])
        assert [row for batch in batches for row in real(batch)] == list(range(3, 72))


def test_a_shard_behind_the_reader_is_let_go_of(remote, monkeypatch):
    monkeypatch.setattr(stream_ring, "AHEAD", 4)
    with EvalStream(remote, "train", batch=1, depth=1) as stream:
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


# ---------------------------------------------------------------------------------------------------------------------
# What a network does


@pytest.mark.parametrize("fault", [servers.busy, servers.cut], ids=["503", "cut"])
def test_a_failing_connection_is_tried_again_where_it_stopped(remote, front, served, fault):
    shard = remote.shards[0]
    front.fault(shard.url, fault, times=3, after=1)
    assert fetch(remote, 0) == original(served, 0)
    firsts = [first for first, _ in front.ranges(shard.url)]
    assert firsts[:5] == [0, PIECE, PIECE, PIECE, PIECE]
    assert firsts.count(0) == 1


def test_requests_become_smaller_while_they_fail(remote, front, served):
    """So a connection that is cut again and again still gets something through."""
    shard = remote.shards[0]
    front.fault(shard.url, servers.cut, times=3)
    assert fetch(remote, 0) == original(served, 0)
    assert [end - first for first, end in front.ranges(shard.url)][:4] == [PIECE, PIECE // 2, PIECE // 4, PIECE // 8]


def test_a_server_that_stays_busy_is_given_up(remote, front):
    shard = remote.shards[0]
    front.fault(shard.url, servers.busy)
    with pytest.raises(DataError) as caught:
        fetch(remote, 0)
    assert str(caught.value) == (
        f"{front.url}/tiny/{shard.url}: the server answers 503 Service Unavailable, 7 times in a row; see to its"
        " server, and start again"
    )
    assert len(front.ranges(shard.url)) == 7


def test_a_server_that_does_not_answer_is_given_up(remote, front, monkeypatch):
    monkeypatch.setattr(cache_module, "PIECE_SECONDS", 0.2)
    monkeypatch.setattr(cache_module, "ATTEMPTS", 2)
    gate = threading.Event()
    front.fault(remote.shards[0].url, servers.held(threading.Event(), gate))
    with pytest.raises(DataError, match="no answer within 0 s, 2 times in a row"):
        fetch(remote, 0)
    gate.set()


def test_a_server_that_is_not_there_is_given_up(front, tmp_path):
    from tests.support.environment import free_port

    with pytest.raises(DataError, match="7 times in a row"):
        Manifest.load(f"http://127.0.0.1:{free_port()}/x", Cache(tmp_path))


def test_what_is_not_there_is_told_at_once(remote, front, tmp_path):
    with pytest.raises(DataError, match=r"/nothing/index\.json: nothing is there; is the URL right"):
        Manifest.load(f"{front.url}/nothing", Cache(tmp_path))
    assert len(front.ranges("/nothing/index.json")) == 1


@pytest.mark.parametrize("kind", ["shorter", "empty", "damaged"])
def test_wrong_content_is_fetched_afresh_once_and_then_an_error(remote, front, served, kind):
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
    front.faults.clear()  # mended, it is fetched
    assert fetch(remote, 0) == original(served, 0)


def test_one_wrong_answer_costs_one_fresh_start(remote, front, served):
    front.fault(remote.shards[0].url, servers.damaged, times=1, after=1)
    assert fetch(remote, 0) == original(served, 0)
    assert [first for first, _ in front.ranges(remote.shards[0].url)].count(0) == 2


def test_a_longer_file_is_not_delivered_as_the_shard(nginx, served, front, tmp_path):
    """What lies behind the shard's end is not even asked for; the shard itself is as packed."""
    folder = served_folder(nginx) / "longer"
    shutil.copytree(served.folder, folder, dirs_exist_ok=True)
    manifest = Manifest.load(f"{front.url}/longer", Cache(tmp_path / "cache"))
    with open(folder / manifest.shards[0].url, "ab") as file:
        file.write(b"more")
    assert fetch(manifest, 0) == original(served, 0)


def test_a_server_without_ranges_serves(remote, front, served):
    front.fault(remote.shards[0].url, servers.whole, after=1)  # as where a fetch is gone on with
    assert fetch(remote, 0) == original(served, 0)
    assert [first for first, _ in front.ranges(remote.shards[0].url)].count(0) == 1


def test_a_shard_that_cannot_be_had_is_an_error_at_its_batch_or_skipped(remote, front):
    front.fault(remote.shards[2].url, servers.damaged)
    with EvalStream(remote, "train", batch=9) as stream:
        batches = iter(stream)
        assert real(next(batches)) + real(next(batches)) == list(range(18))
        with pytest.raises(DataError, match=f"{remote.shards[2].url}: not the file that the index describes"):
            next(batches)
    asked = len(front.ranges(remote.shards[2].url))
    with EvalStream(remote, "train", batch=9, on_error="skip") as stream:
        assert [row for batch in stream for row in real(batch)] == [r for r in range(72) if r not in range(18, 27)]
        assert stream.skipped == 9
    assert len(front.ranges(remote.shards[2].url)) == 2 * asked, "once for all of its samples"


def test_a_damaged_file_in_the_cache_is_told_with_what_to_do(remote, served):
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


# ---------------------------------------------------------------------------------------------------------------------
# The cache


def entry(folder: Path, number: int, size: int = 1000) -> tuple[str, str, int]:
    """(url, sha256, size) of a file there."""
    import hashlib

    content = bytes([number]) * size
    (folder / str(number)).write_bytes(content)
    return f"file://{folder}/{number}", hashlib.sha256(content).hexdigest(), size


def test_the_least_recently_used_files_make_room(tmp_path):
    cache = Cache(tmp_path / "cache", gigabytes=3000e-9)
    entries = [entry(tmp_path, n) for n in range(5)]
    for n in (0, 1, 2, 0, 3):
        os.close(cache.open(*entries[n]))
    assert files(cache.folder) == {entries[n][1] for n in (0, 2, 3)}
    os.close(cache.open(*entries[4]))
    assert files(cache.folder) == {entries[n][1] for n in (0, 3, 4)}


def test_a_file_in_use_stays(tmp_path, caplog):
    cache = Cache(tmp_path / "cache", gigabytes=2000e-9)
    entries = [entry(tmp_path, n) for n in range(4)]
    held = [cache.open(*entries[n]) for n in (0, 1)]
    with pytest.raises(cache_module.NoRoom):
        cache.open(*entries[2], required=False)
    assert files(cache.folder) == {entries[n][1] for n in (0, 1)}
    assert not caplog.records
    os.close(cache.open(*entries[2]))  # needed now: the limit gives way, and says so
    assert [r.message for r in caplog.records] == [
        f"{cache.folder}: the shards in use take more than data.cache_gb allows"
    ]
    os.close(held.pop())
    os.close(cache.open(*entries[3]))
    assert files(cache.folder) == {entries[n][1] for n in (0, 3)}
    assert os.pread(held[0], 1000, 0) == bytes(1000)
    os.close(held[0])


def test_what_is_being_fetched_counts_as_whole_and_what_nobody_goes_on_with_makes_room(tmp_path):
    cache = Cache(tmp_path / "cache", gigabytes=2000e-9)
    entries = [entry(tmp_path, n) for n in range(3)]
    cache.folder.mkdir()
    part = cache.folder / f"{entries[0][1]}.1000.part"
    with open(part, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.close(cache.open(*entries[1]))
        held = cache.open(*entries[1])
        with pytest.raises(cache_module.NoRoom):
            cache.open(*entries[2], required=False)
    os.close(cache.open(*entries[2], required=False))
    os.close(held)
    assert files(cache.folder) == {entries[1][1], entries[2][1]}


def test_waiting_for_another_process_has_an_end_and_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "PATIENCE", 0.2)
    monkeypatch.setattr(cache_module, "LOCK_PATIENCE", 0.2)
    cache = Cache(tmp_path / "cache")
    url, sha256, size = entry(tmp_path, 0)
    cache.folder.mkdir()
    with open(cache.folder / f"{sha256}.{size}.part", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=rf"/0: process {os.getpid()} fetches it into .*, and no byte came for 0 s"):
            cache.open(url, sha256, size)
    with open(cache.folder / ".lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=rf"process {os.getpid()} has held the lock of this cache for 0 s"):
            cache.open(url, sha256, size)


def test_a_name_that_is_no_hash_opens_nothing(tmp_path):
    with pytest.raises(DataError, match="no sha256"):
        Cache(tmp_path / "cache").open(f"file://{tmp_path}/x", "../../x", 3)


@pytest.mark.parametrize(
    "name", ["../secret.tar", "/etc/passwd", "a/../../b", "pipe:cat x", "http://other/x", "a b", ""]
)
def test_an_index_cannot_name_files_elsewhere(served, tmp_path, name):
    folder = shutil.copytree(served.folder, tmp_path / "shards")
    index = json.loads((folder / "index.json").read_text())
    index["shardlist"][0]["url"] = name
    (folder / "index.json").write_text(json.dumps(index))
    manifest = Manifest.load(f"file://{folder}", Cache(tmp_path / "cache"))
    with pytest.raises(DataError, match="no plain file name; nothing was fetched"):
        fetch(manifest, 0)


# ---------------------------------------------------------------------------------------------------------------------
# A full disk


def test_a_full_disk_is_one_clear_line(front, tmp_path, served):
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, timeout=20).returncode != 0:
        pytest.skip("needs to mount a small tmpfs: run as root")
    try:
        manifest = Manifest.load(f"{front.url}/tiny", Cache(folder))
        held = [manifest.remote.open(s.url, s.sha256, s.filesize) for s in manifest.shards[:1]]
        with pytest.raises(DataError) as caught:
            fetch(manifest, 1)
        assert str(caught.value).startswith(f"{folder}: the disk is full: no room for 0 MB of {front.url}/tiny/")
        assert "data.cache_gb" in str(caught.value)
        for descriptor in held:
            os.close(descriptor)
        assert fetch(manifest, 1) == original(served, 1), "what nobody uses makes room"
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=20)


def test_a_file_size_limit_is_the_same_line(remote, front, tmp_path):
    """Quotas and limits of the system fail a write as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
    try:
        with pytest.raises(DataError, match="the disk is full: no room for"):
            fetch(remote, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_cache_that_cannot_be_written_is_told(front, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=f"{tmp_path}/file/cache: cannot keep fetched shards here: Not a directory"):
        Manifest.load(f"{front.url}/tiny", Cache(tmp_path / "file" / "cache"))
    cache = Cache(tmp_path / "cache")

    def without_locks(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(cache_module.fcntl, "flock", without_locks)
    with pytest.raises(DataError, match=r"no file locks on this file system .*; set data.cache to a local disk"):
        Manifest.load(f"{front.url}/tiny", cache)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def worker(code: str, *arguments: str) -> subprocess.Popen:
    """Python code in a process of its own, with quick retries and small pieces."""
    head = f"import sys; from cpsp_dist.data import cache; cache.PIECE, cache.FIRST_WAIT = {PIECE}, 0.001\n"
    command = [sys.executable, "-c", head + code, *arguments]
    return subprocess.Popen(command, env=environment(), cwd=REPO, stdout=subprocess.PIPE, text=True)


FETCH = """
from cpsp_dist.data.cache import Cache
import os
url, sha256, size, folder = sys.argv[1:]
os.close(Cache(folder).open(url, sha256, int(size)))
"""


def arguments(front: Front, shard: Shard, folder: Path) -> list[str]:
    return [f"{front.url}/tiny/{shard.url}", shard.sha256, str(shard.filesize), str(folder)]


def test_killed_while_fetching_nothing_is_lost_and_nothing_double(front, served, tmp_path):
    shard = served.manifest.shards[0]
    reached, gate = threading.Event(), threading.Event()
    front.fault(shard.url, servers.held(reached, gate), times=1, after=2)
    process = worker(FETCH, *arguments(front, shard, tmp_path))
    try:
        assert reached.wait(60)
    finally:
        process.kill()
        process.communicate(timeout=20)
    gate.set()
    part = tmp_path / f"{shard.sha256}.{shard.filesize}.part"
    assert part.read_bytes() == original(served, 0)[: 2 * PIECE]
    process = worker(FETCH, *arguments(front, shard, tmp_path))
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert files(tmp_path) == {shard.sha256}
    assert (tmp_path / shard.sha256).read_bytes() == original(served, 0)
    asked = Counter(front.ranges(shard.url))
    assert asked[(2 * PIECE, min(3 * PIECE, shard.filesize))] == 2, "the request that was under way"
    assert asked[(0, PIECE)] == asked[(PIECE, 2 * PIECE)] == 1


def test_two_processes_fetch_a_shard_once(front, served, tmp_path):
    """The second one comes while the first is at it, and waits."""
    shard = served.manifest.shards[0]
    reached, gate = threading.Event(), threading.Event()
    front.fault(shard.url, servers.held(reached, gate), times=1, after=1)
    first = worker(FETCH, *arguments(front, shard, tmp_path))
    assert reached.wait(60)
    tell = "_claim = cache.Cache._claim\ndef told(self, *args):\n    found = _claim(self, *args)\n"
    tell += "    print('fetches' if found[1] else 'waits', flush=True)\n    return found\n"
    tell += "cache.Cache._claim = told\n"
    second = worker(tell + FETCH, *arguments(front, shard, tmp_path))
    try:
        assert second.stdout.readline() == "waits\n"
        gate.set()
        for process in (first, second):
            process.communicate(timeout=60)
            assert process.returncode == 0
    finally:
        first.kill()
        second.kill()
    assert max(Counter(front.ranges(shard.url)).values()) == 1


def read_twice(url: str, folder: str, rank: int) -> list:
    """Two passes over both splits from a cache with room for three of eleven shards, by a process for itself."""
    cache_module.PIECE, cache_module.FIRST_WAIT, stream_ring.AHEAD = PIECE, 0.001, 4
    manifest = Manifest.load(url, Cache(folder, gigabytes=150_000e-9))
    found = []
    for split in ("train", "val") * 2 if rank == 0 else ("val", "train") * 2:
        with EvalStream(manifest, split, batch=4) as stream:
            found += [[t.clone() for t in (b.index, b.valid, b.visual, b.audio, b.event)] for b in stream]
    return found


def read_by_rank(url: str, folder: str) -> list:
    return read_twice(url, folder, torch.distributed.get_rank())


def test_two_processes_share_a_cache_that_is_too_small_for_either(front, served, ranks, tmp_path):
    folder = tmp_path / "cache"
    for found in ranks(read_by_rank, 2, f"{front.url}/tiny", str(folder)):
        rows: Counter[int] = Counter()
        for index, valid, visual, audio, event in found:
            for slot, row in enumerate(index.tolist()):
                if valid[slot]:
                    rows[row] += 1
                    assert np.array_equal(visual[slot].numpy(), served.arrays[row]["visual"])
                    assert np.array_equal(audio[slot].numpy(), served.arrays[row]["audio"])
                    assert np.array_equal(event[slot].numpy(), served.arrays[row]["label"] == 1)
        assert rows == dict.fromkeys(range(90), 2)
    fetched = [[first for first, _ in front.ranges(s.url)].count(0) for s in served.manifest.shards]
    assert max(fetched) >= 2, "room was made"
    assert not [name for name in files(folder) if name.endswith(".part")]
    # Nobody holds a file any more: the next one finds room within the limit.
    cache = Cache(folder, gigabytes=150_000e-9)
    os.close(cache.open(*entry(tmp_path, 1)))
    assert sum((folder / name).stat().st_size for name in files(folder)) <= 150_000


# ---------------------------------------------------------------------------------------------------------------------
# Passwords, settings, commands, training


def test_passwords_and_queries_are_left_out_of_messages():
    told = without_secrets(
        "data.shards=https://me:s3c@ret@host:8/a/b?X-Sig=s3cret&y=1 at s3://bucket/x and 'file:///y'"
    )
    assert told == "data.shards=https://host:8/a/b at s3://bucket/x and 'file:///y'"


def test_a_password_serves_and_is_told_to_nobody(nginx, served, tmp_path):
    place = f"127.0.0.1:{nginx.port}/private/tiny"
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
    ("url", "told"),
    [
        ("nosuch://x/y", "Protocol not known: nosuch"),
        ("file://x::http://y", "chained URLs"),
        ("pipe:cat index.json", "no such folder"),
    ],
)
def test_urls_that_cannot_be(tmp_path, url, told):
    with pytest.raises(DataError, match=told):
        Manifest.load(url, Cache(tmp_path))


def test_the_order_is_settled_by_the_shards_and_recorded():
    def order(**data: str) -> str:
        return flat(Config.model_validate({"data": data}))["data.order"]

    assert order(shards="folder") == "full"
    assert order(shards="s3://bucket/x") == "lanes"
    assert order(shards="s3://bucket/x", order="full") == "full"


def test_verify_info_and_preview_of_a_url(nginx, keypad_shards, tmp_path):
    shutil.copytree(keypad_shards, served_folder(nginx) / "keypad", dirs_exist_ok=True)
    url = f"{nginx.url}/keypad"

    def told(*command: str, code: int = 0) -> str:
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

    assert f"{url}: 80 samples of" in told("info", url)
    local = told("preview", str(keypad_shards), "-n", "3")
    assert told("preview", url, "-n", "3") == local
    assert f"{url}: 80 samples in 3 shards, every byte as packed" in told("verify", url)
    kept = tmp_path / "cache" / Manifest.load(keypad_shards).shards[0].sha256
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(content)
    assert str(kept) in told("verify", url, code=2)


def test_training_from_a_url(nginx, keypad_shards, tmp_path):
    """It trains on the samples that the folder has at the same positions in lanes; going on in another order is
    refused; and nothing written holds the password."""
    shutil.copytree(keypad_shards, served_folder(nginx) / "keypad", dirs_exist_ok=True)
    url = f"http://me:s3cret@127.0.0.1:{nginx.port}/private/keypad"
    output = tmp_path / "out" / "run"
    settings = ["train.global_batch=8", "train.steps=3", "tracking.every_steps=1", "evaluation.every_epochs=99"]
    settings += ["engine.kind=ddp", "data.audit=true", f"output={output}", f"data.cache={tmp_path / 'cache'}"]
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
    with TrainStream(manifest, "train", global_batch=8, seed=1, order="lanes") as stream:
        assert trained == [[manifest.samples[r]["key"].decode() for r in real(b)] for b in stream.batches(count=3)]
    progress = Checkpoints(output).load(3)[1]
    assert changes(progress, load_config(keypad, [*settings, f"data.shards={url}"]), manifest) == []
    moved = load_config(keypad, [*settings, f"data.shards={keypad_shards}"])
    assert changes(progress, moved, manifest) == ["data.order 'lanes' -> 'full'"]
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"mlflow.db", "progress.json", "metrics.jsonl"} <= {path.name for path in written}
    assert not [path for path in written if b"s3cret" in path.read_bytes()]
