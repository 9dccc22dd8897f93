"""What the tests of `cpsp-dist doctor` share: its arguments, and a line of what it prints."""

from __future__ import annotations

from pathlib import Path

from tests.support.runs import KEYPAD


def config(shards: Path | str, output: Path | str, *more: str) -> list[str]:
    return ["--config", str(KEYPAD), f"data.shards={shards}", f"output={output}", "engine.kind=ddp", *more]


def line_of(lines: list[str], check: str, status: str) -> str:
    found = [line for line in lines if line.split()[:2] == [status, check]]
    assert len(found) == 1, "\n".join(lines)
    return found[0]
