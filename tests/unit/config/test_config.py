"""The configuration: every shipped file loads; every mistake is reported, at once, with the nearest key."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from cpsp_dist.config import Config, flat, load_config
from cpsp_dist.training.engine import deepspeed_settings
from cpsp_dist.training.lr_schedule import TrainingSchedule
from cpsp_dist.utils.errors import ConfigError
from tests.support.environment import REPO

SHIPPED = sorted(path for path in (REPO / "configs").rglob("*") if path.is_file())
DEEPSPEED, ACCELERATE = (
    [path for path in SHIPPED if path.parent.name == folder] for folder in ("deepspeed", "accelerate")
)
RUN_CONFIGS = [path for path in SHIPPED if path.suffix == ".yaml" and path not in ACCELERATE]


def write(folder: Path, text: str, name: str = "c.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_no_shipped_file_goes_unread():
    """In whatever folder: each is a config of a run, of DeepSpeed or of accelerate, and so in a test below."""
    assert len(RUN_CONFIGS) > 10
    assert {path.name for path in {*SHIPPED} - {*RUN_CONFIGS, *DEEPSPEED, *ACCELERATE}} == {"README.md"}


@pytest.mark.parametrize("path", RUN_CONFIGS, ids=lambda p: p.name)
def test_every_shipped_config_loads(path):
    assert load_config(path).data.shards


@pytest.mark.parametrize("name", ["ave_weak", "avel100k_weak", "avel50k_weak"])
def test_weak_configs_find_background(name):
    """The published objective, which does not, is one setting away."""
    ours = load_config(REPO / f"configs/{name}.yaml").objectives
    published = load_config(REPO / "configs/ave_weak_published.yaml").objectives
    assert (ours.presence, ours.weak_category) == (1, "ungated")
    assert (published.presence, published.weak_category) == (0, "cross_entropy")
    same = {"presence": 0, "weak_category": "cross_entropy"}
    assert ours.model_copy(update=same) == published


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda p: p.name)
def test_every_shipped_deepspeed_file_fits(path):
    config = load_config(REPO / "configs/keypad.yaml", [f"engine.deepspeed={path}", "engine.zero=2"])
    merged = deepspeed_settings(config, world=4)
    assert merged["zero_optimization"]["stage"] == 2
    assert merged["zero_optimization"].items() >= json.loads(path.read_text())["zero_optimization"].items()


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda p: p.name)
def test_every_shipped_accelerate_file_loads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).deepspeed_config["deepspeed_multinode_launcher"] == "standard"


def test_published_settings_are_the_defaults():
    default = Config.model_validate({"data": {"shards": "data/ave-shards"}, "output": "runs/ave_full"})
    assert load_config(REPO / "configs/ave_full.yaml") == default


@pytest.mark.parametrize(
    ("name", "milestones", "rates"),
    [
        ("ave_full", (10, 20, 30), {0: 1, 9: 1, 10: 1 / 2, 19: 1 / 2, 20: 1 / 4, 29: 1 / 4, 30: 1 / 8, 44: 1 / 8}),
        ("ave_weak", (5, 20, 40), {0: 1, 4: 1, 5: 1 / 2, 19: 1 / 2, 20: 1 / 4, 39: 1 / 4, 40: 1 / 8, 44: 1 / 8}),
    ],
)
def test_schedule_is_the_published_one(name, milestones, rates):
    """As the published training scripts have it: Adam 1e-3, clip 0.1, batch 64, 45 epochs, halved at 10/20/30 (fully
    supervised) and 5/20/40 (weakly)."""
    settings = load_config(REPO / f"configs/{name}.yaml").train
    assert (settings.optimizer, settings.learning_rate, settings.grad_clip_norm) == ("adam", 1e-3, 0.1)
    assert (settings.epochs, settings.global_batch, settings.milestones, settings.gamma) == (45, 64, milestones, 0.5)
    schedule = TrainingSchedule(settings, 3339)  # AVE's training videos
    assert schedule.steps == math.ceil(45 * 3339 / 64)
    first_step = {epoch: math.ceil(epoch * 3339 / 64) for epoch in rates}
    found = {epoch: schedule.learning_rate(step) for epoch, step in first_step.items()}
    assert found == {epoch: pytest.approx(1e-3 * share, rel=1e-12) for epoch, share in rates.items()}


def test_warm_up_ends_at_the_full_rate() -> None:
    settings = load_config(REPO / "configs/ave_full.yaml", ["train.warmup_steps=4"]).train
    schedule, plain = (
        TrainingSchedule(settings, 3339),
        TrainingSchedule(settings.model_copy(update={"warmup_steps": 0}), 3339),
    )
    assert [schedule.learning_rate(step) for step in range(6)] == [0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3]
    assert all(schedule.learning_rate(step) == plain.learning_rate(step) for step in range(3, schedule.steps))
    assert schedule.epochs_done(100) == 6400 / 3339


def test_all_mistakes_at_once_with_the_nearest_key(tmp_path):
    path = write(tmp_path, "data: {shards: x}\ntrain: {learing_rate: 1e-3, epochs: '3'}\nmodle: {}\n")
    with pytest.raises(ConfigError) as raised:
        load_config(path, ["train.gama=3", "foo", "pool.scope=all", "train.accumulation=7"])
    text = str(raised.value)
    for mistake in (
        "unknown key 'train.learing_rate'; did you mean 'train.learning_rate'?",
        "unknown key 'train.gama'; did you mean 'train.gamma'?",
        "unknown key 'modle'; did you mean 'model'?",
        "train.epochs='3': input should be a valid integer",
        "override 'foo': write it as section.key=value",
        "pool.scope='all': input should be 'gather' or 'local'",
        "global_batch 64 is not a multiple of accumulation 7",
    ):
        assert mistake in text, text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {epochs: 1, epochs: 2}", "key 'epochs' is given twice"),
        ("extends: c.yaml", "extends itself"),
        ("extends: none.yaml", "cannot read this config file (extended by"),
        ("- 1", "a config file holds sections"),
        ("a: [", "not valid YAML"),
        ("output: x", "'data' is missing"),
        ("data: {shards: x}\ntrain: {precision: fp64}", "needs engine.kind=ddp"),
    ],
)
def test_one_mistake(tmp_path, text, expected):
    with pytest.raises(ConfigError, match=r"c\.yaml") as raised:
        load_config(write(tmp_path, text))
    assert expected in str(raised.value)


def test_missing_file_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot read this config file: No such file") as raised:
        load_config(tmp_path / "none.yaml")
    assert "\n" not in str(raised.value)


def test_a_link_that_leads_to_itself_is_one_line(tmp_path):
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for path in (tmp_path / "loop.yaml", write(tmp_path, "extends: loop.yaml")):
        with pytest.raises(ConfigError, match=r"loop\.yaml: cannot read this config file") as raised:
            load_config(path)
        assert "Too many levels of symbolic links" in str(raised.value)


def test_extends_and_overrides_win_in_order(tmp_path):
    write(tmp_path, "data: {shards: base}\ntrain: {epochs: 7, grad_clip_norm: 2.0}\n", "base.yaml")
    path = write(tmp_path, "extends: base.yaml\ntrain: {epochs: 8}\n")
    config = load_config(path, ["train.grad_clip_norm=null", "train.learning_rate=1e-4", "train.milestones=[1, 2]"])
    assert (config.train.epochs, config.train.grad_clip_norm, config.data.shards) == (8, None, "base")
    assert (config.train.learning_rate, config.train.milestones) == (1e-4, (1, 2))


def test_flat_names_every_setting_once():
    config = load_config(REPO / "configs/keypad.yaml")
    assert flat(config)["train.milestones"] == [4, 6]
    assert flat(config) == flat(config.model_dump(mode="json"))
