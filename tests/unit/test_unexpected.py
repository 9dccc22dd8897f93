"""An exception that nobody has foreseen, planted in every command: one line, its exit code, the traceback on request;
and a secret that is planted in every place that takes a URL is in none of them."""

from __future__ import annotations

import argparse
import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpsp_dist.cli import COMMANDS, build_parser, main
from cpsp_dist.utils.command import run_command
from cpsp_dist.utils.redact import learn, without_secrets
from tests.support.runs import arguments

SECRET = "s3cr3tpw-0815"


def commands(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The parsers of all commands, by their words."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return {
                name: found
                for word, inner in action.choices.items()
                for name, found in commands(inner, (*words, word)).items()
            }
    return {words: parser}


def least_arguments(parser: argparse.ArgumentParser) -> list[str]:
    """One value for each argument that a command demands."""
    given: list[str] = []
    for group in parser._mutually_exclusive_groups:
        if group.required:
            given += [group._group_actions[0].option_strings[-1], "1"]
    for action in parser._actions:
        value = next(iter(action.choices)) if action.choices else "1"
        if action.required and action.option_strings:
            given += [action.option_strings[-1], str(value)]
        elif not action.option_strings and action.nargs in (None, "+") and action.help != argparse.SUPPRESS:
            given.append(str(value))
    return given


ALL = commands(build_parser())
LOCATION = "(cpsp_dist/utils/command.py, line"


def raising(error: BaseException) -> Callable[..., Any]:
    def handler(*_: object, **__: object) -> None:
        raise error

    return handler


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_a_planted_exception_is_one_line_of_every_command(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*words, *least_arguments(ALL[words])]
    real = argparse.ArgumentParser.parse_known_args

    def parse(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        found, rest = real(self, *args, **kwargs)
        found.handler = raising(LookupError(f"lost\nat https://me:{SECRET}@host/x"))
        return found, rest

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    assert main(given) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {words[0]}: unexpected LookupError: lost at https://host/x")
    assert printed.err.endswith("; --debug prints the traceback\n")
    assert printed.err.count("\n") == 1
    assert main([*given, "--debug"]) == 1
    printed = capsys.readouterr()
    assert "Traceback (most recent call last)" in printed.err
    assert SECRET not in printed.err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), 2, "x: No such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), 1, "there: unexpected ConnectionResetError"),
        (MemoryError(), 1, "there: out of memory"),
        (RecursionError("deep"), 1, "there: unexpected RecursionError: deep"),
        (AssertionError(), 1, "there: unexpected AssertionError"),
        (ValueError("x\x1b[31m\r" * 1000), 1, "there: unexpected ValueError: x\\x1b[31m"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(), 141, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_the_exit_code_follows_from_the_kind(
    error: BaseException, code: int, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(raising(error), doing="there") == code
    printed = capfd.readouterr().err
    assert text in printed
    assert printed.count("\n") == bool(text)
    assert len(printed) < 600
    assert "\x1b" not in printed


def test_a_thread_that_fails_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        thread = threading.Thread(target=raising(ValueError("in a thread")))
        thread.start()
        thread.join()

    before = threading.excepthook
    assert run_command(work, doing="there") == 0
    assert threading.excepthook is before
    printed = capsys.readouterr().err
    assert printed.startswith("error: there: unexpected ValueError: in a thread")
    assert printed.count("\n") == 1


def planted(rank: int) -> None:
    """An exception in the middle of rank 1's training."""
    from cpsp_dist.training.trainer import Trainer

    if rank == 1:
        Trainer.log_step = raising(LookupError(f"lost {SECRET}"))  # type: ignore[method-assign]


def test_a_planted_exception_in_a_rank(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    run = arguments(keypad_shards, tmp_path / "run", "train.steps=2")
    launch = prefork.start(
        run, 2, patch="tests.unit.test_unexpected:planted", MLFLOW_TRACKING_URI=f"http://me:{SECRET}@127.0.0.1:1"
    )
    assert launch.wait() == [1, 1], launch.outputs()
    (log,) = [file for file in (tmp_path / "run" / "logs").iterdir() if file.name != "rank0.log"]
    (line,) = [line for line in launch.ranks[1].output.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: training: unexpected LookupError: lost ***")
    assert line.endswith(f"the traceback is in {log}")
    assert "Traceback" not in launch.outputs()
    assert "Traceback (most recent call last)" in log.read_text()
    assert "error: rank 1: LookupError: lost ***" in launch.ranks[0].output
    assert not [file for file in (tmp_path / "run").rglob("*") if file.is_file() and SECRET in file.read_text("latin1")]


SHAPES = {
    "user": "https://alice:{}@host/a?b=c",
    "user alone": "https://{}@host/a",
    "signature": "https://host/a?X-Amz-Signature={}&x=1",
    "signature in the middle": "s3://bucket/a?a=1&token={}#x",
    "database": "postgresql://alice:{}@host:5432/db",
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=[*SHAPES])
def test_a_secret_of_a_url_is_found_again_wherever_it_stands(shape: str) -> None:
    url = shape.format(SECRET)
    assert SECRET not in without_secrets(f"in {url!r}, and {url}")
    learn([url])
    for text in (SECRET, f"url: /a?X={SECRET}", f"host='alice:{SECRET}'", f"{SECRET}\n{SECRET}x"):
        assert SECRET not in without_secrets(text)


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY"])
def test_a_secret_of_the_environment_is_found_wherever_it_stands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "0816-t0k3n")
    assert without_secrets("Bearer 0816-t0k3n") == "Bearer ***"


def test_every_command_is_among_them() -> None:
    assert {words[0] for words in ALL} >= {module.__name__.rpartition(".")[2].replace("_", "-") for module in COMMANDS}
    assert len(ALL) > 15
