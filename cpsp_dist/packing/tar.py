"""Plain USTAR archives, read strictly: every byte of them is a header, a member, zeros or an error."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from cpsp_dist.utils.text import quoted

BLOCK = 512
MAX_MEMBER_BYTES = 64 * 2**20  # an array of [10, 7, 7, 2048] in float32 has 4 MB
#: Of zeros behind the last member: tar fills up its last record, of 10 kB unless asked for more.
MAX_END_BYTES = 64 * 2**20


class Fault(Exception):
    """What is wrong at a byte of an archive."""

    def __init__(self, offset: int, text: str):
        super().__init__(text)
        self.offset = offset


def members(file: BinaryIO, digest: hashlib._Hash) -> Iterator[tuple[str, int, bytes]]:
    """(name, offset of the payload, payload) of each file in a plain USTAR archive; hashes every byte of it."""

    length = os.fstat(file.fileno()).st_size

    def take(count: int, what: str) -> bytes:
        data = file.read(count) if 0 <= count <= length - file.tell() else b""
        digest.update(data)
        if len(data) < count or count < 0:
            raise Fault(length, f"the file ends within {what}: it is cut short")
        return data

    while True:
        start = file.tell()
        block = take(BLOCK, "a header or before the end blocks")
        if block == bytes(BLOCK):
            _check_end(file, digest, start)
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise Fault(start, f"damaged tar header ({error})") from None
        if info.size > MAX_MEMBER_BYTES:
            raise Fault(start, f"{quoted(info.name)} of {info.size:,} bytes, more than {MAX_MEMBER_BYTES:,}; refused")
        if info.type == tarfile.XHDTYPE:  # webdataset writes one for the fraction of a second in a file's time
            if not _is_harmless(take(info.size + -info.size % BLOCK, "an extended header")):
                raise Fault(start, "an extended header that changes more than times and owners")
            continue
        if info.type != tarfile.REGTYPE or block[257:265] not in (tarfile.POSIX_MAGIC, tarfile.GNU_MAGIC):
            raise Fault(start, f"{quoted(info.name)} is not a plain file in USTAR format")
        data = take(info.size, quoted(info.name))
        padding = take(-info.size % BLOCK, f"the padding behind {quoted(info.name)}")
        if padding.strip(b"\0"):
            raise Fault(start + BLOCK + info.size, f"padding behind {quoted(info.name)} is not zero")
        yield info.name, start + BLOCK, data


def _check_end(file: BinaryIO, digest: hashlib._Hash, start: int) -> None:
    """What follows the first zero block, at `start`: zeros alone, another block of them at least."""
    length = 0
    while data := file.read(2**20):
        digest.update(data)
        length += len(data)
        if length > MAX_END_BYTES:
            raise Fault(start, f"more than {MAX_END_BYTES:,} zero bytes at its end")
        if data.strip(b"\0"):
            length = 0
            break
    if length < BLOCK:
        raise Fault(start, "a zero block, but not the end of the archive (two zero blocks, nothing after)")


def _is_harmless(extended: bytes) -> bool:
    """Whether the records of a PAX header, `LENGTH KEY=VALUE`, leave a member's name, type and content alone."""
    keys = {record.partition(b" ")[2].partition(b"=")[0] for record in extended.rstrip(b"\0").splitlines()}
    return keys <= {b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname"}
