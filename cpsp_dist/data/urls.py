"""URLs as texts: what is one, what of it may be printed."""

from __future__ import annotations

import re
from pathlib import Path


def is_url(place: str | Path) -> bool:
    return isinstance(place, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place) is not None


def without_secrets(text: str) -> str:
    """`text`, with users, passwords and queries (which hold signatures) removed from the URLs in it."""
    text = re.sub(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s'\"]*@", r"\1", text)
    return re.sub(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text)


def join(url: str, name: str) -> str:
    """The URL of a file in the folder at `url`; a query stays at the end."""
    base, mark, query = url.partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{query}"
