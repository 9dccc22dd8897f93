"""SHA-256 of files and texts (and MD5, which some publishers state), as hexadecimal digits."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def file_sha256(file: Path | int) -> str:
    """Of a file, or of an open descriptor, whose position stays where it is. Raises OSError."""
    return _file_digest(file, "sha256")


def file_md5(file: Path | int) -> str:
    """The same; says nothing about who made the file. Raises OSError."""
    return _file_digest(file, "md5")


def _file_digest(file: Path | int, kind: str) -> str:
    if isinstance(file, Path):
        with open(file, "rb", buffering=0) as opened:
            return _file_digest(opened.fileno(), kind)
    digest, offset = hashlib.new(kind, usedforsecurity=kind != "md5"), 0
    while block := os.pread(file, 1 << 20, offset):
        digest.update(block)
        offset += len(block)
    return digest.hexdigest()


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
