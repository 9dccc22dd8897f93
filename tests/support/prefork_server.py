"""The process of `prefork.py`: imports everything, forks a server for each client, which forks the client's ranks."""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path


def main(listening: socket.socket) -> int:
    """Fork a server for each connection, until stdin ends. In a child this returns the training command's exit code."""
    gc.disable()
    imported = False
    while True:
        ready, _, _ = select.select([listening, 0], [], [])
        if 0 in ready:
            return 0
        connection, _ = listening.accept()
        if not imported:
            _import()
            imported = True
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # a server that ended is no zombie
        if os.fork():
            connection.close()
            continue
        _end_with_parent()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        listening.close()
        return serve(connection)


def _import() -> None:
    """All that most ranks import, a fifth of what a short run costs, and 4 s of torch's that an optimizer imports."""
    import hypothesis.strategies  # noqa: F401  # of tests whose functions ranks call
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    import torch
    import torch._dynamo

    import cpsp_dist.api
    import cpsp_dist.cli
    import cpsp_dist.report.run_page
    import cpsp_dist.train  # noqa: F401
    from cpsp_dist.distributed.card import own_card
    from cpsp_dist.metrics import METRICS
    from cpsp_dist.training.engine import import_deepspeed
    from tests.support import holds, rank_worker  # noqa: F401

    torch.set_num_threads(1)
    import_deepspeed(torch.device("cpu"))
    list(METRICS.values())  # imports them
    own_card(torch.device("cpu"))  # reads the package's text, once in a process
    gc.collect()
    gc.freeze()  # a child's collections would touch, and so copy, all that it shares with this process
    gc.enable()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def serve(connection: socket.socket) -> int:
    """One client's server. In a child this returns the training command's exit code."""
    from tests.support import holds, rank_worker

    questions = connection.makefile()

    def answer(value: int | str) -> None:
        connection.sendall(f"{value}\n".encode())

    answer(os.getpid())
    while line := questions.readline():
        question = json.loads(line)
        if "wait" in question:
            answer(_reap(question["wait"], question["timeout"]))
            continue
        pid = os.fork()
        if pid:
            answer(pid)
            continue
        _end_with_parent()  # nothing outlives the server
        questions.close()
        connection.close()
        log = os.open(question["log"], os.O_WRONLY | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.environ.update(question["env"])
        if "call" in question:
            return rank_worker.work(Path(question["call"]))
        if question["hold"][1]:
            holds.before_steps(*question["hold"])
        if question["patch"]:
            module, name = question["patch"].split(":")
            getattr(importlib.import_module(module), name)(int(os.environ["RANK"]), *question["args"])
        return importlib.import_module(question["command"]).main(question["arguments"])
    return 0


def _reap(pid: int, timeout: float) -> int | str:
    """The exit code of a child that was not waited for yet, or "none" after `timeout` seconds."""
    end = time.monotonic() + timeout
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        left = end - time.monotonic()
        if left < 0:
            return "none"
        _sleep_until_end(pid, left)


def _sleep_until_end(pid: int, seconds: float) -> None:
    """Of a process, at most `seconds`; 5 ms where Linux (before 5.3) cannot wait so."""
    try:
        process = os.pidfd_open(pid)
    except OSError:
        time.sleep(0.005)
        return
    select.select([process], [], [], seconds)
    os.close(process)


def _end(code: int) -> None:
    """As `sys.exit`, but that modules are not taken apart: 0.5 s of CPU time, for pages shared with the server."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):  # closed by a test
        code = code or 120  # Python's own code for it
    os._exit(code)


if __name__ == "__main__":
    try:
        ended = main(socket.socket(fileno=int(sys.argv[1])))
    except SystemExit as exit:
        ended = exit.code if isinstance(exit.code, int) else exit.code is not None
    _end(ended)
