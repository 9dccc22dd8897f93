"""The AVEL metric, counted exactly."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cpsp_dist.data.batch import Batch
from cpsp_dist.metrics import METRICS, reported
from cpsp_dist.metrics.metric import predict
from cpsp_dist.metrics.segments import accuracy, confusion
from cpsp_dist.models import Output
from tests.support.examples import examples

K, T = 3, 4


def random_case(seed: int, size: int) -> tuple[Output, Batch]:
    g = torch.Generator().manual_seed(seed)
    empty = torch.empty(0)
    output = Output(torch.randn(size, T, generator=g), torch.randn(size, K, generator=g), *([empty] * 6))
    event = torch.rand(size, T, generator=g) > 0.5
    category = torch.where(event.any(1), torch.randint(0, K, (size,), generator=g), -1)
    valid = torch.rand(size, generator=g) > 0.3
    zeros = torch.zeros(size, dtype=torch.int64)
    return output, Batch(empty, empty, event, category, valid, zeros, zeros)


@examples(50)
@given(seed=st.integers(0, 2**20), size=st.integers(0, 6))
def test_confusion_equals_sklearn(seed: int, size: int) -> None:
    from sklearn.metrics import confusion_matrix

    output, batch = random_case(seed, size)
    predicted, target = [], []
    for b in range(size):
        if batch.valid[b]:
            for t in range(T):
                target.append(int(batch.category[b]) if batch.event[b, t] else K)
                predicted.append(int(output.category_logits[b].argmax()) if output.event_logits[b, t] > 0 else K)
    counted = confusion(output, batch)
    expected = confusion_matrix(target, predicted, labels=list(range(K + 1))) if target else [[0] * (K + 1)] * (K + 1)
    assert counted.dtype == torch.int64
    assert counted.tolist() == [list(map(int, row)) for row in expected]
    right = sum(p == t for p, t in zip(predicted, target, strict=True))
    assert accuracy(counted) == (right / len(target) if target else 0.0)


def test_counts_of_parts_add_up() -> None:
    output, batch = random_case(3, 6)
    parts = []
    for part in (slice(0, 2), slice(2, 6)):
        fields = {name: value[part] if len(value) else value for name, value in vars(batch).items()}
        tensors = (x[part] if x is not None and len(x) else x for x in output)
        parts.append(confusion(Output(*tensors), Batch(**fields)))
    assert torch.equal(parts[0] + parts[1], confusion(output, batch))


def test_an_event_needs_more_than_half() -> None:
    output, _ = random_case(0, 1)
    output = output._replace(event_logits=torch.tensor([[0.0, 1e-3, -1e-3, 5.0]]))
    category = int(output.category_logits.argmax())
    assert predict(output).tolist() == [[K, category, K, category]]


def evaluated(output: Output, batch: Batch, categories: list[str]) -> dict[str, Any]:
    """The results of all metrics, counted by halves of the batch."""
    metrics = [metric(categories, T) for metric in METRICS.values()]
    for part in (slice(0, len(batch) // 2), slice(len(batch) // 2, None)):
        fields = {name: value[part] if len(value) else value for name, value in vars(batch).items()}
        halved = Output(*(x[part] if x is not None and len(x) else x for x in output))
        for metric in metrics:
            metric.update(halved, Batch(**fields))
    return {name: value for metric in metrics for name, value in metric.result().items()}


@examples(50)
@given(seed=st.integers(0, 2**20), size=st.integers(1, 8))
def test_results_equal_sklearn(seed: int, size: int) -> None:
    from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

    output, batch = random_case(seed, size)
    batch.valid[0] = True
    answer = predict(output)[batch.valid]
    truth = torch.where(batch.event, batch.category[:, None], K)[batch.valid]
    figures = evaluated(output, batch, ["dog", "bell", "car"])
    assert figures["accuracy"] == pytest.approx(accuracy_score(truth.flatten(), answer.flatten()))
    assert figures["event_accuracy"] == pytest.approx(accuracy_score(truth.flatten() == K, answer.flatten() == K))
    for t in range(T):
        assert figures["seconds"][t] == pytest.approx(accuracy_score(truth[:, t], answer[:, t]))
    expected = precision_recall_fscore_support(
        truth.flatten(), answer.flatten(), labels=list(range(K + 1)), zero_division=0
    )
    assert list(figures["categories"]) == ["dog", "bell", "car", "background"]
    for i, shown in enumerate(figures["categories"].values()):
        assert list(shown.values()) == pytest.approx([values[i] for values in expected])
    edges = [[(row[t] == K) != (row[t + 1] == K) for row in labels for t in range(T - 1)] for labels in (truth, answer)]
    assert figures["boundary_f1"] == pytest.approx(f1_score(*edges, zero_division=0))
    assert json.loads(json.dumps(figures)) == figures


def test_results_of_nothing() -> None:
    figures = evaluated(*random_case(0, 0), ["a", "b", "c"])
    assert figures["accuracy"] == figures["event_accuracy"] == figures["boundary_f1"] == 0
    assert figures["categories"]["a"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "segments": 0}


def test_what_is_reported_is_a_share() -> None:
    figures = evaluated(*random_case(5, 8), ["a", "b", "c"])
    assert reported() == ["accuracy", "event_accuracy", "boundary_f1"]
    assert all(0 <= figures[name] <= 1 for name in reported())


def fixed(event: Tensor, category: Tensor, truth_event: Tensor, truth_category: Tensor) -> dict[str, Any]:
    """The results of answers with these logits."""
    output, batch = random_case(0, len(event))
    output = output._replace(event_logits=event, category_logits=category)
    return evaluated(
        output,
        replace(batch, event=truth_event, category=truth_category, valid=torch.ones(len(event), dtype=bool)),
        NAMES,
    )


NAMES = ["dog", "bell", "car"]


def test_trivial_answers_are_flagged() -> None:
    """As weakly supervised runs give them: an event everywhere, so event accuracy is the share of event segments."""
    truth_event = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
    truth_category = torch.tensor([0, 1, 2])
    right = torch.eye(3)
    everywhere = torch.ones(3, T)
    figures = fixed(everywhere, right, truth_event, truth_category)
    assert figures["event_accuracy"] == figures["baselines"]["always_event"]["event_accuracy"] == 0.5
    assert figures["accuracy"] == figures["baselines"]["always_event"]["accuracy"] == 0.5
    assert figures["boundary_f1"] == 0
    assert figures["baselines"]["majority_label"] == {"label": "background", "accuracy": 0.5}
    assert figures["flags"] == [
        "the model never predicts background: its event accuracy is the share of event segments, 50.00 %"
    ]
    assert fixed(-everywhere, right, truth_event, truth_category)["flags"] == ["the model never predicts an event"]
    one = torch.tensor([[0.0, 1.0, 0.0]] * 3)
    mixed = torch.where(truth_event, 1.0, -1.0)
    figures = fixed(mixed, one, truth_event, truth_category)
    assert figures["flags"] == ["the model predicts one category only: 'bell'"]
    assert figures["baselines"]["always_event"]["accuracy"] == 3 / 12
    assert fixed(mixed, right, truth_event, truth_category)["flags"] == []


def test_what_people_read() -> None:
    figures = evaluated(*random_case(5, 8), ["a", "b", "c"])
    lines = [line for metric in METRICS.values() for line in metric.summary(figures)]
    assert lines[0].startswith(f"segment accuracy {100 * figures['accuracy']:.2f} %, of event or background alone")
    assert lines[2].count(" ") == 4 + T, lines
