"""A folder that an extraction fills: features, and a journal of the videos that are complete.

Whatever ends a process, the next one keeps what is complete: a video is, when the journal has its line and both of its
arrays are there. Several processes (portions) may fill one folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpsp_dist.data.encoders import MODALITIES
from cpsp_dist.utils import files
from cpsp_dist.utils.errors import DataError, UserError
from cpsp_dist.utils.input_files import read_input
from cpsp_dist.utils.strict_json import load_json

Floats = npt.NDArray[np.float32]

JOURNAL, KEY, LOCK = "journal", "key.json", "lock"
MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Done:
    """A video that is complete. `source`: what it was made from; if that changes, it is made again."""

    source: list[Any]
    notes: list[str]


class ExtractionStore:
    """Use as a context manager, which holds the folder's lock.

    Args:
        folder: to make or to continue.
        key: what the features depend on beside the videos. A folder of another key is refused.
        portion: (number, of how many); None: this process fills the folder alone.

    Raises:
        UserError: another process writes the same, other features or shards are in it, or it cannot be made.
    """

    def __init__(self, folder: Path, key: dict[str, Any], portion: tuple[int, int] | None = None):
        self.folder, self._key, self._portion = folder, key, portion
        self._stack = contextlib.ExitStack()
        self._journal: int | None = None

    def __enter__(self) -> ExtractionStore:
        with contextlib.ExitStack() as stack:
            try:
                self._require_own()
                for name in (*MODALITIES, JOURNAL):
                    files.make_folder(self.folder / name)
            except OSError as error:
                raise UserError(f"--out {self.folder}: cannot be written ({error.strerror})") from None
            self._lock(stack, LOCK, fcntl.LOCK_SH if self._portion else fcntl.LOCK_EX)
            if self._portion:
                self._lock(stack, f"{LOCK}-{self._portion[0]}-{self._portion[1]}", fcntl.LOCK_EX)
            self._check_key()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        if self._journal is not None:
            os.close(self._journal)

    def done(self) -> dict[str, Done]:
        """The videos that are complete, by name. Raises DataError: a journal cannot be read."""
        names = [{entry.name for entry in os.scandir(self.folder / modality)} for modality in MODALITIES]
        there = names[0] & names[1]
        found = {}
        for path in sorted((self.folder / JOURNAL).glob("done-*.jsonl")):
            for line in read_input(path, MAX_BYTES).split(b"\n")[:-1]:  # behind the last is one that was cut short
                try:
                    content = load_json(line)
                    name, done = content["name"], Done(content["source"], content["notes"])
                except (ValueError, TypeError, KeyError):
                    continue  # damaged: the video is made again
                if f"{name}.npy" in there:
                    found[name] = done
        return found

    def add(self, name: str, visual: Floats, audio: Floats, done: Done) -> None:
        """Write a video's features, then its line in the journal. Raises OSError."""
        for modality, array in zip(MODALITIES, (visual, audio), strict=True):
            data = io.BytesIO()
            np.save(data, np.ascontiguousarray(array), allow_pickle=False)
            with files.replacing(self.folder / modality / f"{name}.npy") as part:
                part.write_bytes(data.getbuffer())
        if self._journal is None:
            journal = self.folder / JOURNAL / f"done-{uuid.uuid4().hex}.jsonl"
            self._journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        line = json.dumps({"name": name, "source": done.source, "notes": done.notes}).encode() + b"\n"
        if os.write(self._journal, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def remove(self, names: Iterable[str]) -> None:
        """Delete the features of videos; their lines in the journal stay, and count no more."""
        for name in names:
            for modality in MODALITIES:
                (self.folder / modality / f"{name}.npy").unlink(missing_ok=True)

    def _require_own(self) -> None:
        """Raises UserError where shards or features that no extraction made are in the folder; OSError."""
        if (self.folder / JOURNAL).exists():
            return
        for name in ("index.json", *(f"{modality}/" for modality in MODALITIES)):
            there = self.folder / name
            if there.is_file() or (there.is_dir() and any(there.iterdir())):
                raise UserError(
                    f"--out {self.folder}: its {name} was not made by an extraction; choose another --out, or remove it"
                )

    def _lock(self, stack: contextlib.ExitStack, name: str, kind: int) -> None:
        lock = os.open(self.folder / JOURNAL / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        stack.callback(os.close, lock)
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.folder}: another process is extracting into it; wait for it, or choose another --out"
            ) from None

    def _check_key(self) -> None:
        path = self.folder / JOURNAL / KEY
        with open(self.folder / JOURNAL / f"{KEY}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                files.write_text(path, json.dumps(self._key, indent=2) + "\n")
                return
        try:
            found = load_json(read_input(path, MAX_BYTES), str(path))
        except ValueError as error:
            raise DataError(f"{error}; choose another --out") from None
        if found != json.loads(json.dumps(self._key)):
            differing = ", ".join(_differences(found, json.loads(json.dumps(self._key))))
            raise UserError(
                f"{self.folder}: features of another extraction are in it (other {differing}); choose another --out"
            )


def _differences(found: Any, wanted: Any, where: str = "") -> Iterator[str]:
    """Names of the values that are not the same."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in sorted({*found, *wanted}):
            yield from _differences(found.get(name), wanted.get(name), f"{where}.{name}".lstrip("."))
    elif found != wanted:
        yield where or "form"
