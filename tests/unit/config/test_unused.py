"""Settings that change nothing are named, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from cpsp_dist.config import Config, flat, load_config
from cpsp_dist.config.unused import without_effect
from cpsp_dist.losses import OBJECTIVES
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.models import MODELS, build_model
from cpsp_dist.utils.registry import settings_from
from tests.support.pool_cases import K, global_batch

CONFIGS = Path(__file__).parents[3] / "configs"


def test_the_published_settings_all_count() -> None:
    for file in sorted(CONFIGS.glob("*.yaml")):
        assert without_effect(load_config(file, ["data.shards=s"])) == [], file.name


def test_each_is_named_with_what_turns_it_off() -> None:
    given = {
        "model.alpha=0.5": "model.name=psp does not use it",
        "data.cache=/c": "data.shards is a folder",
        "data.max_skipped_samples=3": "data.on_error=raise",
        "objectives.weak_category=ungated": "model.supervision=full",
        "objectives.presence_top=3": "objectives.presence=0",
        "objectives.supcon_temperature=0.5": "objectives.mining=published",
        "pool.over=parts": "train.accumulation=1",
        "train.gamma=0.1": "train.milestones is empty",
        "tracking.uri=http://host": "tracking.enabled=false",
    }
    more = ["train.milestones=[]", "tracking.enabled=false", "train.seed=3", "tracking.uri=http://user:secret@host"]
    lines = without_effect(load_config(CONFIGS / "keypad.yaml", [*given, *more]))
    assert sorted(lines) == sorted(f"{override} has no effect: {reason}" for override, reason in given.items())


#: Settings that turn others on.
COMMON = [f"objectives.{name}=1" for name in ("avps", "psa_s", "psa_v")] + ["objectives.negatives=9"]
BASES: dict[str, list[str]] = {
    "published": [],
    "everything psp can": ["objectives.presence=1", "objectives.sspsp=1", "objectives.mining=semihard"],
    "supcon": ["objectives.mining=supcon"],
    "no pool": ["objectives.psa_v=0", "objectives.psa_s=0", "objectives.avps=0"],
    "weak": ["model.supervision=weak", "objectives.event=0", "objectives.avps=0", "objectives.psa_s=0"],
    "avel": ["model.name=avel"],
    "cmbs, weak": ["model.name=cmbs", "model.supervision=weak"]
    + [f"objectives.{name}=0" for name in ("event", "avps", "psa_s")],
    "cace": ["model.name=cace", "objectives.gate=1", "objectives.modality=1", "objectives.contrast=1"],
}
#: Of how many epochs are over; a first step does not show it.
BY_STEPS = {"model.enhanced_from"}


def other(value: Any, key: str) -> Any:
    """Another valid value of a setting."""
    section, _, name = key.partition(".")
    choices = get_args(type(getattr(load_config(CONFIGS / "psp.yaml"), section)).model_fields[name].annotation)
    if choices:
        return next(choice for choice in choices if choice != value)
    return value + 3 if isinstance(value, int) else value * 0.5 + 0.25


def computed(config: Config) -> tuple[float, float]:
    """Loss and gradient norm of one step."""
    torch.manual_seed(1)
    network = build_model(
        config.model.name,
        supervision=config.model.supervision,
        visual_channels=6,
        audio_channels=9,
        categories=K,
        **vars(settings_from(MODELS[config.model.name].Settings, config.model)),
    )
    objectives = Objectives(config.objectives, pool=config.pool.scope, supervision=config.model.supervision)
    batch = global_batch("even")
    loss, _ = objectives(network.train()(batch.visual.float(), batch.audio.float()), batch)
    loss.backward()
    norm = torch.stack([x.grad.norm() for x in network.parameters() if x.grad is not None]).norm()
    return loss.item(), norm.item()


@pytest.mark.long
@pytest.mark.parametrize("base", BASES)
def test_what_is_named_changes_nothing_and_the_rest_does(base: str) -> None:
    """Of the settings of all networks and objectives."""
    config = load_config(CONFIGS / "psp.yaml", COMMON + BASES[base])
    before = computed(config)
    assert computed(config) == before  # the same settings, the same numbers
    name = config.model.name
    settings = {key for kind in OBJECTIVES.values() for key in keys_of(kind.Settings, "objectives")}
    if name in ("cmbs", "cace"):  # their steps take ten times as long
        settings = {"objectives.gate_form", "objectives.contrast_temperature", *keys_of(MODELS[name].Settings, "model")}
    else:
        settings |= {key for kind in MODELS.values() for key in keys_of(kind.Settings, "model")}
    wrong = []
    for key in sorted(settings - BY_STEPS):
        value = other(flat(config)[key], key)
        changed = load_config(CONFIGS / "psp.yaml", [*COMMON, *BASES[base], f"{key}={value}"])
        named = any(line.startswith(f"{key}=") for line in without_effect(changed))
        if named != (computed(changed) == before):
            wrong.append(f"{key}={value}: {'named' if named else 'not named'}")
    assert not wrong


def keys_of(kind: Any, section: str) -> list[str]:
    return [f"{section}.{name}" for name in kind.__dataclass_fields__]
