"""Files and folders that appear complete or not at all, and stay on disk whatever ends the machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file anew; readers see the old or the new content. Raises OSError."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path of a hidden file beside `path` to write to, which takes the name `path` at the end.

    A device or a pipe, such as /dev/stdout, is written to itself: it stays what it is.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        sync(part)
        rename(part, path)
    except BaseException:
        part.unlink(missing_ok=True)  # of a full disk, give back what it took
        raise


def rename(source: Path, target: Path) -> None:
    """Give a complete file or folder its name. A file that is there is replaced; a folder has to be empty."""
    source.replace(target)
    sync(target.parent)


def make_folder(folder: Path) -> None:
    """Make it and what is missing above it, on disk for good: a folder is an entry in the one above."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync(path.parent)


def sync(path: Path) -> None:
    """What was written to this file, or the names in this folder, are on disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
