"""Paths on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from cpsp_dist.utils import urls
from cpsp_dist.utils.errors import UserError


def local_path(text: str) -> Path:
    """The `type` of each flag that takes a file or folder of this machine, and no URL."""
    try:
        return urls.local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def require_replaceable(flag: str, file: Path, endings: Sequence[str], read: Iterable[str | Path | None] = ()) -> None:
    """A file that is there is replaced only if it may be an earlier result, and is none that the command reads.

    endings: of the names of such results, as `.csv`.

    Raises:
        UserError: names the flag and the file.
    """
    if not file.is_file():
        return
    if any(path is not None and Path(path).exists() and file.samefile(path) for path in read):
        raise UserError(f"{flag} {file}: is a file that this command reads; choose another name")
    if file.suffix.lower() not in endings:
        kinds = f"{', '.join(endings[:-1])} or {endings[-1]}" if len(endings) > 1 else endings[0]
        raise UserError(f"{flag} {file}: is there already, and no {kinds} file; choose another name, or remove it")
