"""What reading one input may take at most: 20 s, and a gigabyte."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS, KILOBYTES = 20.0, 1_000_000


def _waited() -> float:
    """Seconds in which this thread could have computed and had no core, for others had them."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):  # of a kernel that does not count them
        return 0.0


@contextmanager
def within_limits(what: object) -> Iterator[None]:
    """Fails where the block takes longer, or raises the most that this process ever had in memory by more; also where
    it ends by an exception."""
    began, before = time.monotonic() - _waited(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    finally:
        took = time.monotonic() - _waited() - began
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert took < SECONDS, f"{what}: {took:.1f} s"
        assert grown < KILOBYTES, f"{what}: {grown:,} kB"
