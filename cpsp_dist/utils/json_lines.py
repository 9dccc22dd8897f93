"""Files to which a run appends JSON lines, each with its `step`: written although a disk is full for a while, read
although some lines are damaged."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cpsp_dist.utils import files
from cpsp_dist.utils.strict_json import integer

#: Lines that wait in memory while they cannot be written, at most; bytes of a line that is no damage.
KEPT_LINES, LONGEST_LINE = 100_000, 1 << 24
#: Bytes that are read at once: millions of lines. A file with a hole would not fit in memory.
LARGEST = 1 << 30


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object of a complete line; None where it is damaged, names no step, or has an integer that no float holds."""
    if not line.endswith(b"}\n") or len(line) > LONGEST_LINE:
        return None
    try:
        content = json.loads(line, parse_int=integer)
    except (ValueError, RecursionError):
        return None
    step = content.get("step") if isinstance(content, dict) else None
    return content if type(step) is int and 0 <= step < 2**53 else None


def read_bytes(file: Path, start: int = 0, limit: int = LARGEST) -> bytes:
    """The bytes of a regular file from `start`; none where there is no such file.

    Raises:
        OSError: it cannot be read, is a folder, pipe or device, or has more than `limit` bytes there.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    with open(descriptor, "rb") as stream:
        _require_regular(descriptor)
        if os.fstat(descriptor).st_size - start > limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(file))
        stream.seek(start)
        return stream.read()


def truncate_after_step(file: Path, step: int) -> str:
    """Remove the lines of steps after `step`, a line that was cut short, lines that are there twice and damaged ones;
    completely or not at all. Returns a warning about damaged lines, or ''.

    Raises:
        OSError: it cannot be read or written.
    """
    lines = read_bytes(file).splitlines(keepends=True)
    seen: set[bytes] = set()
    kept, damaged = [], []
    for number, line in enumerate(lines, 1):
        content = parse_line(line)
        if content is None:
            damaged += [number] if line.endswith(b"\n") else []  # else it was being written when the run ended
        elif content["step"] <= step and line not in seen:
            seen.add(line)
            kept.append(line)
    if len(kept) != len(lines):
        with files.replacing(file) as part:
            part.write_bytes(b"".join(kept))
    return f"{file}: {_count(damaged)}, left out" if damaged else ""


def _count(numbers: list[int]) -> str:
    return (
        f"line {numbers[0]} is damaged" if len(numbers) == 1 else f"{len(numbers)} lines are damaged ({numbers[0]}, …)"
    )


class JsonLines:
    """Appends lines. What cannot be written waits in memory; `warn` is called with the reason each time."""

    def __init__(self, file: Path, warn: Callable[[str], None], what: str = "lines"):
        self.file, self.waiting = file, deque[str](maxlen=KEPT_LINES)
        self._warn, self._what = warn, what

    def append(self, content: Mapping[str, Any]) -> None:
        self.waiting.append(json.dumps(content) + "\n")
        self.write()

    def write(self) -> None:
        """Write what waits."""
        if not self.waiting:
            return
        lines = "".join(self.waiting).encode()
        try:
            descriptor = os.open(
                self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666
            )
            try:
                _require_regular(descriptor)
                size = os.fstat(descriptor).st_size
                if os.write(descriptor, lines) != len(lines):  # a disk that is just full takes a part, without an error
                    os.ftruncate(descriptor, size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(descriptor)
            self.waiting.clear()
        except OSError as error:
            self._warn(f"{self.file}: {error.strerror}; {self._what} wait in memory, training continues")

    def close(self) -> str:
        """Write what waits, a last time; a warning where that fails, or ''."""
        self.write()
        return f"{self.file}: {len(self.waiting)} {self._what} could not be written and are lost" * bool(self.waiting)

    def lines(self) -> Iterator[dict[str, Any]]:
        """The objects of all complete lines. Raises OSError."""
        for line in read_bytes(self.file).splitlines(keepends=True):
            if (content := parse_line(line)) is not None:
                yield content


def _require_regular(descriptor: int) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
