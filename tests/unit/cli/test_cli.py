"""The command line itself: names of commands, and what a missing extra prints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import fsspec  # noqa: F401, its registry is looked at
import pytest

from cpsp_dist import cli, train
from cpsp_dist.cli import build_parser, main
from cpsp_dist.data.cache import Cache
from cpsp_dist.utils.errors import DataError


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


#: Every argument that names a file or folder to write.
WRITTEN = [
    "shards pack --out",
    "shards index",
    "shards merge a b --out",
    "shards subset a --first 1 --out",
    "shards split a --part a=1 --out",
    "shards preview a --png",
    "shards preview a --html",
    "compare --html",
    "report a --out",
    "shards keypad --out",
    "configs --copy",
    "slurm --copy",
    "extract --out",
    "export a --out",
    "predict a b --out",
    "predict a b --plot",
    "predict a b --overlay",
    "import-checkpoint a --model psp --config psp --out",
    "bench peers --envs",
    "demo --output",
]


@pytest.mark.parametrize("command", WRITTEN)
def test_what_is_written_takes_no_url(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as raised:
        main([*command.split(), "s3://me:secret@bucket/tiny"])
    assert raised.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.endswith(": s3://bucket/tiny is a URL; give a path of this machine, and copy from or to the URL")
    assert not [*tmp_path.iterdir()]


def test_every_path_is_checked_for_urls():
    """`pathlib.Path` would make `s3:/bucket` of it; and no flag that names an output is missing above."""

    def walk(parser, name):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for word, below in action.choices.items():
                    yield from walk(below, f"{name} {word}")
            else:
                yield name.strip(), action

    flags = [*walk(build_parser(), "")]
    assert not [name for name, action in flags if action.type is Path]
    outputs = {"--out", "--output", "--copy", "--png", "--html", "--plot", "--overlay", "--envs"}
    found = {(name, flag) for name, action in flags for flag in outputs.intersection(action.option_strings)}
    assert found == {(_command(line), line.split()[-1]) for line in WRITTEN if "--" in line}


def _command(line):
    words = line.split()
    return " ".join(words[: 2 if words[0] in ("shards", "bench") else 1])


@pytest.mark.parametrize("setting", ["output", "data.cache"])
def test_settings_of_what_is_written_take_no_url(setting, capsys):
    for program in (train.main, lambda arguments: main(["doctor", *arguments])):
        assert program(["--config", "keypad", f"{setting}=s3://me:secret@bucket/x"]) != 0
        printed = "".join(capsys.readouterr())
        assert f"{setting}: s3://bucket/x is a URL; give a path of this machine" in " ".join(printed.split())
        assert "secret" not in printed


def test_the_cache_of_the_environment_takes_no_url(monkeypatch, tmp_path):
    monkeypatch.setenv("CPSP_CACHE", "s3://me:secret@bucket/x")
    with pytest.raises(DataError, match=r"^CPSP_CACHE=s3://bucket/x is a URL; give a folder of a local disk$"):
        Cache()
    assert Cache(tmp_path).folder == tmp_path
