"""The rows of a comparison: which runs share one, what it is called, and its figures."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cpsp_dist.metrics.predictions import FROM_PREDICTIONS, Predictions
from cpsp_dist.metrics.statistics import Interval, bootstrap_interval, t_interval
from cpsp_dist.tracking.runs import TrackedRun

#: Settings that change no result and get no column, by their beginning.
NOT_COMPARED = ("output", "tracking.")
SEED = "train.seed"
#: (run, split) -> what the run answered there, where that is stored.
Stored = Callable[[TrackedRun, str], Predictions | None]
#: Of a comparison: keys, and of each video what is right and out of how many.
Videos = tuple[list[str], np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Group:
    """Runs that share a row: one, or one of each seed. name: no other row's. settings: those in which rows differ."""

    name: str
    settings: dict[str, str]
    runs: tuple[TrackedRun, ...]
    stored: Stored = field(default=lambda run, split: None, repr=False, compare=False)
    _over_videos: dict[str, Interval | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def by_seed(self, metric: str) -> dict[str, float]:
        """The value of each seed (of a run without one: of its id)."""
        return {seed_of(run): run.metrics[metric] for run in self.runs if metric in run.metrics}

    def of_seed(self, seed: str) -> Group:
        """Only the run of that seed."""
        return replace(self, runs=tuple(run for run in self.runs if seed_of(run) == seed))

    def over_seeds(self, metric: str) -> Interval | None:
        """The mean and its t interval; None where no run has the metric."""
        values = [*self.by_seed(metric).values()]
        return t_interval(values) if values else None

    def over_videos(self, metric: str) -> Interval | None:
        """The bootstrap interval over videos, in percent; None where no predictions are stored. Computed once."""
        if metric not in self._over_videos:
            found = self.videos(metric)
            self._over_videos[metric] = percent(bootstrap_interval(found[1], found[2])) if found else None
        return self._over_videos[metric]

    def interval(self, metric: str) -> Interval | None:
        """The one to show: over seeds where there are several, else over videos where predictions are stored."""
        seeds = self.over_seeds(metric)
        return seeds if seeds is None or seeds.count > 1 else self.over_videos(metric) or seeds

    def videos(self, metric: str) -> Videos | None:
        """Keys, and for each video what is right and out of how many, on average over the runs."""
        name, _, split = metric.partition("/")
        if name not in FROM_PREDICTIONS or split not in ("test", "best_val"):
            return None
        found = [self.stored(run, split.removeprefix("best_")) for run in self.runs]
        complete = [each for each in found if each is not None]
        if not complete or len(complete) < len(found):
            return None
        keys = complete[0].key.tolist()
        if any(each.key.tolist() != keys for each in complete):
            return None
        parts = [each.parts(name) for each in complete]
        return keys, np.mean([part for part, _ in parts], axis=0), np.mean([total for _, total in parts], axis=0)


def percent(interval: Interval) -> Interval:
    return Interval(100 * interval.mean, 100 * interval.low, 100 * interval.high, interval.count)


def seed_of(run: TrackedRun) -> str:
    """Its seed, or its id where none is known: then it is no other run's."""
    return run.params.get(SEED, run.id)


def settings_of(runs: Iterable[TrackedRun]) -> list[str]:
    """The full keys of what was set, that may change a result."""
    return sorted({key for run in runs for key in run.params if not key.startswith(NOT_COMPARED)})


def separate(runs: Sequence[TrackedRun], keys: Sequence[str]) -> list[Group]:
    """A row for each run. keys: of the settings in which rows differ."""
    return _distinct([Group(run.name, {key: run.params.get(key, "-") for key in keys}, (run,)) for run in runs])


def shared(runs: Sequence[TrackedRun], keys: Sequence[str]) -> tuple[list[Group], list[str]]:
    """A row for runs alike in these settings: of those that have finished, of each seed the last. And what is doubtful
    about the rows."""
    members: dict[tuple[str, ...], list[TrackedRun]] = {}
    for run in runs:
        if run.status == "FINISHED":
            members.setdefault(tuple(run.params.get(key, "-") for key in keys), []).append(run)
    rows, twice = [], []
    for values, group in members.items():
        settings, seeds = dict(zip(keys, values, strict=True)), Counter(map(seed_of, group))
        latest = tuple({seed_of(run): run for run in group}.values())
        rows.append(Group(_name(latest, settings), settings, latest))
        twice.append(sorted(seed for seed, count in seeds.items() if count > 1))
    lines, groups = _left_out(runs), _distinct(rows)
    for row, repeated in zip(groups, twice, strict=True):
        if repeated:
            lines.append(f"{row.name}: several runs of seed {', '.join(repeated)}; only the last of them counts")
        mixed = [key for key in settings_of(row.runs) if key != SEED and len({r.params.get(key) for r in row.runs}) > 1]
        if mixed:
            lines.append(f"{row.name}: its runs also differ in {', '.join(map(short, mixed))}")
    return groups, lines


def _left_out(runs: Iterable[TrackedRun]) -> list[str]:
    found = [f"{run.name} ({run.status.lower()})" for run in runs if run.status != "FINISHED"]
    return [f"left out, as only finished runs are averaged: {some(found, 20)}"] if found else []


def some(names: Sequence[str], most: int = 3) -> str:
    """The first ones, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _name(runs: Sequence[TrackedRun], settings: Mapping[str, str]) -> str:
    """The one that its runs have but for their seed, else its settings."""
    names = {_without_seed(run) for run in runs}
    return (names.pop() if len(names) == 1 else "") or short_settings(settings) or "all"


def _without_seed(run: TrackedRun) -> str:
    """As the demo and sweeps name them."""
    return re.sub(rf"[-,]?\bseed=?{re.escape(run.params.get(SEED, ''))}$", "", run.name)


def _distinct(groups: list[Group]) -> list[Group]:
    """No two of one name: those of several rows are followed by the experiment where that differs, then by MLflow's
    id of their first run: its beginning, all of it where beginnings are alike."""
    marks: list[Callable[[Group], str]] = [
        experiments,
        lambda group: group.runs[0].id[:8],
        lambda group: group.runs[0].id,
    ]
    for mark in marks:
        found = defaultdict(set)
        for group in groups:
            found[group.name].add(mark(group))
        groups = [replace(g, name=f"{g.name} ({mark(g)})") if len(found[g.name]) > 1 else g for g in groups]
    return groups


def experiments(group: Group) -> str:
    """Those of its runs, by commas."""
    return ", ".join(sorted({run.experiment for run in group.runs}))


def short(key: str) -> str:
    """A setting as a column calls it."""
    return key.removeprefix("objectives.").removeprefix("train.")


def short_settings(settings: Mapping[str, str]) -> str:
    return ", ".join(f"{short(key)}={value}" for key, value in settings.items())
