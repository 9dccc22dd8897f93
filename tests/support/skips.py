"""What a machine may lack: four things, each with the command that brings it. A test that skips for another reason
fails: conftest.py takes the two hooks from here."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import NoReturn

import pytest

#: {what is needed: the command that brings it}
COMMANDS = {
    "Slurm": "make slurm-up",
    "nginx": "apt-get install nginx-light",
    "a GPU": "apt-get install nvidia-driver",
    "Chromium": "apt-get install chromium",
}


def skip(needed: str, why: str) -> NoReturn:
    """Skip the test, or fail it where CPSP_REQUIRE_SLURM, _NGINX, _GPU or _CHROMIUM is set."""
    required = f"CPSP_REQUIRE_{needed.split()[-1].upper()}"
    if os.environ.get(required):
        pytest.fail(f"{required} is set, but: {why}")
    pytest.skip(f"needs {needed}: {why} ({COMMANDS[needed]})")


def is_allowed(reason: str) -> bool:
    return any(f"needs {needed}" in reason and command in reason for needed, command in COMMANDS.items())


def _as_failure(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip that is not allowed into a failure with its reason. Expected failures (xfail) are no skips."""
    if report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not is_allowed(reason):
        report.outcome = "failed"
        report.longrepr = f"{reason}\nOnly what needs {', '.join(COMMANDS)} may skip: see tests/support/skips.py"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _as_failure(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _as_failure(report)
    return report
