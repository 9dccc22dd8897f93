"""Keeps a Python process from reading files outside of given folders: of the bare run of .ci/run.

`.ci/run` puts this file into the clone's environment with a line that activates it, so that it holds in every Python
process of the run, whoever starts it. An attempt raises PermissionError and is recorded, for the run to fail even where
the error is caught. It uses nothing but the standard library.

Seen: what Python opens, lists, connects to as SQLite or takes as a program's argument (audit events), and what HDF5 and
safetensors open in C. Not seen: whether a file exists (`stat`), what other programs open of their own accord.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/proc", "/sys", "/dev", "/run", "/var/run")
#: {module: its function whose first argument is a file that C code opens}
IN_C = {"h5py._hl.files": "make_fid", "safetensors.torch": "load_file"}
PROGRAMS = ("subprocess.Popen", "os.exec", "os.posix_spawn")

_busy = threading.local()


class Guard:
    """allowed: folders that may be read, besides Python's own and the system's. record: attempts, one a line."""

    def __init__(self, allowed: Iterable[str], record: str):
        own = [sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()]
        self.allowed = {os.path.realpath(folder) for folder in (*allowed, *own, *SYSTEM)}
        self.record = record

    def check(self, path: object) -> None:
        """Raises PermissionError where `path`, which may be of any type and missing, is not among what is allowed."""
        if not isinstance(path, (str, bytes, os.PathLike)):
            return  # a descriptor
        try:
            found = os.path.realpath(os.fsdecode(path))
        except (OSError, ValueError):  # the current folder is gone; a zero byte
            return
        if not self._is_allowed(found):
            self._write(f"{os.getpid()} {' '.join(sys.orig_argv[:6])}: {found}\n")
            raise PermissionError(f"{found} lies outside of the clone: see tests/support/only_clone.py")

    def _is_allowed(self, path: str) -> bool:
        return any(path == folder or path.startswith(folder + os.sep) for folder in self.allowed)

    def _write(self, line: str) -> None:
        file = os.open(self.record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.write(file, line.encode(errors="replace"))
        os.close(file)

    def hook(self, event: str, args: Sequence[Any]) -> None:
        """For sys.addaudithook."""
        if event not in ("open", "os.listdir", "os.scandir", "sqlite3.connect", *PROGRAMS) or getattr(_busy, "on", 0):
            return
        _busy.on = True
        try:
            if event in PROGRAMS:
                for word in args[1] if isinstance(args[1], (list, tuple)) else [args[1]]:
                    if isinstance(word, (str, bytes)) and os.path.isabs(word) and os.path.exists(word):
                        self.check(word)
            elif event != "sqlite3.connect" or (args[0] != ":memory:" and not str(args[0]).startswith("file:")):
                self.check(args[0])
        finally:
            _busy.on = False

    def checked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            _busy.on = True
            try:
                self.check(path)
            finally:
                _busy.on = False
            return function(path, *args, **kwargs)

        return call


class _Finder(importlib.abc.MetaPathFinder):
    """Puts the check before the functions of IN_C when their module has been imported."""

    def __init__(self, guard: Guard):
        self.guard = guard

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in IN_C:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            setattr(module, IN_C[name], self.guard.checked(getattr(module, IN_C[name])))

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def activate(allowed: Iterable[str], record: str) -> None:
    """From now on, and in what this process forks."""
    guard = Guard(allowed, record)
    sys.addaudithook(guard.hook)
    sys.meta_path.insert(0, _Finder(guard))
