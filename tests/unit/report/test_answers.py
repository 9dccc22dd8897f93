"""What is worked out from a model's answers, against scikit-learn and plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from cpsp_dist.report.answers import Answers, calibrate, measure, principal_map, recall_by_length, trivial

N, T, K = 40, 6, 3


@pytest.fixture(scope="module")
def answers() -> Answers:
    rng = np.random.default_rng(5)
    event = rng.random((N, T)) < 0.6
    category = np.where(event.any(1), rng.integers(0, K, N), -1)
    return Answers(
        [f"{n:06d}-v{n}" for n in range(N)],
        ["dog", "bell", "car"],
        1.0,
        category.astype(np.int64),
        event,
        rng.normal(size=(N, T)).astype(np.float32),
        rng.normal(size=(N, K)).astype(np.float32),
        rng.normal(size=(N, 8)).astype(np.float32) * np.arange(1, 9, dtype=np.float32),
    )


def test_metrics_of_answers(answers: Answers) -> None:
    results = measure(answers)
    assert results["accuracy"] == pytest.approx((answers.labels == answers.truth).mean())
    assert results["event_accuracy"] == pytest.approx(((answers.labels < K) == answers.truth_event).mean())
    assert np.sum(results["confusion"]) == N * T
    assert answers.errors.sum() == (answers.labels != answers.truth).sum()


def test_trivial_answers_reach_the_baselines(answers: Answers) -> None:
    """The metric states what they reach; here they are evaluated."""
    expected = measure(answers)["baselines"]
    majority, always = trivial(answers).values()
    assert measure(majority)["accuracy"] == pytest.approx(expected["majority_label"]["accuracy"])
    assert measure(always)["accuracy"] == pytest.approx(expected["always_event"]["accuracy"])
    assert measure(always)["event_accuracy"] == pytest.approx(answers.truth_event.mean())


def test_calibration(answers: Answers) -> None:
    found = calibrate(answers.probability, answers.truth_event)
    pairs = [*zip(answers.probability.ravel().tolist(), answers.truth_event.ravel().tolist(), strict=True)]
    error = 0.0
    for number in range(10):
        own = [pair for pair in pairs if number / 10 <= pair[0] < (number + 1) / 10]
        assert found.count[number] == len(own)
        if own:
            mean, share = (sum(each) / len(own) for each in zip(*own, strict=True))
            assert (found.probability[number], found.right[number]) == pytest.approx((mean, share))
            error += len(own) * abs(mean - share) / len(pairs)
    assert found.error == pytest.approx(error)
    assert calibrate(np.ones(3), np.ones(3, dtype=bool)).count.tolist() == [0] * 9 + [3]


def test_recall_by_length(answers: Answers) -> None:
    found = {each.length: each for each in recall_by_length(answers)}
    for length in range(1, T + 1):
        own = [n for n in range(N) if answers.truth_event[n].sum() == length]
        segments = [(n, t) for n in own for t in range(T) if answers.truth_event[n, t]]
        hits = [(n, t) for n, t in segments if answers.labels[n, t] < K]
        right = [(n, t) for n, t in hits if answers.labels[n, t] == answers.truth_category[n]]
        assert found[length].videos == len(own)
        assert found[length].found == pytest.approx(len(hits) / len(segments))
        assert found[length].right == pytest.approx(len(right) / len(segments))


def test_map_is_pca(answers: Answers) -> None:
    from sklearn.decomposition import PCA

    points, shares = principal_map(answers.embedding)
    expected = PCA(2).fit(answers.embedding.astype(float))
    assert shares == pytest.approx(expected.explained_variance_ratio_)
    assert np.abs(points) == pytest.approx(np.abs(expected.transform(answers.embedding.astype(float))), abs=1e-6)
