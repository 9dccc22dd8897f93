"""A run's folder that is removed, moved, replaced or closed while it trains, and a disk that fills up: one error with
exit code 2 on all ranks, or warnings that name what is lost."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpsp_dist.training.checkpoint import Checkpoints
from cpsp_dist.utils.errors import EXIT_USER_ERROR
from cpsp_dist.utils.json_lines import JsonLines
from tests.support.forked_command import hold_to_permissions
from tests.support.runs import arguments

#: A checkpoint at the end of each epoch, after 12 steps.
MORE = ("engine.kind=ddp", "engine.zero=0", "train.steps=40", "data.log_samples=true")


def bound(rank: int) -> None:
    """In each rank: permissions hold, for root too."""
    hold_to_permissions()


def move_away(output: Path) -> None:
    output.rename(output.with_name("away"))


def replace_by_another(output: Path) -> None:
    move_away(output)
    output.mkdir()


def replace_by_a_file(output: Path) -> None:
    move_away(output)
    output.touch()


def close(output: Path) -> None:
    """To its owner as well."""
    for folder in (*output.rglob("*"), output):
        if folder.is_dir():
            folder.chmod(0o555)


GONE = "this folder was removed or moved away while the run trained"
CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "moved": (move_away, GONE),
    "replaced by another": (replace_by_another, GONE),
    "replaced by a file": (replace_by_a_file, GONE),
    "closed": (close, "Permission denied: "),
}


@pytest.mark.parametrize(
    ("name", "world"),
    [("moved", 1), *(pytest.param(name, 2 if name == "moved" else 1, marks=pytest.mark.long) for name in CASES)],
)
def test_a_folder_that_is_lost(prefork: Any, keypad_shards: Path, tmp_path: Path, name: str, world: int) -> None:
    lose, text = CASES[name]
    output = tmp_path / "run"
    launch = prefork.start(arguments(keypad_shards, output, *MORE), world, patch=f"{__name__}:bound", hold=[14])
    assert launch.until_step(13)
    lose(output)
    launch.release()
    assert launch.wait(60) == [EXIT_USER_ERROR] * world, launch.outputs()
    lines = [line for line in launch.outputs().splitlines() if not line.startswith("step ")]
    (error,) = {line for line in lines if line.startswith("error: ")}
    assert str(output) in error
    assert text in error
    assert "Traceback" not in launch.outputs()
    place = output if name == "closed" else tmp_path / "away"
    assert Checkpoints(place).newest_valid()[0] is not None
    if name != "closed":
        assert not list(output.glob("checkpoints/*")), "nothing is saved to another folder"


@pytest.mark.long
@pytest.mark.parametrize("size", [700, 1 << 20])
def test_a_disk_that_fills_up(prefork: Any, keypad_shards: Path, tmp_path: Path, size: int) -> None:
    """By a limit of the size of files, see test_checkpoint.py; the smaller it is, the earlier a write fails."""
    output = tmp_path / "run"
    launch = prefork.start(arguments(keypad_shards, output, *MORE, "tracking.enabled=true"), 1, hold=[14])
    assert launch.until_step(13)
    resource.prlimit(launch.ranks[0].pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    launch.release()
    assert launch.wait(90) == [EXIT_USER_ERROR], launch.outputs()
    if size > 10_000:  # else the file that its output goes to is full, too
        *_, last = launch.ranks[0].output.splitlines()
        assert last.startswith(f"error: {output}/checkpoints: cannot write the checkpoint of step ")
        assert "File too large" in last
    assert "Traceback" not in launch.outputs()
    assert Checkpoints(output).newest_valid()[1] == []


def test_lines_that_are_lost_are_counted(tmp_path: Path) -> None:
    warnings: list[str] = []
    lines = JsonLines(tmp_path / "gone" / "x.jsonl", warnings.append)
    lines.append({"step": 1})
    lines.append({"step": 2})
    assert lines.close() == f"{tmp_path}/gone/x.jsonl: 2 lines could not be written and are lost"
    (tmp_path / "gone").mkdir()
    assert lines.close() == ""
    assert (tmp_path / "gone" / "x.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
