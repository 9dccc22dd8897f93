"""Files that appear complete or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

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
