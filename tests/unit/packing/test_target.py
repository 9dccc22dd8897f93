"""The moment in which a complete folder gets its name: other commands, a kill, and a disk that keeps open files."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from cpsp_dist.packing import target
from cpsp_dist.packing.target import KEY_NAME, LOCK_NAME, WORK_NAME, shared_workplace, workplace
from cpsp_dist.utils.errors import UserError


def test_nobody_enters_a_folder_that_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that came then emptied what was complete, and the first one ended well all the same."""
    out, real, entered = tmp_path / "out", target.files.rename, []

    def rename(source: Path, new: Path) -> None:
        with pytest.raises(UserError, match="another process is writing it"), workplace(out):
            entered.append(source)
        real(source, new)

    monkeypatch.setattr(target.files, "rename", rename)
    with workplace(out) as part:
        (part / "shard").write_text("complete")
    assert (out / "shard").read_text() == "complete"
    assert not entered
    assert [path.name for path in (*tmp_path.iterdir(), *out.iterdir())] == ["out", "shard"]


def test_what_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk refuses the new folder its name when the old one has lost it already."""
    out, real = tmp_path / "out", target.files.rename
    out.mkdir()
    (out / target.INDEX_NAME).write_text("of the old shards")

    def rename(source: Path, new: Path) -> None:
        if source.name == "out.part":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(new))
        real(source, new)

    monkeypatch.setattr(target.files, "rename", rename)
    with pytest.raises(UserError, match="Input/output error"), workplace(out, overwrite=True) as part:
        (part / "shard").write_text("complete")
    assert [path.name for path in (*tmp_path.iterdir(), *out.iterdir())] == ["out", target.INDEX_NAME]


def test_who_locked_what_just_got_its_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has opened the lock before, and gets it after."""
    part, real = tmp_path / "out.part", target.fcntl.flock

    def flock(lock: Any, kind: int) -> None:
        shutil.move(part, tmp_path / "out")
        real(lock, kind)

    monkeypatch.setattr(target.fcntl, "flock", flock)
    with pytest.raises(UserError, match="another process is writing it"), workplace(tmp_path / "out"):
        pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == [WORK_NAME]


def test_a_disk_that_keeps_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS renames a file that is removed while this machine has it open, and then its folder cannot be removed."""
    real = os.unlink

    def unlink(name: str, *, dir_fd: int | None = None) -> None:
        inode = os.stat(name, dir_fd=dir_fd).st_ino
        for descriptor in os.listdir("/proc/self/fd"):
            if os.path.exists(f"/proc/self/fd/{descriptor}") and os.stat(f"/proc/self/fd/{descriptor}").st_ino == inode:
                os.rename(name, ".nfs0001", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
                return
        real(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink)
    with workplace(tmp_path / "out") as part:
        (part / "shard").write_text("complete")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["shard"]


@pytest.mark.parametrize("enter", [workplace, shared_workplace])
def test_killed_before_its_last_step(tmp_path: Path, enter: Any) -> None:
    """The folder has its name, and the work folder is still in it: the next command removes that."""
    work = tmp_path / "out" / WORK_NAME
    work.mkdir(parents=True)
    (work.parent / "shard").write_text("complete")
    for left in ((KEY_NAME, LOCK_NAME, "draft"), (LOCK_NAME,), ()):
        work.mkdir(exist_ok=True)
        for name in left:
            (work / name).touch()
        with pytest.raises(UserError, match="is there already"), enter(tmp_path / "out", False, "key"):
            pass
        assert [path.name for path in work.parent.iterdir()] == ["shard"], left
    work.mkdir()
    (work / "of_the_user").touch()
    with pytest.raises(UserError, match="is there already"), enter(tmp_path / "out", False, "key"):
        pass
    assert (work / "of_the_user").exists()
