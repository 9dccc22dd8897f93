"""Intervals and tests against scipy."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import scipy  # imports its parts when first used

from cpsp_dist.metrics import statistics


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's, about samples of equal values
        yield


@pytest.mark.parametrize("count", [2, 3, 5, 30, 400])
def test_t_intervals_and_paired_tests_are_scipys(count: int) -> None:
    random = np.random.default_rng(count)
    first, second = random.normal(70, 2, count), random.normal(69.5, 2, count)
    found = statistics.t_interval(first)
    low, high = scipy.stats.t.interval(0.95, count - 1, loc=first.mean(), scale=scipy.stats.sem(first))
    assert (found.mean, found.low, found.high) == pytest.approx((first.mean(), low, high), rel=1e-11)
    assert found.half == pytest.approx((high - low) / 2)
    pair, oracle = statistics.paired_test(first, second), scipy.stats.ttest_rel(first, second)
    interval = oracle.confidence_interval(0.95)
    assert pair.p == pytest.approx(oracle.pvalue, rel=1e-10)
    assert (pair.difference.low, pair.difference.high) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_t_is_scipys_from_one_degree_of_freedom_to_a_million() -> None:
    for degrees in (1, 2, 7, 100, 1e6):
        for t in (0, 1e-9, 0.3, 2, 40):
            assert statistics.t_tail(t, degrees) == pytest.approx(scipy.stats.t.sf(t, degrees), rel=1e-9, abs=1e-300)
        for share in (0.6, 0.9, 0.975, 0.9995):
            assert statistics.t_quantile(share, degrees) == pytest.approx(scipy.stats.t.ppf(share, degrees), rel=1e-9)


def test_few_or_equal_values() -> None:
    alone = statistics.t_interval([3.0])
    assert (alone.mean, alone.count) == (3.0, 1)
    assert math.isnan(alone.low)
    assert math.isnan(statistics.paired_test([3.0], [2.0]).p)
    assert statistics.paired_test([3.0, 4.0], [3.0, 4.0]).p == 1.0
    assert statistics.paired_test([3.0, 4.0], [2.0, 3.0]).p == 0.0
    assert statistics.paired_by_seed({"1": 2.0}, {"2": 2.0}) is None
    paired = statistics.paired_by_seed({"1": 2.0, "2": 4.0, "9": 0.0}, {"2": 3.0, "1": 1.5, "8": 7.0})
    assert paired is not None
    assert (paired.difference.mean, paired.difference.count) == (0.75, 2)


def test_the_bootstrap_over_videos_is_scipys() -> None:
    random = np.random.default_rng(3)
    totals = random.integers(5, 11, 300)
    right = random.binomial(totals, random.beta(4, 2, 300))
    found = statistics.bootstrap_interval(right, totals, draws=5000)
    oracle = scipy.stats.bootstrap(
        (right, totals),
        lambda x, n, axis: x.sum(axis=axis) / n.sum(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=5000,
        random_state=1,
    ).confidence_interval
    assert found.mean == right.sum() / totals.sum()
    width = oracle.high - oracle.low
    assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high), abs=0.06 * width)
    again = statistics.bootstrap_interval(right, totals, draws=5000)
    assert again == found
    # A constant gain in every video: no uncertainty about the difference, though there is about each.
    gain = statistics.bootstrap_difference(right + 0.1 * totals, totals, right, totals, draws=200)
    assert (gain.low, gain.high) == pytest.approx((0.1, 0.1))
    assert math.isnan(statistics.bootstrap_interval(right[:1], totals[:1]).low)


def test_the_bootstrap_of_a_difference_takes_each_sides_totals() -> None:
    """As of boundary_f1, where the totals count what each run found."""
    random = np.random.default_rng(7)
    totals, other_totals = random.integers(5, 11, 60), random.integers(2, 5, 60)
    right, other = random.binomial(totals, 0.8), random.binomial(other_totals, 0.6)
    found = statistics.bootstrap_difference(right, totals, other, other_totals, draws=4000)
    assert found.mean == right.sum() / totals.sum() - other.sum() / other_totals.sum()
    drawn = []
    for _ in range(4000):
        videos = random.choice(60, 60)
        own = sum(right[videos]) / sum(totals[videos])
        drawn.append(own - sum(other[videos]) / sum(other_totals[videos]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06 * (high - low))


@pytest.mark.timing
def test_the_bootstrap_of_a_large_split_is_cheap() -> None:
    """Of 20 rows and their differences to a baseline, each of 20,216 videos, by CPU seconds: 200 in a minute. Drawing
    each video took 17 s of 10 rows."""
    random = np.random.default_rng(11)
    totals = np.full(20216, 10)
    rows = [random.binomial(10, random.beta(4, 2, 20216)) for _ in range(20)]
    began = time.process_time()
    for row in rows:
        statistics.bootstrap_interval(row, totals)
        statistics.bootstrap_difference(row, totals, rows[0], totals)
    assert time.process_time() - began < 6


def test_mcnemar_is_scipys_binomial_test() -> None:
    random = np.random.default_rng(5)
    for size in (0, 1, 40, 3000):
        first, second = random.random(size) < 0.8, random.random(size) < 0.7
        found = statistics.mcnemar(first, second)
        assert found.both + found.only_first + found.only_second + found.neither == size
        assert found.only_first == sum(a and not b for a, b in zip(first, second, strict=True))
        if trials := found.only_first + found.only_second:
            assert found.p == pytest.approx(scipy.stats.binomtest(found.only_first, trials).pvalue, rel=1e-9)
