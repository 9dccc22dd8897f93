"""`cpsp-dist gpu-check` without a GPU: one line and exit code 2; and what it makes of parts that fail."""

from __future__ import annotations

import sys

import pytest

from cpsp_dist.bench.gpu_check import check
from cpsp_dist.cli import gpu_check as command
from cpsp_dist.cli import main


def test_without_a_gpu_it_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu-check"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "torch sees no GPU here" in lines[0]


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu-check", "speeed"]) == 2
    assert "no part 'speeed'; there are: facts" in capsys.readouterr().err


def test_parts_fit_into_ten_minutes() -> None:
    assert [*check.PARTS] == command.PARTS
    alone = sum(part.limit for part in check.PARTS.values() if part.alone)
    assert alone + max(part.limit for part in check.PARTS.values() if not part.alone) <= 600


def test_a_parts_lines_are_printed_before_the_next_part_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that is cut short has said what it found."""
    done: list[str] = []

    def run_part(part: str, *_: object) -> list[str]:
        done.append(f"run {part}")
        return [f"{part} ok   x"]

    monkeypatch.setattr(check, "require_gpu", lambda: None)
    monkeypatch.setattr(check, "run_part", run_part)
    monkeypatch.setattr(check, "echo", done.append)
    assert check.gpu_check(["facts", "syncs", "lstm"]) == 0
    found = [line for part in ("facts", "syncs", "lstm") for line in (f"run {part}", f"{part} ok   x")]
    assert done == [*found, "nothing is BAD"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('speed    ok   fast'); print('noise')", ["speed    ok   fast"]),
        (
            "print('speed    note x'); raise SystemExit(3)",
            ["speed    note x", "speed    BAD  exit code 3: speed    note x"],
        ),
        ("import time; time.sleep(60)", ["speed    BAD  not done within 2 s: "]),
    ],
)
def test_each_part_gives_its_lines_and_how_it_failed(code: str, expected: list[str]) -> None:
    assert check.run_part("speed", [sys.executable, "-c", code], 2 if "sleep" in code else 30) == expected
