"""Runs side by side: what differs between them, what came out, how sure that is, and whether they can be compared."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cpsp_dist.errors import UserError
from cpsp_dist.metrics.predictions import FROM_PREDICTIONS, Predictions
from cpsp_dist.metrics.statistics import (
    Interval,
    PairedTest,
    bootstrap_difference,
    bootstrap_interval,
    paired_by_seed,
    t_interval,
)
from cpsp_dist.tracking.runs import TRAINING, TrackedRun, nearest

#: Settings that change no result and get no column, by their beginning.
NOT_COMPARED = ("output", "tracking.")
SEED, BATCH = "train.seed", "train.global_batch"
#: Shown where nothing else is asked for: test, best epoch on val and its number, last epoch, loss, speed.
METRICS = ("accuracy/test", "accuracy/best_val", "best_epoch", "accuracy/val", "loss/total", "videos_per_second")
#: What has to be the same for figures to mean the same: name -> where a run has it.
COMPARABLE: dict[str, Callable[[TrackedRun], str | None]] = {
    "the data": lambda run: run.tags.get("data.fingerprint") or run.data.get(TRAINING),
    "the val split": lambda run: run.data.get("val"),
    "the test split": lambda run: run.data.get("test"),
    "the encoders": lambda run: run.tags.get("data.encoders"),
    BATCH: lambda run: run.params.get(BATCH),
}
#: (run, split) -> what the run answered there, where that is stored.
Stored = Callable[[TrackedRun, str], Predictions | None]


@dataclass(frozen=True)
class Question:
    """What is asked of a comparison.

    Attributes:
        metrics: to show; (): those of `METRICS` that there are.
        by: settings (their last part is enough) whose values make the rows; runs that differ in others share one.
        mean: the same, by all settings but the seed.
        sort: a metric (best first), a setting, `run` or `start`; None: by the first metric.
        baseline: the row that the others are compared with.
    """

    metrics: tuple[str, ...] = ()
    by: tuple[str, ...] = ()
    mean: bool = False
    sort: str | None = None
    baseline: str | None = None


@dataclass(frozen=True)
class Group:
    """Runs that share a row: one, or several seeds. settings: those in which rows differ."""

    name: str
    settings: dict[str, str]
    runs: tuple[TrackedRun, ...]
    stored: Stored = field(default=lambda run, split: None, repr=False, compare=False)

    def by_seed(self, metric: str) -> dict[str, float]:
        """The value of each seed (of a run without one: of its id); of two runs with one seed, the later run's."""
        return {run.params.get(SEED, run.id): run.metrics[metric] for run in self.runs if metric in run.metrics}

    def over_seeds(self, metric: str) -> Interval | None:
        """The mean and its t interval; None where no run has the metric."""
        values = [*self.by_seed(metric).values()]
        return t_interval(values) if values else None

    def over_videos(self, metric: str) -> Interval | None:
        """The bootstrap interval over videos, in percent; None where no predictions are stored."""
        found = self.videos(metric)
        return _percent(bootstrap_interval(found[1], found[2])) if found else None

    def videos(self, metric: str) -> tuple[list[str], np.ndarray, np.ndarray] | None:
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


@dataclass(frozen=True)
class Comparison:
    """The answer. grouped: whether a row may be of several runs. baseline: None where none is asked for."""

    metrics: tuple[str, ...]
    settings: tuple[str, ...]
    groups: tuple[Group, ...]
    grouped: bool
    baseline: Group | None
    warnings: tuple[str, ...]

    def difference(self, group: Group, metric: str) -> PairedTest | None:
        """To the baseline, paired by seed; where only one seed is shared, by the bootstrap over videos (p is nan)."""
        if self.baseline is None or group is self.baseline:
            return None
        seeds = paired_by_seed(group.by_seed(metric), self.baseline.by_seed(metric))
        if seeds is None and len(group.runs) == len(self.baseline.runs) == 1:  # other settings than the seed, or this
            own, other = ([*each.by_seed(metric).values()] for each in (group, self.baseline))
            seeds = PairedTest(t_interval(np.subtract(own, other)), np.nan) if own and other else None
        if seeds is None or seeds.difference.count > 1:
            return seeds
        mine, theirs = group.videos(metric), self.baseline.videos(metric)
        if mine is None or theirs is None or mine[0] != theirs[0]:
            return seeds
        interval = bootstrap_difference(mine[1], theirs[1], mine[2])
        return PairedTest(_percent(interval), seeds.p)


def _percent(interval: Interval) -> Interval:
    return Interval(100 * interval.mean, 100 * interval.low, 100 * interval.high, interval.count)


def compare_runs(runs: Sequence[TrackedRun], question: Question, stored: Stored | None = None) -> Comparison:
    """Rows for `runs`: one each, or one for those alike in the settings that the question names.

    Raises:
        UserError: a metric, setting or baseline that no run has; the text names the nearest.
    """
    metrics = _known_metrics(runs, question.metrics)
    keys = [key for key in _keys(runs) if len({run.params.get(key) for run in runs}) > 1]
    grouped = question.mean or bool(question.by)
    if grouped:
        chosen = [_setting(runs, name) for name in question.by] or [key for key in keys if key != SEED]
        groups, lines = _groups(runs, chosen)
        keys = chosen
    else:
        groups, lines = [Group(run.name, {key: run.params.get(key, "-") for key in keys}, (run,)) for run in runs], []
    if stored is not None:
        groups = [replace(group, stored=stored) for group in groups]
    shown = [run for group in groups for run in group.runs]
    lines += [*incomparable(shown, ignore=[_setting(runs, name) for name in question.by]), *_lacking(shown, metrics)]
    groups = _sorted(groups, question.sort, metrics, runs)
    baseline = _baseline(groups, question.baseline) if question.baseline is not None else None
    return Comparison(metrics, tuple(keys), tuple(groups), grouped, baseline, tuple(lines))


