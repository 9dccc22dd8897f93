"""Runs side by side: what differs between them, what came out, how sure that is, and whether they can be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cpsp_dist.metrics.statistics import PairedTest, bootstrap_difference, paired_by_seed, t_interval
from cpsp_dist.tracking.groups import SEED, Group, Stored, percent, separate, settings_of, shared, some
from cpsp_dist.tracking.runs import TRAINING, TrackedRun, nearest
from cpsp_dist.utils.errors import UserError

BATCH = "train.global_batch"
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
class Comparison:
    """The answer. grouped: whether a row may be of several runs. baseline: None where none is asked for."""

    metrics: tuple[str, ...]
    settings: tuple[str, ...]
    groups: tuple[Group, ...]
    grouped: bool
    baseline: Group | None
    warnings: tuple[str, ...]
    _differences: dict[tuple[str, str], PairedTest | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def difference(self, group: Group, metric: str) -> PairedTest | None:
        """To the baseline, paired by seed; where only one seed is shared, by the bootstrap over videos (p is nan).
        Computed once."""
        if self.baseline is None or group is self.baseline:
            return None
        key = group.name, metric
        if key not in self._differences:
            self._differences[key] = _difference(group, self.baseline, metric)
        return self._differences[key]


def _difference(first: Group, second: Group, metric: str) -> PairedTest | None:
    own, other = first.by_seed(metric), second.by_seed(metric)
    test = paired_by_seed(own, other)
    if test is not None and test.difference.count > 1:
        return test
    if test is not None:
        (seed,) = own.keys() & other.keys()
        first, second = first.of_seed(seed), second.of_seed(seed)
    elif own and other and len(first.runs) == len(second.runs) == 1:  # other settings than the seed, or this
        test = PairedTest(t_interval(np.subtract([*own.values()], [*other.values()])), np.nan)
    else:
        return None
    mine, theirs = first.videos(metric), second.videos(metric)
    if mine is None or theirs is None or mine[0] != theirs[0]:
        return test
    return PairedTest(percent(bootstrap_difference(mine[1], mine[2], theirs[1], theirs[2])), test.p)


def compare_runs(runs: Sequence[TrackedRun], question: Question, stored: Stored | None = None) -> Comparison:
    """Rows for `runs`: one each, or one for those alike in the settings that the question names.

    Raises:
        UserError: a metric, setting or baseline that no run has; the text names the nearest.
    """
    metrics = _known_metrics(runs, question.metrics)
    keys = [key for key in settings_of(runs) if len({run.params.get(key) for run in runs}) > 1]
    grouped = question.mean or bool(question.by)
    if grouped:
        chosen = [_setting(runs, name) for name in question.by] or [key for key in keys if key != SEED]
        groups, lines = shared(runs, chosen)
        keys = chosen
    else:
        groups, lines = separate(runs, keys), []
    if stored is not None:
        groups = [replace(group, stored=stored) for group in groups]
    shown = [run for group in groups for run in group.runs]
    lines += [*incomparable(shown, ignore=[_setting(runs, name) for name in question.by]), *_lacking(shown, metrics)]
    groups = _sorted(groups, question.sort, metrics, runs)
    baseline = _baseline(groups, question.baseline) if question.baseline is not None else None
    return Comparison(metrics, tuple(keys), tuple(groups), grouped, baseline, tuple(lines))


def _known_metrics(runs: Sequence[TrackedRun], asked: Sequence[str]) -> tuple[str, ...]:
    known = {name for run in runs for name in run.metrics}
    for name in asked:
        if name not in known and runs:
            raise UserError(f"--metric {name}: no run has it; {nearest(name, known)}")
    return tuple(asked) or tuple(name for name in METRICS if name in known)


def _setting(runs: Sequence[TrackedRun], name: str) -> str:
    """The full key of a setting that is given by it, or by its last parts."""
    keys = settings_of(runs)
    found = [key for key in keys if key == name] or [key for key in keys if key.endswith(f".{name}")]
    if len(found) != 1:
        hint = f"it may be {' or '.join(found)}" if found else nearest(name, keys).partition(" there are:")[0]
        raise UserError(f"'{name}': no setting of these runs; {hint}" if runs else f"'{name}': there are no runs")
    return found[0]


def incomparable(runs: Sequence[TrackedRun], ignore: Sequence[str] = ()) -> list[str]:
    """A line for each thing in which runs differ, so that their figures do not mean the same; and unfinished runs."""
    lines = []
    for what, find in COMPARABLE.items():
        having: dict[str, list[str]] = {}
        for run in runs:
            if (value := find(run)) is not None:
                having.setdefault(value, []).append(run.name)
        if len(having) > 1 and what not in ignore:
            parts = "; ".join(f"{value[:40]}: {some(names)}" for value, names in having.items())
            lines.append(f"{what} differs between these runs, so their figures do not compare: {parts}")
    if unfinished := [run.name for run in runs if run.status != "FINISHED"]:
        lines.append(f"not finished, with the figures of the step they reached: {some(unfinished)}")
    return lines


def _lacking(runs: Sequence[TrackedRun], metrics: Sequence[str]) -> list[str]:
    finished = [run for run in runs if run.status == "FINISHED"]
    found = {metric: [run.name for run in finished if metric not in run.metrics] for metric in metrics}
    return [f"without {metric}: {some(names)}" for metric, names in found.items() if names]


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
    if not any(name == key or name.endswith(f".{key}") for name in settings_of(runs)):
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
