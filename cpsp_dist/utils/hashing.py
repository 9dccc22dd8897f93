"""SHA-256 of files and texts, as hexadecimal digits."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def file_sha256(file: Path | int) -> str:
    """Of a file, or of an open descriptor, whose position stays where it is. Raises OSError."""
    if isinstance(file, Path):
        with open(file, "rb", buffering=0) as opened:
            return file_sha256(opened.fileno())
    digest, offset = hashlib.sha256(), 0
    while block := os.pread(file, 1 << 20, offset):
        digest.update(block)
        offset += len(block)
    return digest.hexdigest()


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
