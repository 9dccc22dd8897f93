"""URLs as texts: what is one, and the URL of a file in a folder."""

from __future__ import annotations

import re
from pathlib import Path

from cpsp_dist.utils.redact import without_secrets


def is_url(place: str | Path) -> bool:
    return isinstance(place, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place) is not None


def local_path(place: str) -> Path:
    """`place`, where it has to be a path of this machine; every flag and setting of such a path passes here.

    Raises:
        ValueError: it is a URL, of which a path would make a folder `s3:` in the current one.
    """
    if is_url(place):
        raise ValueError(f"{without_secrets(place)} is a URL; give a path of this machine, and copy from or to the URL")
    return Path(place)


def join(url: str, name: str) -> str:
    """The URL of a file in the folder at `url`; a query stays at the end."""
    base, mark, query = url.partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{query}"
