"""A run and what is made of it refuse features of other encoders than those it was trained on, by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cpsp_dist.cli import main
from cpsp_dist.config import Config, load_config
from cpsp_dist.data.encoders import UNKNOWN, Encoders, named
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.distributed.process_group import discover
from cpsp_dist.training.checkpoint import WEIGHTS, Checkpoints
from cpsp_dist.training.resume import Choices, load_latest_checkpoint
from cpsp_dist.training.setup import initial_model
from cpsp_dist.utils.errors import UserError
from tests.support.models import untrained_run, with_encoders
from tests.support.runs import KEYPAD, overrides

OURS = Encoders(named("wall"), named("bands"))
OTHER = Encoders(named("vgg19"), named("bands"))


@pytest.fixture(scope="module")
def folder(keypad_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and its shards with other records of their encoders."""
    folder = tmp_path_factory.mktemp("encoders")
    for name, encoders in (("ours", OURS), ("other", OTHER), ("unknown", UNKNOWN)):
        with_encoders(keypad_shards, folder / name, encoders)
    untrained_run(folder / "ours", folder / "run")
    return folder


def test_evaluate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(folder / "run")
    assert main(["evaluate", run]) == 0
    assert "warning" not in capsys.readouterr().err
    assert main(["evaluate", run, "--shards", str(folder / "other")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        f"error: {folder / 'other'}: its visual features are of vgg19, the model of {run} was trained on those of "
        "wall; extract them with the same encoder\n"
    )
    assert main(["evaluate", run, "--shards", str(folder / "unknown")]) == 0
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("warning: ")]
    assert line.endswith(
        f"{folder / 'unknown'} does not record its visual and audio encoders; the model of {run} was trained on wall, "
        "bands: they have to be the same"
    )


def test_export_and_its_card(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(folder / "ours", shards)
    untrained_run(shards, tmp_path / "run")
    export = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "model")]
    shutil.rmtree(shards)
    shutil.copytree(folder / "other", shards)
    assert main(export) == 2
    assert f"{shards}: its visual features are of vgg19, the model of" in capsys.readouterr().err
    shutil.rmtree(shards)
    shutil.copytree(folder / "ours", shards)
    assert main(export) == 0
    assert json.loads((tmp_path / "model" / "config.json").read_text())["encoders"] == OURS.as_json()
    card = (tmp_path / "model" / "README.md").read_text()
    assert "\n- visual: wall; preprocessing: not recorded\n- audio: bands; preprocessing: not recorded\n" in card


@pytest.mark.parametrize("allow", [False, True], ids=["", "allow-config-change"])
def test_a_run_is_not_resumed_on_them(folder: Path, allow: bool) -> None:
    def resume(name: str) -> Any:
        config = load_config(str(KEYPAD), overrides(folder / name, folder / "run"))
        return resumed(config, allow)

    with pytest.raises(UserError, match=r"step-00000001 was trained on those of wall; extract them with the same"):
        resume("other")
    _config, _state, progress = resume("ours")
    assert progress.encoders == OURS.as_json()


def resumed(config: Config, allow: bool) -> Any:
    manifest = Manifest.load(config.data.shards)
    model = initial_model(config, manifest)
    return load_latest_checkpoint(config, manifest, discover(), Choices(False, allow), 1, model)


def test_another_network_is_not_resumed(folder: Path) -> None:
    """With --allow-config-change; by the dry run, too, which looks here."""
    first = Checkpoints(folder / "run").path(1)
    for setting in ("model.name=avel", "model.name=cmran"):
        config = load_config(str(KEYPAD), [*overrides(folder / "ours", folder / "run"), setting])
        with pytest.raises(UserError) as caught:
            resumed(config, allow=True)
        assert f"{first}: its weights are of another network: " in str(caught.value)
        assert str(caught.value).endswith("; set model.* as they were, or another output=…")


def test_weights_to_start_from(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a checkpoint, and of an exported model."""
    if not (folder / "model").exists():
        assert main(["export", str(folder / "run"), "--out", str(folder / "model")]) == 0
    for weights in (Checkpoints(folder / "run").path(1) / WEIGHTS, folder / "model" / "model.safetensors"):
        for name in ("ours", "other"):
            config = load_config(str(KEYPAD), [*overrides(folder / name, folder / "new"), f"model.weights={weights}"])
            if name == "ours":
                initial_model(config, Manifest.load(folder / name))
                continue
            with pytest.raises(UserError) as caught:
                initial_model(config, Manifest.load(folder / name))
            assert f"its visual features are of vgg19, {weights} was trained on those of wall" in str(caught.value)
