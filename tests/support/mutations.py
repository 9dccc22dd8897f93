"""Damage to files, in a loop with a fixed seed: what a disk, an editor or another program may do to one."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

#: Texts that parsers stumble over.
TOKENS = (
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b"\0",
    b"\n",
    b"null",
    b"NaN",
    b"-1",
    b"1e999",
    b"9" * 400,
    b"[" * 3000,
    b"true",
)
TOKENS += (b"\xff\xfe", b"\x1b[31m", b"../../x", b'"step": 3, ', b"", b"9" * 5000, b"1" + b"0" * 18, b"-" + b"9" * 30)


def damaged(content: bytes, seed: int, count: int) -> Iterator[bytes]:
    """`count` forms of a file's content, each with one damage."""
    draw = random.Random(seed)
    for _ in range(count):
        at = draw.randrange(len(content) + 1)
        end = min(len(content), at + draw.choice((1, 1, 4, 64)))
        match draw.randrange(6):
            case 0:
                yield content[:at]
            case 1:
                yield content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :]
            case 2:
                yield content[:at] + draw.choice(TOKENS) + content[end:]
            case 3:
                yield content[:at] + content[end:]
            case 4:
                yield content[:at] + content[at : at + 200] + content[at:]
            case _:
                number = [i for i, byte in enumerate(content[:4096]) if 48 <= byte < 58] or [0]
                place = draw.choice(number)
                yield content[:place] + bytes([draw.randrange(48, 58)]) + content[place + 1 :]


def replaced(path: Path) -> Iterator[str]:
    """Something else where a file should be, one after the other; at the end nothing is there. Yields what it is."""
    for name in ("a folder", "a pipe", "a link to nowhere", "a device", "nothing"):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        if name == "a folder":
            path.mkdir()
        elif name == "a pipe":
            os.mkfifo(path)
        elif name != "nothing":
            path.symlink_to("/dev/zero" if name == "a device" else "nowhere")
        yield name
