"""One command in a process of its own, forked from the prefork: with an environment, a user and an output of its own.

What Python reads at its start (PYTHONIOENCODING, LC_ALL) is set on the streams that it made already.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.environment import LAUNCHER


@dataclasses.dataclass
class Ended:
    """An ended command."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def one_error(self) -> str:
        """The one line that a refused command prints."""
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert self.err.splitlines()[-1] == line, self.err
        assert "Traceback" not in self.err
        return line


def run(
    prefork: Any,
    folder: Path,
    argv: Sequence[object],
    *,
    command: str = "cpsp_dist.cli",
    env: Mapping[str, str] | None = None,
    timeout: float = 60,
    **how: Any,
) -> Ended:
    """`argv` of `command` in the folder `folder`.

    env: of the process, over the tests' own without a launcher's variables. how: `stdout`, a file to write to, "a pipe"
    without a reader, or None for a closed one; `encoding` of the streams; `bound`: permissions hold for root, too.
    """
    given = folder / "how.json"
    files = {name: folder / f".{name}" for name in ("out", "err")}
    for file in files.values():
        file.write_bytes(b"")
    how = {"stdout": str(files["out"]), **how}
    given.write_text(json.dumps({"env": dict(env or {}), "err": str(files["err"]), "cwd": str(folder), **how}))
    began = time.monotonic()
    launch = prefork.start(
        [str(a) for a in argv], 1, command=command, patch=f"{__name__}:prepare", patch_args=[str(given)]
    )
    (code,) = launch.wait(timeout)
    seconds = time.monotonic() - began
    given.unlink()  # it may hold secrets that a test searches for
    encoding = {"utf-16": "utf-16-le", None: "utf-8"}.get(how.get("encoding"), how.get("encoding"))
    out, err = (file.read_text(encoding, errors="replace").removeprefix("\ufeff") for file in files.values())
    return Ended(code, out, err + launch.ranks[0].output, seconds)


def prepare(rank: int, given: str) -> None:
    """In the child, before the command."""
    how = json.loads(Path(given).read_text())
    for name in [name for name in os.environ if name.startswith(LAUNCHER)]:
        del os.environ[name]
    os.environ.update(how["env"])
    os.chdir(how["cwd"])
    for path, number in ((how["err"], 2), (how["stdout"], 1)):
        if path is None:
            os.close(number)
            continue
        if path == "a pipe":
            read, descriptor = os.pipe()
            os.close(read)
        else:
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    if encoding := how.get("encoding"):
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding=encoding)  # type: ignore[union-attr]
    if how.get("bound"):
        hold_to_permissions()


def hold_to_permissions() -> None:
    """Take from this process what lets root pass over permissions (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    held = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, held) == 0
    for index in range(3):
        held[index] &= ~(1 << 1 | 1 << 2)
    assert libc.capset(header, held) == 0


def make_private(path: Path) -> None:
    """As another user's folder or file that is closed to all others."""
    if os.geteuid() == 0:
        for inner in (path, *path.rglob("*")):
            os.chown(inner, 1, 1)
        path.chmod(0o700)
    else:
        path.chmod(0)
