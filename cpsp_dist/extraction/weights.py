"""Weights of published encoders: fetched once to the cache, checked against their hash, and read as data only."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from cpsp_dist.data import fetch
from cpsp_dist.data.cache import Cache
from cpsp_dist.utils import files
from cpsp_dist.utils.errors import DataError, UserError
from cpsp_dist.utils.hashing import file_md5, file_sha256
from cpsp_dist.utils.input_files import open_input
from cpsp_dist.utils.text import format_bytes, one_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublishedWeights:
    """A file that its publisher offers at `url`.

    Attributes:
        sha256: of the file, or its first digits where only these are published (torch writes eight into the name).
        md5: where that is what its publisher states.
    """

    url: str
    sha256: str = ""
    md5: str = ""

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def path(self) -> Path:
        """Where the cache keeps it: the folder `weights` of `CPSP_CACHE`, or of cpsp-dist in the user's cache."""
        return Cache().folder / "weights" / self.name

    def differs(self, file: Path | int, sha256: str) -> bool:
        """Whether a file, of this sha256, is another one than its publisher's."""
        return not sha256.startswith(self.sha256) or bool(self.md5 and file_md5(file) != self.md5)

    def obtain(self) -> tuple[Path, str]:
        """The file in the cache, fetched unless it is there, and its sha256.

        Raises:
            UserError: it cannot be fetched, or is another file; the line names it, its URL, and where to put it.
        """
        path = self.path()
        if not path.is_file():
            try:
                files.make_folder(path.parent)
                self._fetch(path)
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be written ({error.strerror}); set CPSP_CACHE to another folder"
                ) from None
        sha256 = file_sha256(path)
        if self.differs(path, sha256):
            raise UserError(f"{path}: not the file at {self.url} (its hash differs); delete it and start again")
        return path, sha256

    def _fetch(self, path: Path) -> None:
        """One process of this machine at a time; an interrupted fetch is resumed. Raises UserError, OSError."""
        part_path = path.with_name(f".{path.name}.part")
        part = os.open(part_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(part, fcntl.LOCK_EX)
            if path.is_file():  # another process was first
                return
            logger.info("fetching %s to %s", self.url, path.parent)
            try:
                size = fetch.file_size(self.url, threading.Event(), attempts=2)
                length = fetch.append_missing(part, self.url, size, threading.Event(), lambda _: None)
            except DataError as error:
                flags = "or give it with --visual-weights, --audio-weights"
                raise UserError(
                    f"{one_line(error)}; or fetch it elsewhere and put it there: {path} ({flags})"
                ) from None
            if length != size or self.differs(part, file_sha256(part)):
                os.ftruncate(part, 0)
                raise UserError(
                    f"{self.url}: not the published file ({format_bytes(length)}, its hash differs); start again, or"
                    f" fetch it elsewhere and put it there: {path}"
                )
            files.sync(part_path)
            files.rename(part_path, path)
        finally:
            os.close(part)


def obtain(weights: Path | None, published: PublishedWeights) -> tuple[Path, str]:
    """A weights file and its sha256: the one given, or the published one in the cache. Raises UserError."""
    if weights is None:
        return published.obtain()
    open_input(weights).close()
    return weights, file_sha256(weights)
