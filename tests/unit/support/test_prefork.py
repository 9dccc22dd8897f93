"""The server that forks the ranks of tests."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from tests.support.environment import REPO
from tests.support.prefork import PreforkLauncher, Rank, prefork_launcher
from tests.support.prefork_server import _reap


def ended_process(code: int) -> int:
    pid = os.fork()
    if not pid:
        os._exit(code)
    return pid


def test_an_exit_code_is_not_kept_by_process_number(tmp_path: Path) -> None:
    """A later process gets the number again: it would be taken for ended before it did anything."""

    class Server:
        def wait(self, pid: int, timeout: float) -> Any:
            return _reap(pid, timeout)

    rank = Rank(cast(PreforkLauncher, Server()), ended_process(7), tmp_path / "log")
    assert [rank.wait(10), rank.wait(10)] == [7, 7]  # of the same rank, as often as asked for
    assert not rank.alive
    with pytest.raises(ProcessLookupError):
        rank.signal(signal.SIGKILL)
    with pytest.raises(ChildProcessError):
        _reap(rank.pid, 10)


def wait_for_end(pid: int) -> None:
    """Of any process, within 30 seconds."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ready, _, _ = select.select([descriptor], [], [], 30)
    os.close(descriptor)
    assert ready, f"{pid} still runs"


def sleep(rank: int) -> None:
    signal.pause()


def test_each_client_has_a_server_of_its_own_which_ends_with_it() -> None:
    """And its ranks with the server."""
    first = prefork_launcher()
    second = PreforkLauncher(first.folder.parent)
    assert (second.pid, second.folder) != (first.pid, first.folder)
    (rank,) = second.start([], 1, patch=f"{__name__}:sleep").ranks
    assert rank.alive
    second.close()
    wait_for_end(second.pid)
    wait_for_end(rank.pid)


def test_nothing_is_left_of_a_killed_pytest() -> None:
    program = "from tests.support.prefork import Prefork; print(Prefork().process.pid, flush=True); input()"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as pytest_itself:
        assert pytest_itself.stdout is not None
        pid = int(pytest_itself.stdout.readline())
        pytest_itself.kill()
    wait_for_end(pid)
