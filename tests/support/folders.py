"""What is in a folder, to compare with what should be: by digests, which a failure prints in a line for each file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple


class Content(NamedTuple):
    size: int
    sha256: str


def content_of(data: bytes) -> Content:
    return Content(len(data), hashlib.sha256(data).hexdigest()[:16])


def files_under(folder: Path) -> dict[str, Content]:
    return {str(p.relative_to(folder)): content_of(p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}
