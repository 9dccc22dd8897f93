"""Numbers on the command line: plain decimal digits, finite and of a size that has a meaning."""

from __future__ import annotations

import argparse
import re

#: The largest number that is taken: of anything that is counted, of seconds, of megabytes.
MOST = 2**31 - 1


def integer(text: str) -> int:
    """The `type` of a flag that takes an integer, from -MOST to MOST; each command checks its own range."""
    if not re.fullmatch(r"[-+]?[0-9]{1,10}", text) or abs(int(text)) > MOST:
        raise argparse.ArgumentTypeError(f"{text[:30]!r} is no integer of at most {MOST}")
    return int(text)


def count(text: str) -> int:
    """The `type` of a flag that takes an integer from 1 on."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """The `type` of a flag that takes an integer from 0 on."""
    return _at_least(0, text)


def real(text: str) -> float:
    """The `type` of a flag that takes a finite number, from -MOST to MOST."""
    digits = re.fullmatch(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,3})?", text) and len(text) < 40
    if not digits or abs(float(text)) > MOST:
        raise argparse.ArgumentTypeError(f"{text[:30]!r} is no number of at most {MOST}")
    return float(text)


def _at_least(least: int, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", text) or not least <= int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"{text[:30]!r} is no number from {least} to {MOST}")
    return int(text)
