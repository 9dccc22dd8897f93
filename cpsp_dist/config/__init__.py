"""The configuration of a run: typed, strict, from YAML with `extends:` and dotted overrides.

Settings and how they are read belong here: `schema` has the settings, `loading` reads them and reports every mistake at
once, `reference` prints them all.
"""

from cpsp_dist.config.loading import check_configs, listed, load_config
from cpsp_dist.config.schema import Config, TrainSettings, flat
from cpsp_dist.losses.settings import ObjectiveSettings
from cpsp_dist.models.settings import ModelSettings

__all__ = [
    "Config",
    "ModelSettings",
    "ObjectiveSettings",
    "TrainSettings",
    "check_configs",
    "flat",
    "listed",
    "load_config",
]
