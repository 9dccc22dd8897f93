"""How sure a figure is: intervals over seeds and over videos, and paired tests between two kinds of runs.

Numbers in, numbers out, by numpy alone: of Student's t and the binomial distribution what is needed is here, and the
tests compare it with scipy. `nan` stands for what so few values do not determine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

CONFIDENCE = 0.95
#: Resamplings of a bootstrap, and how many numbers are drawn at once (memory).
DRAWS, CHUNK = 5000, 1 << 21

#: What each test presumes, in words for people.
ASSUMPTIONS = {
    "t": "t interval: the seeds are independent, and a figure is about normally distributed over seeds",
    "bootstrap": "bootstrap interval: the videos are a random sample of those that the model is meant for; it covers "
    "the choice of videos, not of seeds",
    "paired t": "paired t test: runs are paired by seed, pairs are independent, and the differences are about normally "
    "distributed; p is not corrected for the number of comparisons",
    "mcnemar": "McNemar's exact test: each video or segment is judged by both runs, independently of the others; "
    "segments of one video are not independent, so that for them p is too small",
}


@dataclass(frozen=True)
class Interval:
    """mean, and the interval around it; low and high are nan where `count` values do not determine them."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def half(self) -> float:
        """Half of its width: the figure behind the `±`."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class PairedTest:
    """The mean difference (a - b) over pairs, its interval, and the two-sided p of no difference."""

    difference: Interval
    p: float


@dataclass(frozen=True)
class McNemar:
    """How often two runs were right on the same items, and the exact two-sided p of equally many errors."""

    both: int
    only_first: int
    only_second: int
    neither: int
    p: float


def t_interval(values: Sequence[float] | Array, confidence: float = CONFIDENCE) -> Interval:
    """Of the mean, by Student's t with n - 1 degrees of freedom. values: [n], one for each seed; n >= 1."""
    points = np.asarray(values, np.float64)
    mean, count = float(points.mean()), len(points)
    if count < 2:
        return Interval(mean, math.nan, math.nan, count)
    half = t_quantile((1 + confidence) / 2, count - 1) * float(points.std(ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def bootstrap_interval(
    parts: Array, totals: Array, confidence: float = CONFIDENCE, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Of sum(parts) / sum(totals), by the percentile bootstrap over videos.

    Args:
        parts, totals: [V], of each video: as right segments, and all of them.
    """
    sums = _resampled(np.stack([parts, totals], axis=1), draws, seed)
    return _percentiles(share_of(parts, totals), _ratio(sums[:, 0], sums[:, 1]), confidence, len(parts))


def bootstrap_difference(
    first: Array,
    first_totals: Array,
    second: Array,
    second_totals: Array,
    confidence: float = CONFIDENCE,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Of sum(first) / sum(first_totals) - sum(second) / sum(second_totals), by the percentile bootstrap.

    Args:
        first, second: [V], of the same videos in the same order: each draw takes the same for both. first_totals,
            second_totals: [V]; those of the two need not be equal.
    """
    value = share_of(first, first_totals) - share_of(second, second_totals)
    sums = _resampled(np.stack([first, first_totals, second, second_totals], axis=1), draws, seed)
    shares = _ratio(sums[:, 0], sums[:, 1]) - _ratio(sums[:, 2], sums[:, 3])
    return _percentiles(value, shares, confidence, len(first))


def paired_test(first: Sequence[float] | Array, second: Sequence[float] | Array) -> PairedTest:
    """The paired t test. first, second: [n], of the same seeds in the same order; n >= 1."""
    differences = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    interval = t_interval(differences)
    if interval.count < 2:
        return PairedTest(interval, math.nan)
    error = float(differences.std(ddof=1)) / math.sqrt(interval.count)
    if error == 0:
        return PairedTest(interval, 1.0 if interval.mean == 0 else 0.0)
    return PairedTest(interval, 2 * t_tail(abs(interval.mean) / error, interval.count - 1))


def paired_by_seed(first: Mapping[str, float], second: Mapping[str, float]) -> PairedTest | None:
    """`paired_test` of the seeds that both have; None where there is none. Keys: seeds."""
    seeds = sorted(first.keys() & second.keys())
    return paired_test([first[s] for s in seeds], [second[s] for s in seeds]) if seeds else None


def mcnemar(first: Array, second: Array) -> McNemar:
    """first, second: [n] bool, whether each run was right on the same n items."""
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    p = binomial_two_sided(min(only_first, only_second), only_first + only_second)
    return McNemar(int((a & b).sum()), only_first, only_second, int((~a & ~b).sum()), p)


def share_of(parts: Array, totals: Array) -> float:
    """sum(parts) / sum(totals); nan of nothing."""
    total = float(np.sum(totals))
    return float(np.sum(parts)) / total if total else math.nan


def binomial_two_sided(successes: int, trials: int) -> float:
    """Twice the probability of at most so many successes of fair trials, at most 1."""
    if not trials:
        return 1.0
    k = np.arange(successes + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])
    logs = log_factorial[trials] - log_factorial[k] - log_factorial[trials - k] - trials * math.log(2)
    return float(min(1.0, 2 * np.exp(logs).sum()))


def t_tail(t: float, degrees: float) -> float:
    """P(T > t) for t >= 0, of Student's t."""
    return 0.5 * _incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


def t_quantile(share: float, degrees: float) -> float:
    """The t below which `share` (0.5 to 1) of Student's t lies."""
    low, high = 0.0, 1.0
    while t_tail(high, degrees) > 1 - share:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, degrees) > 1 - share else (low, middle)
        if high - low <= 1e-14 * high:
            break
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularized, by its continued fraction (Numerical Recipes, 6.4)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )  # fmt: skip
    if x < (a + 1) / (a + b + 2):
        return front * _fraction(a, b, x) / a
    return 1 - front * _fraction(b, a, 1 - x) / b


def _fraction(a: float, b: float, x: float) -> float:
    """Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1), tiny)
    value = d
    for m in range(1, 1000):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _away_from_zero(1 + step * d, tiny)
            c = _away_from_zero(1 + step / c, tiny)
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value


def _away_from_zero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny


def _resampled(columns: Array, draws: int, seed: int) -> npt.NDArray[np.float64]:
    """The sums of [V, C] over each draw of V rows, with replacement. [draws, C]

    Equal rows are one kind, and how often each kind is drawn is multinomial. As a video has few segments,
    there are few kinds, and the cost does not grow with the number of videos.
    """
    kinds, counts = np.unique(np.asarray(columns, np.float64), axis=0, return_counts=True)
    random, sums, total = np.random.default_rng(seed), [], int(counts.sum())
    each = max(1, CHUNK // max(1, len(kinds)))
    for start in range(0, draws if total else 0, each):
        size = min(each, draws - start)
        sums.append(random.multinomial(total, counts / total, size=size) @ kinds)
    return np.concatenate(sums) if sums else np.full((1, kinds.shape[1]), np.nan)


def _ratio(parts: Array, totals: Array) -> npt.NDArray[np.float64]:
    """nan where the total is 0."""
    ratio: npt.NDArray[np.float64] = parts / np.where(totals > 0, totals, np.nan)
    return ratio


def _percentiles(value: float, shares: npt.NDArray[np.float64], confidence: float, count: int) -> Interval:
    if count < 2:
        return Interval(value, math.nan, math.nan, count)
    low, high = np.nanquantile(shares, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high), count)
