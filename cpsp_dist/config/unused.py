"""Settings that were changed although nothing of the run reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from cpsp_dist.config.schema import Config, flat
from cpsp_dist.losses import OBJECTIVES
from cpsp_dist.losses.objective import Objective
from cpsp_dist.models import MODELS
from cpsp_dist.utils.redact import without_secrets
from cpsp_dist.utils.urls import is_url

#: Keys, and why nothing reads them.
Why = tuple[list[str], str]


def without_effect(config: Config) -> list[str]:
    """A line for each setting that differs from its default and changes nothing, with the setting that is why.

    What only some machines use (`train.tf32`) counts as used.
    """
    default = flat(Config.model_validate({"data": {"shards": config.data.shards}}))
    changed = {key: value for key, value in flat(config).items() if value != default.get(key)}
    reasons: dict[str, str] = {}
    for keys, reason in (*_of_networks(config), *_of_objectives(config), *_of_the_rest(config)):
        for key in keys:
            reasons.setdefault(key, reason)
    found = [f"{key}={value} has no effect: {reasons[key]}" for key, value in changed.items() if key in reasons]
    return [without_secrets(line) for line in found]


def _of_networks(config: Config) -> Iterator[Why]:
    own = _settings(MODELS[config.model.name].Settings, "model")
    every = {key for network in MODELS.values() for key in _settings(network.Settings, "model")}
    yield sorted(every.difference(own)), f"model.name={config.model.name} does not use it"
    if config.model.supervision == "full":
        yield ["model.weak_gates"], "model.supervision=full"
    if not config.objectives.contrast:
        yield ["model.noise"], "objectives.contrast=0"


def _of_objectives(config: Config) -> Iterator[Why]:
    objectives = config.objectives
    used: set[str] = set()
    off: dict[str, str] = {}
    for name, objective in OBJECTIVES.items():
        own = _settings(objective.Settings, "objectives")
        if getattr(objectives, name):
            used.update(own)
        else:
            off.update(dict.fromkeys(own, f"objectives.{name}=0"))
    for key in off.keys() - used:
        yield [key], off[key]
    on = [objective for name, objective in OBJECTIVES.items() if getattr(objectives, name)]
    if not any(objective.contrastive for objective in on):
        yield ["objectives.ramp_epochs"], "no contrastive objective is on"
    if config.model.supervision == "full":
        yield ["objectives.weak_category"], "model.supervision=full"
    else:
        yield ["objectives.background"], "model.supervision=weak"
    supcon = objectives.mining == "supcon"
    only_mined = ["objectives.margin", "objectives.negatives", "objectives.few_negatives"]
    yield only_mined if supcon else ["objectives.supcon_temperature"], f"objectives.mining={objectives.mining}"
    if not objectives.psa_v:
        yield ["pool.bank"], "objectives.psa_v=0"
    if not any(objective.pooled_features is not Objective.pooled_features for objective in on):
        yield ["pool.scope"], "no objective that compares videos is on"


def _of_the_rest(config: Config) -> Iterator[Why]:
    train = config.train
    if train.accumulation == 1:
        yield ["pool.over"], "train.accumulation=1"
    if not train.milestones:
        yield ["train.gamma"], "train.milestones is empty"
    if config.data.on_error == "raise":
        yield ["data.max_skipped_samples"], "data.on_error=raise"
    if not is_url(config.data.shards):
        yield ["data.cache", "data.cache_gb"], "data.shards is a folder"
    if not config.tracking.enabled:
        names = ("uri", "experiment", "run_name", "parent", "register")
        yield [f"tracking.{name}" for name in names], "tracking.enabled=false"


def _settings(kind: type, section: str) -> list[str]:
    return [f"{section}.{field.name}" for field in fields(kind)]
