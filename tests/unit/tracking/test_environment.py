"""MLflow's own variables: followed, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpsp_dist.cli import main
from cpsp_dist.config import load_config
from cpsp_dist.launch.sweep import plan_runs
from cpsp_dist.tracking.environment import with_environment
from cpsp_dist.utils.errors import UserError
from tests.support.runs import KEYPAD

SETTINGS = ["data.shards=shards"]


def test_variables_say_what_settings_do_not() -> None:
    env = {"MLFLOW_EXPERIMENT_NAME": "e", "MLFLOW_RUN_NAME": "r", "MLFLOW_PARENT_RUN_ID": "0" * 32}
    found = with_environment(load_config(KEYPAD, SETTINGS), env=env).tracking
    assert (found.experiment, found.run_name, found.parent) == ("e", "r", "0" * 32)
    same = load_config(KEYPAD, [*SETTINGS, "tracking.experiment=e", "tracking.run_name=r"])
    assert with_environment(same, env=env).tracking.experiment == "e"
    off = load_config(KEYPAD, [*SETTINGS, "tracking.enabled=false"])
    assert with_environment(off, env=env | {"MLFLOW_RUN_ID": "x"}) is off
    assert with_environment(off, env={}) is off


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("MLFLOW_RUN_ID", "a" * 32, "MLFLOW_RUN_ID is set: a run here belongs to its output folder"),
        ("MLFLOW_EXPERIMENT_ID", "7", "MLFLOW_EXPERIMENT_ID is set: give the name: tracking.experiment="),
        ("MLFLOW_RUN_NAME", "r", "MLFLOW_RUN_NAME=r, but tracking.run_name=other: unset one of them"),
    ],
)
def test_what_cannot_be_followed_is_refused(name: str, value: str, text: str) -> None:
    config = load_config(KEYPAD, [*SETTINGS, "tracking.run_name=other"])
    with pytest.raises(UserError, match=f"^{text}"):
        with_environment(config, env={name: value})


def test_a_sweep_names_its_runs_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "e")
    _, runs = plan_runs(KEYPAD, SETTINGS, ["train.seed=1,2"])
    assert [run.config.tracking.experiment for run in runs] == ["e", "e"]
    monkeypatch.setenv("MLFLOW_RUN_NAME", "r")
    with pytest.raises(UserError, match="MLFLOW_RUN_NAME is set: a sweep gives its runs names"):
        plan_runs(KEYPAD, SETTINGS, ["train.seed=1,2"])


def test_the_command_refuses_it(
    keypad_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "a" * 32)
    settings = [f"data.shards={keypad_shards}", f"output={tmp_path / 'run'}", "engine.kind=ddp"]
    assert main(["train", "--config", str(KEYPAD), *settings]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: MLFLOW_RUN_ID is set")
    assert not (tmp_path / "run" / "checkpoints").exists()
