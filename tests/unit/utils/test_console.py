"""Tables and progress: drawn for a terminal of any width, plain elsewhere; names are printed as they are."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from cpsp_dist.utils import console as module
from cpsp_dist.utils.console import Progress, echo, is_terminal, table

ROWS = [
    {"video": "[red]a[/red] b", "segments": 10, "f1": 0.25, "note": None},
    {"video": "x\x1b]0;title\x07\ny", "segments": 1200, "f1": None, "note": "long " * 30},
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """stdout and stderr, 60 columns wide."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    return stream


def test_a_table_without_terminal_is_aligned_and_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert table(ROWS).splitlines() == [
        "video                 segments    f1  note",
        f"--------------------  --------  ----  {'-' * 150}",
        "[red]a[/red] b              10  0.25  -",
        rf"x\x1b]0;title\x07\ny      1200     -  {('long ' * 30).rstrip()}",
    ]


def test_a_table_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    echo(table(ROWS))
    lines = terminal.getvalue().splitlines()
    assert max(map(len, lines)) <= 60
    assert len(lines) > 4
    assert terminal.getvalue().count("long") == 30
    assert "\x1b" not in terminal.getvalue()


def test_wide_letters_count_two_columns() -> None:
    assert table([{"a": "動画", "b": "x"}]).splitlines() == ["a     b", "----  -", "動画  x"]


@pytest.mark.parametrize("kind", ["dumb", ""])
def test_a_dumb_terminal_gets_plain_text(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_terminal(monkeypatch)
    monkeypatch.setenv("TERM", kind)
    assert not is_terminal(sys.stdout)
    assert len(table(ROWS).splitlines()) == 4


def test_output_spells_out_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    echo("a\x1b[2Jb\r", "[bold]c")
    assert capsys.readouterr().out == "a\\x1b[2Jb\\r\n[bold]c\n"


class Clock:
    now = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.now)
    return clock


def work(clock: Clock, items: int, seconds: float) -> list[int]:
    done = []
    with Progress(items, "videos", "packing") as shown:
        for item in shown.over(range(items)):
            clock.now += seconds
            done.append(item)
    return done


def test_plain_lines_every_few_seconds(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cpsp_dist")
    assert work(clock, 8, 2.0) == list(range(8))
    assert caplog.messages == [
        "packing: 3 of 8 videos, 0.5 videos/s, 0:10 left",
        "packing: 6 of 8 videos, 0.5 videos/s, 0:04 left",
        "packing: 8 of 8 videos, 0.5 videos/s, 0:16",
    ]


def test_short_work_and_disabled_progress_print_nothing(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cpsp_dist")
    with Progress(8, "videos", "evaluating", summary=False) as shown:
        clock.now += 0.5
        shown.update(8)
    with Progress(None, "MB", "copying", enabled=False) as shown:
        clock.now += 2 * 3600
        shown.update(90_000_000)
        assert shown.text() == "90,000,000 MB, 12,500 MB/s, 2:00:00"
    assert caplog.messages == []


@pytest.mark.parametrize("fails", ["the work", "what is worked on"])
def test_an_error_passes_through_after_the_last_line(
    fails: str, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """While whoever reports the error still holds it, with all its frames."""
    caplog.set_level(logging.INFO, "cpsp_dist")

    def work() -> None:
        with Progress(5, "videos", "packing") as shown:
            for number in shown.over(10 // n if fails != "the work" else n for n in (2, 1, 0)):
                clock.now += 3.0
                assert 10 // number

    with pytest.raises(ZeroDivisionError) as held:
        work()
    assert caplog.messages[-1].startswith("packing: 2 of 5 videos")
    assert held.traceback


@pytest.mark.parametrize("colour", [True, False])
def test_a_bar_on_a_terminal(colour: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    with Progress(8, "videos", "[red]packing") as shown:
        shown.update(3)
        assert shown._bar is not None
        shown._bar.refresh()
    drawn = terminal.getvalue()
    assert "[red]" in drawn
    assert "3 of" in drawn
    assert ("\x1b[38;5;" in drawn) == colour
