"""The demo's folder: made anew at every moment at which it was killed, and never while another demo writes it."""

from __future__ import annotations

import fcntl
import os
import signal
from pathlib import Path

import pytest

from cpsp_dist.demo import run as demo
from cpsp_dist.utils.errors import UserError
from tests.support import killed

FILES = ("shards/train.tar", "shards/index.json", "run/metrics.jsonl", "mlflow.db")


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def fill(folder: Path) -> None:
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


def killed_before(folder: Path, number: int, count: Path) -> int:
    """The signal that ended a child which makes the folder anew, and 0."""
    pid = os.fork()
    if pid == 0:
        killed.before_change(0, str(folder), str(number), str(count))
        with demo.made_anew(folder):
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("there", [False, True])
def test_killed_at_any_moment_it_is_made_anew(there: bool, tmp_path: Path) -> None:
    folder, count, number, code = tmp_path / "demo", tmp_path / "count", 0, -signal.SIGKILL
    while code:
        number += 1
        if there:
            with demo.made_anew(folder):
                fill(folder)
        elif folder.exists():
            (folder / demo.MARK).unlink(missing_ok=True)
            folder.rmdir()
        code = killed_before(folder, number, count)
        assert code in (0, -signal.SIGKILL)
        with demo.made_anew(folder):
            assert names(folder) == [demo.MARK]
    assert number > (len(FILES) if there else 2)


def test_not_while_a_process_of_a_killed_demo_writes(tmp_path: Path) -> None:
    """A pipe that it and the killed demo hold says when it has begun, and when both are gone."""
    folder, (begun, writing), (waiting, release) = tmp_path / "demo", os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(release)
        os.set_inheritable(writing, True)
        os.set_inheritable(waiting, True)
        with demo.made_anew(folder):
            demo.run_python(["-I", "-S", "-c", f"import os; os.write({writing}, b'1'); os.read({waiting}, 1)"])
        os._exit(1)
    os.close(writing)
    try:
        assert os.read(begun, 1) == b"1"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with pytest.raises(UserError, match="another demo writes it, or a command that a killed one had started"):
            demo.made_anew(folder).__enter__()
        assert names(folder) == [demo.MARK]
    finally:
        os.close(release)
    assert os.read(begun, 1) == b""
    with open(folder / demo.MARK) as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)  # a process that ends closes its files one by one: the pipe, then the lock
    with demo.made_anew(folder):
        assert names(folder) == [demo.MARK]
    os.close(begun)
    os.close(waiting)
