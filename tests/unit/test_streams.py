"""A command whose output cannot be written, and files of others: one line and a code, whatever the command."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from cpsp_dist.utils import streams
from cpsp_dist.utils.errors import EXIT_USER_ERROR
from tests.support.forked_command import make_private, run
from tests.support.runs import arguments

TRAIN = "cpsp_dist.train"
#: Commands by the arguments after which stand the shards' folder and a folder to write to.
KINDS: dict[str, tuple[str, list[str]]] = {
    "configs": ("cpsp_dist.cli", ["configs"]),
    "help": ("cpsp_dist.cli", ["--help"]),
    "version": ("cpsp_dist.cli", ["shards", "--help"]),
    "help of training": (TRAIN, ["--help"]),
    "info": ("cpsp_dist.cli", ["shards", "info", "SHARDS"]),
    "verify": ("cpsp_dist.cli", ["shards", "verify", "SHARDS"]),
    "preview": ("cpsp_dist.cli", ["shards", "preview", "SHARDS"]),
    "plan": ("cpsp_dist.cli", ["shards", "plan", "SHARDS", "--gpus", "1", "--batch", "4"]),
    "doctor": ("cpsp_dist.cli", ["doctor", "--timeout", "5"]),
    "doctor's json": ("cpsp_dist.cli", ["doctor", "--timeout", "5", "--json"]),
    "completion": ("cpsp_dist.cli", ["completion", "bash"]),
}
SHORT = ("configs", "help")
OUTPUTS: dict[str, tuple[str | None, int, str]] = {
    "full": ("/dev/full", EXIT_USER_ERROR, "error: the output cannot be written: No space left on device"),
    "closed": (None, EXIT_USER_ERROR, "error: the output cannot be written: Bad file descriptor"),
    "a pipe without reader": ("a pipe", 141, ""),
}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in SHORT else pytest.mark.long) for k in KINDS])
def test_an_output_that_cannot_be_written(
    prefork: Any, keypad_shards: Path, tmp_path: Path, kind: str, output: str
) -> None:
    command, given = KINDS[kind]
    stdout, code, line = OUTPUTS[output]
    argv = [str(keypad_shards) if word == "SHARDS" else word for word in given]
    ended = run(prefork, tmp_path, argv, command=command, stdout=stdout)
    lines = [text for text in ended.err.splitlines() if not text.startswith("verifying: ")]
    assert (ended.code, lines) == (code, [line] if line else [])


@pytest.mark.long
@pytest.mark.parametrize("stdout", ["/dev/full", None])
def test_a_training_continues_without_its_output(
    prefork: Any, keypad_shards: Path, tmp_path: Path, stdout: str | None
) -> None:
    """Its lines are in its log too; that they are lost is said once."""
    argv = arguments(keypad_shards, tmp_path / "run", "engine.kind=ddp", "train.steps=2")
    ended = run(prefork, tmp_path, argv, command=TRAIN, stdout=stdout)
    assert ended.code == 0
    (line,) = ended.err.splitlines()
    assert line.startswith("warning: lines are lost, for the output cannot be written: ")
    assert "results in " in (tmp_path / "run" / "logs" / "rank0.log").read_text()


def test_a_closed_stream_is_no_file_that_is_opened_next(prefork: Any, tmp_path: Path) -> None:
    """Else what is printed would be written into it."""
    pid = os.fork()
    if not pid:
        for number in (0, 1, 2):
            os.close(number)
        streams.prepare()
        os._exit(os.open(tmp_path, os.O_RDONLY))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) > 2


# --- files of others --------------------------------------------------------------------------------------------------


def test_a_private_folder_of_another_user(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    """To read, to write to, as configuration and as store: one line that names it."""
    private = tmp_path / "private"
    shutil.copytree(keypad_shards, private / "shards")
    shutil.copy(keypad_shards / "index.json", private / "mlflow.db")
    (private / "c.yaml").write_text("data: {shards: s}\n")
    make_private(private)
    closed = tmp_path / "closed.yaml"
    closed.write_text("data: {shards: s}\n")
    make_private(closed)
    train = ["engine.kind=ddp", "train.steps=1"]
    try:
        for command, argv in (
            ("cpsp_dist.cli", ["shards", "info", f"{private}/shards"]),
            ("cpsp_dist.cli", ["shards", "verify", f"{private}/shards"]),
            ("cpsp_dist.cli", ["shards", "index", f"{private}/shards"]),
            ("cpsp_dist.cli", ["shards", "pack", "--layout", "ave-h5", "--source", f"{private}/x", "--out", "o"]),
            ("cpsp_dist.cli", ["shards", "merge", keypad_shards, "--out", f"{private}/merged"]),
            ("cpsp_dist.cli", ["shards", "keypad", "--out", f"{private}/keypad"]),
            ("cpsp_dist.cli", ["compare", "--uri", f"sqlite:///{private}/mlflow.db"]),
            ("cpsp_dist.cli", ["evaluate", f"{private}/run"]),
            ("cpsp_dist.cli", ["export", f"{private}/run", "--out", "e"]),
            (TRAIN, ["--config", f"{private}/c.yaml"]),
            (TRAIN, ["--config", closed]),
            (TRAIN, arguments(private / "shards", tmp_path / "run", *train)),
            (TRAIN, arguments(keypad_shards, private / "run", *train)),
            (TRAIN, [*arguments(keypad_shards, private / "run", *train), "--dry-run"]),
        ):
            ended = run(prefork, tmp_path, argv, command=command, bound=True)
            what = f"{argv}: {ended}"
            assert ended.code == EXIT_USER_ERROR, what
            assert ended.one_error.count("ermission denied") == 1, what
            assert str(closed if closed in argv else private) in ended.one_error, what
    finally:
        private.chmod(0o700)
        if os.geteuid() == 0:
            os.chown(private, 0, 0)
    assert not (tmp_path / "run").exists()
    assert {path.name for path in private.iterdir()} == {"shards", "mlflow.db", "c.yaml"}
