"""The lines that parts print."""

from __future__ import annotations

import re

from cpsp_dist.utils.console import echo

LINE = re.compile(r"[a-z]+ +(ok|BAD|note) ")


def line_of(part: str, good: bool | None, text: str) -> str:
    return f"{part:8} {'note' if good is None else 'ok  ' if good else 'BAD '} {text}"


def say(part: str, good: bool | None, text: str) -> None:
    """Print a part's line: `good` or BAD, or None for a figure to note."""
    echo(line_of(part, good, text))
