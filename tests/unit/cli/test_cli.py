"""The command line itself: names of commands, and what a missing extra prints."""

from __future__ import annotations

import sys

import fsspec  # noqa: F401, its registry is looked at
import pytest

from cpsp_dist import cli, train
from cpsp_dist.cli import main


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("trian", "did you mean 'train'?"),
        ("evalute", "did you mean 'evaluate'?"),
        ("xyz", "there are shards, "),
    ],
)
def test_an_unknown_command_names_the_nearest(name, hint, capsys):
    assert main([name, "--config", "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: no command '{name}'; {hint}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "psp"],
        ["--config", "psp", "train.seed=2", "--dry-run", "--world", "8", "train.epochs=3"],
        ["train.seed=2", "--config", "psp", "--fresh", "--allow-config-change", "--local_rank=1"],
    ],
)
def test_train_is_the_training_program(arguments, monkeypatch):
    parsed = []
    monkeypatch.setattr(train, "run", lambda args: parsed.append(vars(args)) or 7)
    assert train.main(arguments) == 7
    assert main(["train", *arguments]) == 7
    parsed[1].pop("handler")
    assert parsed[0] == parsed[1]


def test_train_reports_mistakes_alike(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for program in (train.main, lambda arguments: main(["train", *arguments])):
        assert program(["--config", "keypad", "train.epoch=1"]) == 2
        assert capsys.readouterr().err == "error: keypad: unknown key 'train.epoch'; did you mean 'train.epochs'?\n"
        with pytest.raises(SystemExit) as raised:
            program(["--config", "keypad", "--no-such-flag"])
        assert raised.value.code == 2
        assert "--no-such-flag" in capsys.readouterr().err


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for name in cli._build()[1]:
        assert f"\n    {name}" in text


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("sklearn", ["demo", "--output", "demo"], "demo"),
        ("sklearn", ["shards", "keypad", "--out", "features"], "demo"),
        ("matplotlib", ["shards", "preview", "SHARDS", "--png", "x.png"], "report"),
        ("s3fs", ["shards", "info", "s3://bucket/shards"], "s3"),
    ],
)
def test_a_missing_extra_is_one_line(module, arguments, extra, keypad_shards, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    # Where another test of this process has used it.
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    capfd.readouterr()
    assert main([str(keypad_shards) if text == "SHARDS" else text for text in arguments]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert error.endswith(f"pip install 'cpsp-dist[{extra}]'\n")
    assert not [*tmp_path.iterdir()]
