"""What a command prints for people: results on stdout, tables, progress. Drawn by rich on a terminal, plain elsewhere.

This is the one way to the terminal beside log records (`logs.py`): names of videos, categories and files come from
elsewhere, so control characters are spelled out and no markup in them is interpreted.
"""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from cpsp_dist.utils import streams
from cpsp_dist.utils.logs import printable
from cpsp_dist.utils.redact import without_secrets

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

T = TypeVar("T")
logger = logging.getLogger(__name__)

#: Seconds between two lines of progress where there is no terminal.
PLAIN_SECONDS = 5.0
_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?( ± [\d.]+)?%?|-|nan|unknown|not run")


def is_terminal(stream: TextIO) -> bool:
    """Whether lines can be redrawn there: a terminal, and no dumb one."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def echo(*lines: str, end: str = "\n") -> None:
    """A command's result, without secrets, on stdout at once. Raises as `streams.write`."""
    streams.write(printable(without_secrets("\n".join(lines))) + end)


def table(rows: Sequence[Mapping[str, Any]], fits: bool | None = None) -> str:
    """Rows of equal keys as aligned text: columns of numbers to the right, cells without line breaks.

    On a terminal it fits the width: long cells take several lines. Elsewhere each row is one line, however long.
    fits: which of the two, where it is not to depend on stdout.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    fits = is_terminal(sys.stdout) if fits is None else fits
    drawn = Table(
        box=box.SIMPLE_HEAD if fits else None, show_edge=False, pad_edge=False, padding=(0, 2 if not fits else 1, 0, 0)
    )
    names = [*rows[0]]
    cells = [[_cell(row[name]) for name in names] for row in rows]
    for column, name in enumerate(names):
        right = all(_NUMBER.fullmatch(row[column]) for row in cells)
        drawn.add_column(Text(_cell(name)), justify="right" if right else "left", overflow="fold")
    if not fits:
        widths = [max(Text(text).cell_len for text in texts) for texts in zip(map(_cell, names), *cells, strict=True)]
        drawn.add_row(*("-" * width if name else "" for name, width in zip(names, widths, strict=True)))
    for row in cells:
        drawn.add_row(*map(Text, row))
    width = shutil.get_terminal_size().columns if fits else 1_000_000
    text = io.StringIO()
    Console(file=text, width=width, color_system=None, legacy_windows=False).print(drawn)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip("\n").split("\n"))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return printable(text.replace("\n", "\\n").replace("\t", "\\t"))


class Progress:
    """Counts `unit`s up to `total` (None: not known): a bar on a terminal (stderr), else a log line every few seconds.

    Use as a context manager; `update` after each piece of work. summary: log a last line of short work too.
    """

    def __init__(self, total: int | None, unit: str, label: str, *, summary: bool = True, enabled: bool = True):
        self.total, self.unit, self.label, self.done = total, unit, label, 0
        self.start = self.shown = time.monotonic()
        self.enabled, self.summary = enabled, summary
        self._bar = _bar() if enabled and is_terminal(sys.stderr) else None

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, text=self.text())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self.enabled and (self.summary or time.monotonic() - self.start >= PLAIN_SECONDS):
            self._log()

    def update(self, count: int = 1) -> None:
        self.done += count
        if self._bar is not None or time.monotonic() - self.shown >= PLAIN_SECONDS:
            self._show()

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Hand through `items`, each counted once it has been worked on."""
        for item in items:
            yield item
            self.update()

    def text(self) -> str:
        """`1,200 of 4,143 videos, 310 videos/s, 0:09 left`"""
        elapsed = max(time.monotonic() - self.start, 1e-9)
        rate = self.done / elapsed
        of = f" of {self.total:,}" if self.total is not None else ""
        parts = [f"{self.done:,}{of} {self.unit}", f"{rate:,.{0 if rate >= 10 else 1}f} {self.unit}/s"]
        if self.total is not None and 0 < self.done < self.total:
            parts.append(f"{_clock((self.total - self.done) / rate)} left")
        else:
            parts.append(_clock(elapsed))
        return ", ".join(parts)

    def _show(self) -> None:
        self.shown = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, text=self.text())
        elif self.enabled:
            self._log()

    def _log(self) -> None:
        logger.info("%s: %s", self.label, self.text())


def _bar() -> Bar:
    """rich's: it honours NO_COLOR and the terminal's width. Its texts are printed as they are, without markup."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    return Bar(*columns, console=Console(stderr=True), refresh_per_second=5, transient=True)


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
