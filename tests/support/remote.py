"""What the tests of remote shards share: small pieces, files of the cache, fetching processes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from cpsp_dist.data.manifest import Manifest
from tests.support.environment import REPO, environment
from tests.support.tiny_shards import Written

#: Bytes of a request, so that a tiny shard takes a few.
PIECE = 16384


def fetch(manifest: Manifest, number: int) -> bytes:
    """A shard as the cache delivers it."""
    with manifest.local_file(manifest.shards[number]) as path:
        return path.read_bytes()


def original(served: Written, number: int) -> bytes:
    """The same shard as it was written."""
    return (served.folder / served.manifest.shards[number].url).read_bytes()


def files(folder: Path) -> set[str]:
    """Names in a folder of the cache."""
    return {path.name for path in folder.iterdir()} - {".lock"}


def entry(folder: Path, number: int, size: int = 1000) -> tuple[str, str, int]:
    """(url, sha256, size) of a new file there."""
    content = bytes([number]) * size
    (folder / str(number)).write_bytes(content)
    return f"file://{folder}/{number}", hashlib.sha256(content).hexdigest(), size


def worker(code: str, *arguments: str) -> subprocess.Popen:
    """Python code in a process of its own, with quick retries and small pieces."""
    head = f"import sys; from cpsp_dist.data import cache, fetch; fetch.PIECE, fetch.FIRST_WAIT = {PIECE}, 0.001\n"
    command = [sys.executable, "-c", head + code, *arguments]
    return subprocess.Popen(command, env=environment(), cwd=REPO, stdout=subprocess.PIPE, text=True)
