"""What reading one input may take at most: 20 s, and a gigabyte."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS, KILOBYTES = 20.0, 1_000_000


@contextmanager
def within_limits(what: object) -> Iterator[None]:
    """Fails where the block takes longer, or raises the most that this process ever had in memory by more."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    took, grown = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert took < SECONDS, f"{what}: {took:.1f} s"
    assert grown < KILOBYTES, f"{what}: {grown:,} kB"
