"""Names of shipped configs, and the copies that users edit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cpsp_dist.cli import main
from cpsp_dist.config import load_config
from cpsp_dist.training.engine import deepspeed_settings
from cpsp_dist.utils.errors import ConfigError
from cpsp_dist.utils.shipped import CONFIGS, SLURM, find_config
from tests.support.environment import REPO


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["ave_full", "ave_full.yaml", "configs/ave_full.yaml", "configs/ave_full"])
def test_every_spelling_finds_the_shipped_config(name):
    assert find_config(name) == CONFIGS / "ave_full.yaml" == REPO / "configs/ave_full.yaml"


@pytest.mark.parametrize("own", ["ave_full", "ave_full.yaml", "configs/ave_full.yaml"])
def test_a_local_file_comes_first(tmp_path, own):
    (tmp_path / "configs").mkdir()
    (tmp_path / own).write_text("data: {shards: mine}\n")
    assert find_config("ave_full") == Path(own)
    assert load_config("ave_full").data.shards == "mine"


def test_extends_takes_a_shipped_config_or_a_neighbour(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/mine.yaml").write_text("extends: configs/psp.yaml\ntrain: {seed: 9}\n")
    assert load_config("sub/mine.yaml") == load_config("psp", ["train.seed=9"])
    (tmp_path / "sub/psp.yaml").write_text("data: {shards: mine}\n")
    (tmp_path / "sub/mine.yaml").write_text("extends: psp\n")
    assert load_config("sub/mine").data.shards == "mine"


@pytest.mark.parametrize(
    ("name", "meant"),
    [("ave_ful", "ave_full"), ("configs/keypads.yaml", "keypad"), ("some/where/avel100k_ful.yaml", "avel100k_full")],
)
def test_a_name_that_is_neither_names_the_nearest(name, meant):
    with pytest.raises(ConfigError) as raised:
        load_config(name)
    assert str(raised.value).endswith(f": No such file or directory; did you mean the shipped '{meant}'?")
    assert "\n" not in str(raised.value)


def test_nothing_outside_of_the_shipped_folder_is_found_by_a_name():
    assert not find_config("../pyproject.toml").exists()
    assert not find_config("configs/../../constraints.txt").exists()


def test_the_deepspeed_file_is_found_too():
    config = load_config("keypad", ["engine.deepspeed=configs/deepspeed/overlap.json"])
    assert deepspeed_settings(config, world=1)["zero_optimization"]["overlap_comm"] is True
    config = load_config("keypad", ["engine.deepspeed=deepspeed/overlop.json"])
    with pytest.raises(ConfigError, match=r"did you mean the shipped 'deepspeed/overlap\.json'\?$"):
        deepspeed_settings(config, world=1)


@pytest.mark.parametrize(("command", "folder"), [("configs", CONFIGS), ("slurm", SLURM)])
def test_listed_with_a_line_each(command, folder, capsys):
    assert main([command]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    files = [path for path in folder.rglob("*.*") if path.suffix != ".md"]
    assert {name for name, _ in lines} == {str(p.relative_to(folder)).removesuffix(".yaml") for p in files}
    assert all(len(text) > 20 for _, text in lines)


def test_copies_are_the_files_and_overwrite_nothing(tmp_path, capsys):
    assert main(["slurm", "--copy", "mine"]) == 0
    assert all(os.access(path, os.X_OK) for path in (tmp_path / "mine").iterdir())
    assert main(["configs", "--copy", "mine"]) == 0, "the two fit into one folder"
    assert load_config("mine/ave_weak") == load_config(REPO / "configs/ave_weak.yaml")
    (tmp_path / "mine/ave_full.yaml").write_text("edited")
    (tmp_path / "mine/accelerate/one_machine.yaml").unlink()
    capsys.readouterr()
    assert main(["configs", "--copy", "mine"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --copy mine: mine/")
    assert error.count("\n") == 1
    assert "exists already" in error
    assert (tmp_path / "mine/ave_full.yaml").read_text() == "edited"
    assert not (tmp_path / "mine/accelerate/one_machine.yaml").exists(), "nothing is written where one is refused"
    (tmp_path / "mine/ave_full.yaml").unlink()
    (tmp_path / "mine/.ave_weak.yaml.part").write_text("of a command that was killed")
    (tmp_path / "mine/ave_weak.yaml").unlink()
    assert main(["configs", "--copy", "mine"]) == 0, "what a killed command copied stays"
    assert load_config("mine/ave_full") == load_config(REPO / "configs/ave_full.yaml")
    assert not [*(tmp_path / "mine").glob(".*")]
    (tmp_path / "file").touch()
    assert main(["configs", "--copy", "file"]) == 2
    assert "cannot write" in capsys.readouterr().err
