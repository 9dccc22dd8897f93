"""One start at a time writes a run's folder; what a start left that is gone is recognised."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cpsp_dist.training import run_lock
from cpsp_dist.training.run_lock import NAME, locked, require_startable, run_folder, this_process
from cpsp_dist.utils import processes
from cpsp_dist.utils.errors import EXIT_USER_ERROR, UserError

ME = this_process({})


def free(folder: Path) -> None:
    require_startable(str(folder), write=True)


def leave(folder: Path, holder: run_lock.Holder, age: float = 0) -> Path:
    path = folder / NAME
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_the_second_start_names_the_first(tmp_path: Path) -> None:
    """The same command twice; mpirun's ranks, each of which takes itself for the only one."""
    with locked(tmp_path):
        for call in (free, lambda folder: locked(folder).__enter__()):
            with pytest.raises(UserError, match=f"process {os.getpid()} on .* is writing this run; wait until it ends"):
                call(tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is left"
    with locked(tmp_path):
        pass


def test_a_process_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    """With its number given to another process meanwhile, and as a zombie, too."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    began = processes.started(child.pid)
    holder = replace(ME, pid=child.pid, began=began or "", key="other")
    leave(tmp_path, holder)
    with pytest.raises(UserError, match=f"process {child.pid}"):
        free(tmp_path)
    child.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    with locked(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    child.communicate(timeout=60)
    leave(tmp_path, replace(ME, began="1", key="number taken again"))
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{", '{"host": "a"}', "[]", "\x00", "[" * 10_000])
def test_a_damaged_lock_holds_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_text(text)
    free(tmp_path)
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_lock_that_is_no_file_holds_nothing(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / NAME)
    free(tmp_path)
    with locked(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


PLACES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a new folder": ("run", lambda path: None),
    "new ones above it": ("a/b/run", lambda path: None),
    "a folder": ("run", Path.mkdir),
    "a pipe": ("run", os.mkfifo),
    "a file": ("run", Path.touch),
    "below a file": ("run/a/b", lambda path: path.parents[1].touch()),
    "a device": ("run", link_to("/dev/null")),
    "a link to itself": ("run", link_to("run")),
    "below one": ("run/a/b", lambda path: path.parents[1].symlink_to("run")),
    "a link to nothing": ("run", link_to("nothing")),
    "a link to a folder": ("run", lambda path: path.symlink_to(path.parent)),
    "a long name": (f"{'a' * 300}/run", lambda path: None),
    "where nobody may make a folder": ("run", lambda path: path.parent.rmdir() or path.parent.symlink_to("/proc")),
    "checkpoints that are a file": ("run", lambda path: path.mkdir() or (path / "checkpoints").touch()),
    "checkpoints that lead nowhere": ("run", lambda path: path.mkdir() or link_to("none")(path / "checkpoints")),
    "a run that another process writes": ("run", lambda path: path.mkdir() or leave(path, replace(ME, key="other"))),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_dry_run_refuses_what_the_start_would(place: str, tmp_path: Path) -> None:
    """In the same words, and nothing is made or changed."""
    (tmp_path / "base").mkdir()
    name, make = PLACES[place]
    output = tmp_path / "base" / name
    make(output)

    def refused(call: Callable[[], object]) -> str:
        try:
            call()
        except UserError as error:
            return str(error)
        return ""

    before = sorted(tmp_path.rglob("*"))
    dry = refused(lambda: require_startable(str(output), write=True))
    assert sorted(tmp_path.rglob("*")) == before
    assert dry == refused(lambda: run_folder(str(output), write=True).__enter__())
    assert bool(dry) == (place not in ("a new folder", "new ones above it", "a folder", "a link to a folder"))


def test_of_another_machine_by_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over NFS: it is renewed, or too old, by the file server's clock."""
    other = replace(ME, machine="another boot", host="node2", key="other")
    leave(tmp_path, other, age=run_lock.STALE + 5)
    with locked(tmp_path):
        pass
    path = leave(tmp_path, other, age=20)
    monkeypatch.setattr(run_lock, "RENEW", 0.0)
    free(tmp_path)
    monkeypatch.setattr(run_lock, "RENEW", 60.0)
    monkeypatch.setattr(run_lock.time, "sleep", lambda _: os.utime(path))  # as its holder does
    for call in (free, lambda folder: locked(folder).__enter__()):
        with pytest.raises(UserError, match="on node2 is writing this run"):
            call(tmp_path)
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
