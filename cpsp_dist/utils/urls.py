"""URLs as texts: what is one, and the URL of a file in a folder."""

from __future__ import annotations

import os
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


def expanded(place: str) -> str:
    """A path (or URL) of a setting: `~` is the home folder, as in a shell; a variable is not replaced.

    Raises:
        ValueError: it is empty, names a variable, or a home folder that is not known.
    """
    if is_url(place):
        return place
    path = os.path.expanduser(place)
    if not path.strip():
        raise ValueError("a path is needed here, and this one is empty")
    if path.startswith("~"):
        raise ValueError(f"{place}: this home folder is not known; write the path, or './~…' for a folder of that name")
    if variable := re.search(r"\$(\w+|\{[^}]*\})", path):
        raise ValueError(f"{place}: {variable[0]} is not replaced in settings; write the path itself")
    return path


def join(url: str, name: str) -> str:
    """The URL of a file in the folder at `url`; a query stays at the end."""
    base, mark, query = url.partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{query}"
