"""The server that forks the ranks of tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, cast

import pytest

from tests.support.prefork import PreforkLauncher, Rank, _reap


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
