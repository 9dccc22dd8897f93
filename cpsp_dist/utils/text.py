"""Names that strangers chose, errors and sizes, in messages and tables."""

from __future__ import annotations

import json
import unicodedata

from cpsp_dist.utils.redact import without_secrets

_CONTROL = ("Cc", "Cs", "Zl", "Zp")


def is_plain(name: str) -> bool:
    """Whether a name has no control characters, line breaks, nor bytes that are not UTF-8."""
    return name.isprintable() or not any(unicodedata.category(c) in _CONTROL for c in name)


def quoted(text: str) -> str:
    """A name in quotation marks, short, and in one line."""
    shown = text[:60] + ("…" if len(text) > 60 else "")
    return (
        "'"
        + "".join(json.dumps(c)[1:-1] if unicodedata.category(c) in _CONTROL or c in '\\"' else c for c in shown)
        + "'"
    )


def one_line(text: object) -> str:
    """A text, or an error's message, on one line and without passwords."""
    return without_secrets(" ".join(str(text).split()))


def first_line(error: BaseException) -> str:
    """Of an error's message, without passwords; its type and content where there is no message."""
    lines = str(error).strip().splitlines()
    return without_secrets(lines[0]) if lines else repr(error)


def format_bytes(count: float, digits: int = 1) -> str:
    """`1.5 GB`, `12.0 MB`: of 10^9 and 10^6 bytes."""
    return f"{count / 1e9:,.{digits}f} GB" if count >= 1e9 else f"{count / 1e6:,.{digits}f} MB"
