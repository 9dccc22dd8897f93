"""The runs of a launch: one, or one for each combination of a sweep's values; checked before anything is submitted."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpsp_dist.config import Config, check_configs, flat, listed
from cpsp_dist.tracking.environment import with_environment
from cpsp_dist.tracking.store import tracking_uri
from cpsp_dist.utils.errors import ConfigError

#: Settings that a sweep makes for each of its runs.
ITS_OWN = ("output", "tracking.run_name", "tracking.parent", "tracking.uri")
#: Runs of a sweep, at most: a job array of Slurm has 1001 tasks by default, and a few thousand where it is set up so.
MOST_RUNS = 5000


@dataclass(frozen=True)
class Planned:
    """A run to be: its settings, and in a sweep the name that distinguishes it ('' where there is one run)."""

    name: str
    config: Config


def plan_runs(path: str | Path, overrides: Sequence[str] = (), sweeps: Sequence[str] = ()) -> tuple[str, list[Planned]]:
    """The output folder of a launch, and its runs.

    Args:
        sweeps: texts `key=value,value,...`; there is a run for each combination, `psa_v=0,seed=1`, in a folder of that
            name below the configuration's `output`. A value may be a YAML list: `train.milestones=[6,9],[4,8]`.

    Raises:
        ConfigError: every mistake of every combination; one that all have is reported once.
    """
    values, mistakes = _parse(sweeps, overrides)
    if (count := math.prod(map(len, values.values()))) > MOST_RUNS:
        raise ConfigError(f"{path}: a sweep of {count:,} runs; {MOST_RUNS:,} are the most, split it into several")
    runs, reported = [], dict[str, list[str]]()
    combinations = [dict(zip(values, found, strict=True)) for found in itertools.product(*values.values())]
    alternatives = [[f"{key}={value}" for key, value in swept.items()] for swept in combinations]
    checked = check_configs(path, overrides, alternatives)
    for swept, (config, found) in zip(combinations, checked, strict=True):
        name = _name(swept)
        if config is not None:
            config = with_environment(config, sweep=bool(sweeps))
            found += _secrets(config)
            runs.append(Planned(name, config))
        for mistake in found:
            reported.setdefault(mistake, []).append(name)
    for mistake, names in reported.items():
        mistakes.append(mistake if len(names) == len(combinations) else f"{names[0]}: {mistake}")
    named = Counter(run.name for run in runs)
    mistakes += sorted(f"two runs would both be named '{name}'" for name, number in named.items() if number > 1)
    if mistakes:
        raise ConfigError(listed(path, mistakes))
    output = runs[0].config.output
    return output, [Planned(run.name, _child(run, output)) if run.name else run for run in runs]


def with_parent(run: Planned, parent: str | None) -> Planned:
    """The same run, listed under an MLflow run."""
    tracking = run.config.tracking.model_copy(update={"parent": parent})
    return Planned(run.name, run.config.model_copy(update={"tracking": tracking}))


def _child(run: Planned, output: str) -> Config:
    """In a folder of its own below `output`, and in the store of a run in `output`."""
    tracking = run.config.tracking.model_copy(update={"run_name": None})
    child = run.config.model_copy(update={"output": str(Path(output) / run.name), "tracking": tracking})
    if tracking_uri(child) == (store := tracking_uri(run.config)):
        return child
    return child.model_copy(update={"tracking": tracking.model_copy(update={"uri": store})})


def _parse(sweeps: Sequence[str], overrides: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    values: dict[str, list[str]] = {}
    mistakes = []
    given = {text.partition("=")[0] for text in overrides}
    for text in sweeps:
        key, equals, listed = text.partition("=")
        found = re.findall(r"(?:\[[^\]]*\]|[^,\[])+", listed)
        if not equals or not found or not re.fullmatch(r"\w+(\.\w+)*", key):
            mistakes.append(f"--sweep '{text}': write it as section.key=value,value,...")
        elif key in ITS_OWN:
            mistakes.append(f"--sweep {key}: a sweep sets it for each of its runs")
        elif key in values:
            mistakes.append(f"--sweep {key}: is given twice; list all values in one")
        elif key in given:
            mistakes.append(f"--sweep {key}: also stands among the overrides; take it out of there")
        elif len(found) > len({*found}):
            mistakes.append(f"--sweep '{text}': a value stands there twice")
        else:
            values[key] = found
    return values, mistakes


def _name(swept: dict[str, str]) -> str:
    """`psa_v=0,seed=1`: last parts of the keys, where these distinguish them, the seed at the end; fit for a folder."""
    last = [key.rpartition(".")[2] for key in swept]
    short = dict(zip(swept, last if len({*last}) == len(last) else swept, strict=True))
    order = sorted(swept, key=lambda key: key == "train.seed")
    return ",".join(f"{short[key]}={re.sub(r'[^A-Za-z0-9.+-]+', '_', swept[key]).strip('_')}" for key in order)


def _secrets(config: Config) -> list[str]:
    """The settings are written beside the job's logs, a password in them would be too."""
    return [
        f"{key}: {shown} is given with a password or signature, which would be written to the job's files; give it in "
        "the environment (AWS_..., FSSPEC_...), which the job inherits"
        for key, shown in flat(config).items()
        if isinstance(shown, str) and shown != _value(config, key)
    ]


def _value(config: Config, key: str) -> Any:
    """As it was given; what `flat` returns is without secrets."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
