"""What is printed while long work goes on, at times that the test sets."""

from __future__ import annotations

import io

import pytest

from cpsp_dist.utils import progress as module
from cpsp_dist.utils.progress import Progress, progress


class Clock:
    now = 100.0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.now)
    return clock


def work(clock: Clock, stream: io.StringIO, items: int, seconds: float, **options: object) -> list[int]:
    done = []
    for item in progress(range(items), unit="videos", label="packing", stream=stream, **options):  # type: ignore[arg-type]
        clock.now += seconds
        done.append(item)
    return done


def test_plain_lines_every_few_seconds(clock: Clock) -> None:
    stream = io.StringIO()
    assert work(clock, stream, 8, 2.0) == list(range(8))
    assert stream.getvalue().splitlines() == [
        "packing: 3 of 8 videos, 0.5 videos/s, 0:10 left",
        "packing: 6 of 8 videos, 0.5 videos/s, 0:04 left",
        "packing: 8 of 8 videos, 0.5 videos/s, 0:16",
    ]


def test_one_live_line_on_a_terminal(clock: Clock) -> None:
    stream = Terminal()
    work(clock, stream, 3, 0.25)
    shown = stream.getvalue()
    assert shown.count("\n") == 1
    assert shown.split("\r")[1].startswith("packing: 1 of 3 videos, 4.0 videos/s, 0:00 left")
    assert shown.endswith("packing: 3 of 3 videos, 4.0 videos/s, 0:01\x1b[K\n")


def test_long_work_without_a_known_end_and_in_silence(clock: Clock) -> None:
    with Progress(None, "MB", "copying", io.StringIO()) as shown:
        clock.now += 2 * 3600
        shown.update(90_000_000)
        assert shown.text(clock.now) == "copying: 90,000,000 MB, 12,500 MB/s, 2:00:00"
    stream = io.StringIO()
    work(clock, stream, 5, 9.0, enabled=False)
    assert stream.getvalue() == ""


def test_an_error_passes_through(clock: Clock) -> None:
    stream = io.StringIO()
    items = progress((10 // n for n in (2, 1, 0)), total=5, unit="videos", label="packing", stream=stream)
    with pytest.raises(ZeroDivisionError):
        list(items)
    assert stream.getvalue().startswith("packing: 2 of 5 videos")
