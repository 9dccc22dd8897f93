"""CPU seconds of tests, which other load changes little: `pytest -p tests.support.cpu_times`, a table at the end.

Counted are the process of pytest, the children that it waited for, and the forked ranks (see prefork.py). What a
fixture costs is counted to the first test that needs it; what the forked ranks import, once for all workers, to none.
"""

from __future__ import annotations

import os
import resource
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.prefork import prefork_launcher

BEFORE = pytest.StashKey[float]()
SHOWN = 1.0  # tests below this many seconds are only in their file's sum


def spent() -> float:
    """CPU seconds so far, of all that this process has started."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    if prefork_launcher.cache_info().currsize:
        with open(f"/proc/{prefork_launcher().pid}/stat") as file:
            ticks = file.read().rsplit(")", 1)[1].split()[11:15]  # user, system, and both of its children
        seconds += sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return seconds


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    item.stash[BEFORE] = spent()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[Any]:
    report = yield
    if report.when == "teardown":
        report.user_properties.append(("cpu", spent() - item.stash[BEFORE]))
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    tests: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "cpu":
                    tests[report.nodeid] = value
    files = Counter[str]()
    for test, seconds in tests.items():
        files[test.split("::")[0]] += seconds
    terminalreporter.section(f"CPU seconds: {sum(tests.values()):.0f}")
    for file, seconds in files.most_common():
        terminalreporter.line(f"{seconds:7.1f} {file}")
        slow = {test: value for test, value in tests.items() if test.startswith(f"{file}::") and value >= SHOWN}
        for test, value in sorted(slow.items(), key=lambda pair: -pair[1]):
            terminalreporter.line(f"{value:15.1f} {test.partition('::')[2]}")
