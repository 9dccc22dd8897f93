"""Files that appear complete or not at all."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from cpsp_dist.utils import files
from cpsp_dist.utils.files import write_text


def test_a_pipe_or_device_is_written_to_and_stays(tmp_path: Path) -> None:
    """`--out /dev/stdout` by root would otherwise put a file in the device's place, for every program."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR)  # so that opening it to write does not wait
    try:
        write_text(pipe, "events")
        assert os.read(reader, 100) == b"events"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    assert [*tmp_path.iterdir()] == [pipe]


def test_a_file_is_replaced_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    kept = path.open()
    write_text(path, "new")
    assert (kept.read(), path.read_text()) == ("old", "new")
    kept.close()
    assert [*tmp_path.iterdir()] == [path]


def test_of_two_writers_at_once_the_second_waits(tmp_path: Path) -> None:
    """Both would otherwise write one hidden file, and the first to end would give it its name half written."""
    path = tmp_path / "predictions.jsonl"
    second = threading.Thread(target=write_text, args=(path, "second"))
    with files.replacing(path) as part:
        with part.open("w") as stream:
            stream.write("first" * 1000)
            second.start()
            second.join(0.1)
            assert second.is_alive()
        assert not path.exists()
    second.join(10)
    assert path.read_text() == "second"
    assert [*tmp_path.iterdir()] == [path]


def test_of_two_that_make_a_folder(tmp_path: Path) -> None:
    part, out = tmp_path / ".model.part", tmp_path / "model"
    entered: list[bool] = []

    def make() -> None:
        with files.alone(part, folder=True):
            entered.append(out.exists())

    second = threading.Thread(target=make)
    with files.alone(part, folder=True):
        second.start()
        second.join(0.1)
        assert not entered
        files.rename(part, out)
    second.join(10)
    assert entered == [True]
    assert part.is_dir()  # its own one, not the first's, which has another name


def test_a_writer_that_does_not_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WAIT", 0.0)
    path = tmp_path / "results.json"
    with files.alone(tmp_path / ".results.json.part"), pytest.raises(OSError, match="another command is writing it"):
        write_text(path, "second")
    assert not path.exists()


def test_a_pipe_that_nobody_reads_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WAIT", 0.0)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a pipe that nobody reads"):
        write_text(tmp_path / "pipe", "events")


def test_a_folder_is_no_file_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--out .` and `--out ""` among them."""
    monkeypatch.chdir(tmp_path)
    for path in (Path(), tmp_path):
        with pytest.raises(IsADirectoryError):
            write_text(path, "events")
    assert [*tmp_path.iterdir()] == []


def test_what_a_command_left_that_was_killed_while_it_looked_is_removed(tmp_path: Path) -> None:
    (tmp_path / f".cpsp-{os.getuid()}").mkdir()
    files.require_can_be_made(tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []
