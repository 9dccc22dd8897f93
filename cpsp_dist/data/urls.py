"""URLs as texts: what is one, and the URL of a file in a folder."""

from __future__ import annotations

import re
from pathlib import Path


def is_url(place: str | Path) -> bool:
    return isinstance(place, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place) is not None


def join(url: str, name: str) -> str:
    """The URL of a file in the folder at `url`; a query stays at the end."""
    base, mark, query = url.partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{query}"
