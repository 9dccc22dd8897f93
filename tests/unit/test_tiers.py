"""Every test is of one tier, and what README.md claims names its test, and the tier, in tests/README.md."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
from _pytest.mark import ParameterSet

from tests.support.environment import REPO

#: A row of the table: the test, the first word of its last column.
ROW = re.compile(r"^\|[^|]+\| `(?P<file>\S+)\.py::(?P<test>\w+)` \| (?P<tier>short|long|both)\b[^|]*\|$", re.MULTILINE)


def tiers(test: Callable[..., Any]) -> str:
    """short, long, or both, where some parameters are long."""
    marks = getattr(test, "pytestmark", [])
    if {mark.name for mark in marks} & {"long", "timing"} or "slurm" in inspect.signature(test).parameters:
        return "long"
    any_long, every_one_has_a_short_value = False, True
    for values in (mark.args[1] for mark in marks if mark.name == "parametrize"):
        long = [
            isinstance(value, ParameterSet) and any(mark.name == "long" for mark in value.marks) for value in values
        ]
        any_long |= any(long)
        every_one_has_a_short_value &= not all(long)
    assert every_one_has_a_short_value, f"{test}: mark the test itself"
    return "both" if any_long else "short"


def table() -> list[re.Match[str]]:
    text = (REPO / "tests" / "README.md").read_text(encoding="utf-8")
    rows = list(ROW.finditer(text))
    assert len(rows) > 20
    assert len(rows) == text.count(".py::"), "a row that cannot be read"
    return rows


@pytest.mark.parametrize("row", table(), ids=lambda row: f"{row['file']}-{row['test']}")
def test_what_readme_claims_names_its_test(row: re.Match[str]) -> None:
    module = importlib.import_module("tests." + row["file"].replace("/", "."))
    assert tiers(getattr(module, row["test"])) == row["tier"]


def test_every_test_is_of_one_tier(request: pytest.FixtureRequest) -> None:
    for item in request.session.items:
        found = {mark.name for mark in item.iter_markers()}
        assert len(found & {"short", "long"}) == 1, item.nodeid
        assert "timing" not in found or "long" in found, item.nodeid
