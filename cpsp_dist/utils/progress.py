"""Progress of long work: what is done, how fast, how long it will still take.

On a terminal one live line; elsewhere (a log file, Slurm) a plain line every few seconds. Always on stderr.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TextIO, TypeVar

T = TypeVar("T")

LIVE_SECONDS, PLAIN_SECONDS = 0.2, 5.0


class Progress:
    """Counts `unit`s up to `total` (None: not known). Use as a context manager; `update` after each piece of work."""

    def __init__(self, total: int | None, unit: str, label: str, stream: TextIO | None = None, enabled: bool = True):
        self.total, self.unit, self.label, self.enabled = total, unit, label, enabled
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.done = 0
        self.start = self.shown = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            self._show(time.monotonic(), end="\n")

    def update(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if self.enabled and now - self.shown >= (LIVE_SECONDS if self.live else PLAIN_SECONDS):
            self._show(now, end="" if self.live else "\n")

    def text(self, now: float) -> str:
        """`packing: 1,200 of 4,143 videos, 310 videos/s, 0:09 left`"""
        elapsed = max(now - self.start, 1e-9)
        rate = self.done / elapsed
        of = f" of {self.total:,}" if self.total is not None else ""
        parts = [f"{self.label}: {self.done:,}{of} {self.unit}", f"{rate:,.{0 if rate >= 10 else 1}f} {self.unit}/s"]
        if self.total is not None and 0 < self.done < self.total:
            parts.append(f"{_clock((self.total - self.done) / rate)} left")
        else:
            parts.append(_clock(elapsed))
        return ", ".join(parts)

    def _show(self, now: float, end: str) -> None:
        self.shown = now
        # \x1b[K clears what a longer line left behind.
        self.stream.write(f"\r{self.text(now)}\x1b[K{end}" if self.live else self.text(now) + "\n")
        self.stream.flush()


def progress(
    iterable: Iterable[T],
    total: int | None = None,
    unit: str = "items",
    label: str = "working",
    stream: TextIO | None = None,
    enabled: bool = True,
) -> Iterator[T]:
    """Hand through `iterable`, reporting how far it is; `total` is its length where it has one."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with Progress(total, unit, label, stream, enabled) as shown:
        for item in iterable:
            yield item
            shown.update()


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
