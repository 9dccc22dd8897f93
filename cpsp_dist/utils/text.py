"""Names that strangers chose, in messages and tables."""

from __future__ import annotations

import json
import unicodedata

_CONTROL = ("Cc", "Cs", "Zl", "Zp")


def is_plain(name: str) -> bool:
    """Whether a name has no control characters, line breaks, nor bytes that are not UTF-8."""
    return name.isprintable() or not any(unicodedata.category(c) in _CONTROL for c in name)


def quoted(text: str) -> str:
    """A name in quotation marks, short, and in one line."""
    return "'" + json.dumps(text[:60] + ("…" if len(text) > 60 else ""), ensure_ascii=False)[1:-1] + "'"
