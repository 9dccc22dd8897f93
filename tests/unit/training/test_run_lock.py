"""One start at a time writes a run's folder; what a start left that is gone is recognised."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cpsp_dist.training import run_lock
from cpsp_dist.training.run_lock import NAME, locked, require_unlocked, this_process
from cpsp_dist.utils.errors import EXIT_USER_ERROR, UserError

ME = this_process({})


def leave(folder: Path, holder: run_lock.Holder, age: float = 0) -> Path:
    path = folder / NAME
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_the_second_start_names_the_first(tmp_path: Path) -> None:
    """The same command twice; mpirun's ranks, each of which takes itself for the only one."""
    with locked(tmp_path):
        for call in (require_unlocked, lambda folder: locked(folder).__enter__()):
            with pytest.raises(UserError, match=f"process {os.getpid()} on .* is writing this run; wait until it ends"):
                call(tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is left"
    with locked(tmp_path):
        pass


def test_a_process_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    """With its number given to another process meanwhile, and as a zombie, too."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    began = run_lock._began(child.pid)
    holder = replace(ME, pid=child.pid, began=began or "", key="other")
    leave(tmp_path, holder)
    with pytest.raises(UserError, match=f"process {child.pid}"):
        require_unlocked(tmp_path)
    child.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    with locked(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    child.communicate(timeout=60)
    leave(tmp_path, replace(ME, began="1", key="number taken again"))
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{", '{"host": "a"}', "[]", "\x00"])
def test_a_damaged_lock_holds_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_text(text)
    with locked(tmp_path):
        pass


def test_of_another_machine_by_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over NFS: it is renewed, or too old, by the file server's clock."""
    other = replace(ME, machine="another boot", host="node2", key="other")
    leave(tmp_path, other, age=run_lock.STALE + 5)
    with locked(tmp_path):
        pass
    path = leave(tmp_path, other, age=20)
    monkeypatch.setattr(run_lock.time, "sleep", lambda _: os.utime(path))  # as its holder does
    with pytest.raises(UserError, match="on node2 is writing this run"), locked(tmp_path):
        pass
    assert json.loads(path.read_text())["key"] == "other", "it is left alone"
    monkeypatch.setattr(run_lock.time, "sleep", lambda _: path.unlink())  # it ends while we look
    with locked(tmp_path):
        pass


def test_a_requeued_job_waits_for_its_own_start_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(ME, machine="another boot", host="node2", key="other", job="7")
    path = leave(tmp_path, other)
    looks = []

    def look(_: float) -> None:
        looks.append(os.utime(path))
        if len(looks) == 5:
            path.unlink()

    monkeypatch.setattr(run_lock.time, "sleep", look)
    with locked(tmp_path, replace(ME, job="7")):
        pass
    assert len(looks) == 5


def test_a_holder_that_was_replaced_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It stood still for so long that another start took its place: two would write one run."""

    class Ended(Exception):
        pass

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(run_lock, "RENEW", 0.0)
    monkeypatch.setattr(run_lock.os, "_exit", end)
    path = leave(tmp_path, replace(ME, host="node2", key="the next start"))
    with pytest.raises(Ended, match=str(EXIT_USER_ERROR)):
        run_lock._renew(path, ME, threading.Event())
    assert f"process {os.getpid()} on node2 has taken over this run; this process ends" in caplog.text
    assert json.loads(path.read_text())["key"] == "the next start", "and its lock is left alone"


def test_a_holder_renews_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "RENEW", 0.01)
    with locked(tmp_path):
        path = tmp_path / NAME
        os.utime(path, (1, 1))
        end = time.monotonic() + 60
        while path.stat().st_mtime == 1:
            assert time.monotonic() < end


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.lock: cannot be written: No such file"), locked(tmp_path / "no folder"):
        pass
