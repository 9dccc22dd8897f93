"""The cache of fetched files: its limit, locks, full disks, several processes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cpsp_dist.data import cache as cache_module
from cpsp_dist.data import fetch as fetch_module
from cpsp_dist.data.cache import Cache
from cpsp_dist.data.manifest import Manifest, Shard
from cpsp_dist.data.reader import EvalStream
from cpsp_dist.data.reader import ring as stream_ring
from cpsp_dist.utils.errors import DataError
from tests.support import servers
from tests.support.remote import PIECE, entry, fetch, files, original, worker
from tests.support.servers import AiohttpServer


def test_the_least_recently_used_files_are_deleted(tmp_path):
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
    with pytest.raises(cache_module.CacheFull):
        cache.open(*entries[2], required=False)
    assert files(cache.folder) == {entries[n][1] for n in (0, 1)}
    assert not caplog.records
    os.close(cache.open(*entries[2]))  # needed now: the limit is exceeded, with a warning
    assert [r.message for r in caplog.records] == [
        f"{cache.folder}: the shards in use take more than data.cache_gb allows"
    ]
    os.close(held.pop())
    os.close(cache.open(*entries[3]))
    assert files(cache.folder) == {entries[n][1] for n in (0, 3)}
    assert os.pread(held[0], 1000, 0) == bytes(1000)
    os.close(held[0])


def test_a_file_being_fetched_counts_with_its_final_size_and_an_abandoned_one_is_deleted(tmp_path):
    cache = Cache(tmp_path / "cache", gigabytes=2000e-9)
    entries = [entry(tmp_path, n) for n in range(3)]
    cache.folder.mkdir()
    part = cache.folder / f"{entries[0][1]}.1000.part"
    with open(part, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.close(cache.open(*entries[1]))
        held = cache.open(*entries[1])
        with pytest.raises(cache_module.CacheFull):
            cache.open(*entries[2], required=False)
    os.close(cache.open(*entries[2], required=False))
    os.close(held)
    assert files(cache.folder) == {entries[1][1], entries[2][1]}


def test_waiting_for_another_process_has_an_end_and_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "STALL_SECONDS", 0.2)
    monkeypatch.setattr(cache_module, "LOCK_SECONDS", 0.2)
    cache = Cache(tmp_path / "cache")
    url, sha256, size = entry(tmp_path, 0)
    cache.folder.mkdir()
    with open(cache.folder / f"{sha256}.{size}.part", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(
            DataError, match=rf"/0: process {os.getpid()} fetches it into .*, and no byte arrived for 0 s"
        ):
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
    with pytest.raises(DataError, match=r"does not lie in this folder|not a plain file name; nothing was fetched"):
        fetch(Manifest.load(f"file://{folder}", Cache(tmp_path / "cache")), 0)


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A folder that takes 64 KiB, as a disk of its own does: to mount one takes root."""
    folder = tmp_path / "small"
    folder.mkdir()
    write = os.pwrite

    def free() -> int:
        return max(0, 65536 - sum(path.stat().st_size for path in folder.iterdir()))

    def pwrite(descriptor, data, offset):
        assert Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent == folder
        if not free():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[: free()], offset)

    def disk_usage(path):
        assert path == folder
        return SimpleNamespace(free=free())

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    return folder


def test_a_full_disk_is_one_clear_line(front, small_disk, served):
    manifest = Manifest.load(f"{front.url}/tiny", Cache(small_disk))
    held = [manifest.remote.open(s.url, s.sha256, s.filesize) for s in manifest.shards[:1]]
    with pytest.raises(DataError) as caught:
        fetch(manifest, 1)
    assert str(caught.value).startswith(f"{small_disk}: the disk is full: no space for 0 MB of {front.url}/tiny/")
    assert "data.cache_gb" in str(caught.value)
    for descriptor in held:
        os.close(descriptor)
    assert fetch(manifest, 1) == original(served, 1), "files not in use are deleted"


def test_a_file_size_limit_is_the_same_line(remote, front, tmp_path):
    """Quotas and limits of the system fail a write as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
    try:
        with pytest.raises(DataError, match="the disk is full: no space for"):
            fetch(remote, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_cache_that_cannot_be_written_is_one_clear_line(front, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=f"{tmp_path}/file/cache: cannot store fetched shards here: Not a directory"):
        Manifest.load(f"{front.url}/tiny", Cache(tmp_path / "file" / "cache"))
    cache = Cache(tmp_path / "cache")

    def without_locks(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(cache_module.fcntl, "flock", without_locks)
    with pytest.raises(DataError, match=r"no file locks on this file system .*; set data.cache to a local disk"):
        Manifest.load(f"{front.url}/tiny", cache)


FETCH = """
from cpsp_dist.data.cache import Cache
import os
url, sha256, size, folder = sys.argv[1:]
os.close(Cache(folder).open(url, sha256, int(size)))
"""


def arguments(front: AiohttpServer, shard: Shard, folder: Path) -> list[str]:
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
    assert asked[(2 * PIECE, min(3 * PIECE, shard.filesize))] == 2, "the request that was in progress"
    assert asked[(0, PIECE)] == asked[(PIECE, 2 * PIECE)] == 1


def test_two_processes_fetch_a_shard_once(front, served, tmp_path):
    """The second one starts while the first one fetches, and waits."""
    shard = served.manifest.shards[0]
    reached, gate = threading.Event(), threading.Event()
    front.fault(shard.url, servers.held(reached, gate), times=1, after=1)
    first = worker(FETCH, *arguments(front, shard, tmp_path))
    assert reached.wait(60)
    report = "_claim = cache.Cache._claim\ndef reported(self, *args):\n    found = _claim(self, *args)\n"
    report += "    print('fetches' if found[1] else 'waits', flush=True)\n    return found\n"
    report += "cache.Cache._claim = reported\n"
    second = worker(report + FETCH, *arguments(front, shard, tmp_path))
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
    """Two passes over both splits from a cache that holds three of eleven shards; run in a process of its own."""
    fetch_module.PIECE, fetch_module.FIRST_WAIT, stream_ring.AHEAD = PIECE, 0.001, 4
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
    assert max(fetched) >= 2, "shards were deleted and fetched again"
    assert not [name for name in files(folder) if name.endswith(".part")]
    # No file is in use any more: the next one fits within the limit.
    cache = Cache(folder, gigabytes=150_000e-9)
    os.close(cache.open(*entry(tmp_path, 1)))
    assert sum((folder / name).stat().st_size for name in files(folder)) <= 150_000
