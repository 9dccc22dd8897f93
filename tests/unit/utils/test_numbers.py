"""Numbers of the command line: one meaning, finite, not too large; of every flag of every command."""

from __future__ import annotations

import argparse

import pytest

from cpsp_dist.utils.numbers import MOST, count, integer, natural, real
from tests.unit.test_unexpected import ALL

NO_NUMBERS = ["", " 3", "x", "٣", "1_0", "0x10", "nan", "inf", "-inf", "1e400", "9" * 5000, "1" + "0" * 18, "1e3e3"]
KINDS = (integer, real, count, natural)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_number_is_refused(kind: type) -> None:
    for text in NO_NUMBERS:
        with pytest.raises(argparse.ArgumentTypeError, match=f"at most {MOST}|to {MOST}") as raised:
            kind(text)
        assert len(str(raised.value)) < 100


def test_numbers_are_taken_as_they_stand() -> None:
    assert [integer("-3"), integer("+0"), integer(str(MOST)), natural("0"), count("1")] == [-3, 0, MOST, 0, 1]
    assert [real("1e-3"), real(".5"), real("-2."), real("7")] == [0.001, 0.5, -2.0, 7.0]
    for kind, text in ((natural, "-1"), (count, "0"), (integer, "1.0"), (integer, str(MOST + 1)), (real, "1e10")):
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)


def test_every_number_of_every_command_is_read_so() -> None:
    types = [action.type for parser in ALL.values() for action in parser._actions]
    assert int not in types
    assert float not in types
    assert {*KINDS} <= {*types}
