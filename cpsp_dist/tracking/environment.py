"""What MLflow's own variables ask of a run: followed, or refused in one line."""

from __future__ import annotations

import os
from collections.abc import Mapping

from cpsp_dist.config import Config
from cpsp_dist.tracking.runs import EXPERIMENT
from cpsp_dist.utils.errors import UserError

#: Variable -> the setting that it stands for.
FOLLOWED = {
    "MLFLOW_EXPERIMENT_NAME": "experiment",
    "MLFLOW_RUN_NAME": "run_name",
    "MLFLOW_PARENT_RUN_ID": "parent",
}
REFUSED = {
    "MLFLOW_RUN_ID": "a run here belongs to its output folder, by which it is resumed: unset it, and give output=…",
    "MLFLOW_EXPERIMENT_ID": "give the name: tracking.experiment=…, or MLFLOW_EXPERIMENT_NAME",
}


def with_environment(config: Config, *, sweep: bool = False, env: Mapping[str, str] = os.environ) -> Config:
    """`config` with what MLflow's variables say where `tracking.*` says nothing else.

    Args:
        sweep: it is one of a sweep's runs, which is named by the sweep.

    Raises:
        UserError: a variable contradicts a setting, or cannot be followed.
    """
    if not config.tracking.enabled:
        return config
    for name, reason in REFUSED.items():
        if env.get(name):
            raise UserError(f"{name} is set: {reason}")
    found = {}
    for name, key in FOLLOWED.items():
        if not (value := env.get(name)):
            continue
        if sweep and key != "experiment":
            raise UserError(f"{name} is set: a sweep gives its runs names and a parent itself; unset it")
        given = getattr(config.tracking, key)
        if given not in (None, value) and not (key == "experiment" and given == EXPERIMENT):
            raise UserError(f"{name}={value}, but tracking.{key}={given}: unset one of them")
        found[key] = value
    return config.model_copy(update={"tracking": config.tracking.model_copy(update=found)}) if found else config