def _keys(runs: Iterable[TrackedRun]) -> list[str]:
    return sorted({key for run in runs for key in run.params if not key.startswith(NOT_COMPARED)})


def _known_metrics(runs: Sequence[TrackedRun], asked: Sequence[str]) -> tuple[str, ...]:
    known = {name for run in runs for name in run.metrics}
    for name in asked:
        if name not in known and runs:
            raise UserError(f"--metric {name}: no run has it; {nearest(name, known)}")
    return tuple(asked) or tuple(name for name in METRICS if name in known)


def _setting(runs: Sequence[TrackedRun], name: str) -> str:
    """The full key of a setting that is given by it, or by its last parts."""
    keys = _keys(runs)
    found = [key for key in keys if key == name] or [key for key in keys if key.endswith(f".{name}")]
    if len(found) != 1:
        hint = f"it may be {' or '.join(found)}" if found else nearest(name, keys).partition(" there are:")[0]
        raise UserError(f"'{name}': no setting of these runs; {hint}" if runs else f"'{name}': there are no runs")
    return found[0]


def _groups(runs: Sequence[TrackedRun], keys: Sequence[str]) -> tuple[list[Group], list[str]]:
    """Of the runs that have finished; and what is doubtful about them."""
    members: dict[tuple[str, ...], list[TrackedRun]] = {}
    for run in runs:
        if run.status == "FINISHED":
            members.setdefault(tuple(run.params.get(key, "-") for key in keys), []).append(run)
    groups, lines = [], []
    for values, group in members.items():
        settings = dict(zip(keys, values, strict=True))
        names = {_without_seed(run) for run in group}
        shown = ", ".join(f"{short(key)}={value}" for key, value in settings.items())
        name = names.pop() if len(names) == 1 else shown
        groups.append(Group(name or shown or "all", settings, tuple(group)))
        seeds = [run.params.get(SEED, run.id) for run in group]
        if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            lines.append(f"{groups[-1].name}: several runs of seed {', '.join(twice)}; only the last of them counts")
        mixed = [key for key in _keys(group) if key != SEED and len({run.params.get(key) for run in group}) > 1]
        if mixed:
            lines.append(f"{groups[-1].name}: its runs also differ in {', '.join(map(short, mixed))}")
    return groups, lines


def _without_seed(run: TrackedRun) -> str:
    """As the demo and sweeps name them."""
    return re.sub(rf"[-,]?\bseed=?{re.escape(run.params.get(SEED, ''))}$", "", run.name)


def incomparable(runs: Sequence[TrackedRun], ignore: Sequence[str] = ()) -> list[str]:
    """A line for each thing in which runs differ, so that their figures do not mean the same; and unfinished runs."""
    lines = []
    for what, find in COMPARABLE.items():
        having: dict[str, list[str]] = {}
        for run in runs:
            if (value := find(run)) is not None:
                having.setdefault(value, []).append(run.name)
        if len(having) > 1 and what not in ignore:
            parts = "; ".join(f"{value[:40]}: {_some(names)}" for value, names in having.items())
            lines.append(f"{what} differs between these runs, so their figures do not compare: {parts}")
    if unfinished := [run.name for run in runs if run.status != "FINISHED"]:
        lines.append(f"not finished, with the figures of the step they reached: {_some(unfinished)}")
    return lines


def _lacking(runs: Sequence[TrackedRun], metrics: Sequence[str]) -> list[str]:
    finished = [run for run in runs if run.status == "FINISHED"]
    found = {metric: [run.name for run in finished if metric not in run.metrics] for metric in metrics}
    return [f"without {metric}: {_some(names)}" for metric, names in found.items() if names]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def lower_is_better(metric: str) -> bool:
    return metric.startswith(("loss", "nonfinite")) or metric.endswith(("_ms", "_bytes", "wait_share"))


def _sorted(groups: list[Group], sort: str | None, metrics: Sequence[str], runs: Sequence[TrackedRun]) -> list[Group]:
    """By a metric the best row first, by a setting in its order; rows without it at the end."""
    if sort is None and not metrics:
        return groups
    key = sort or metrics[0]
    if key in ("run", "start"):
        return sorted(groups, key=lambda g: g.name) if key == "run" else groups  # oldest first, as they come
    if any(key in run.metrics for run in runs):
        sign = 1 if lower_is_better(key) else -1
        values = {id(g): [*g.by_seed(key).values()] for g in groups}
        return sorted(groups, key=lambda g: (not values[id(g)], sign * float(np.mean(values[id(g)] or [0]))))
    known = {name for run in runs for name in run.metrics} | {"run", "start"}
    if not any(name == key or name.endswith(f".{key}") for name in _keys(runs)):
        raise UserError(f"--sort {key}: neither a metric nor a setting of these runs; {nearest(key, known)}")
    setting = _setting(runs, key)
    return sorted(groups, key=lambda g: _natural(g.runs[0].params.get(setting, "")))


def _natural(text: str) -> tuple[bool, float, str]:
    try:
        return False, float(text), ""
    except ValueError:
        return True, 0.0, text


def _baseline(groups: Sequence[Group], name: str) -> Group:
    for group in groups:
        if name == group.name or name in {run.id for run in group.runs}:
            return group
    raise UserError(f"--baseline {name}: no such row; {nearest(name, [group.name for group in groups])}")


def short(key: str) -> str:
    """A setting as a column calls it."""
    return key.removeprefix("objectives.").removeprefix("train.")


def short_settings(settings: Mapping[str, str]) -> str:
    return ", ".join(f"{short(key)}={value}" for key, value in settings.items())
