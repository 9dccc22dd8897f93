"""What a training leaves at its end: its page and pictures, also of many videos and without matplotlib."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from cpsp_dist.metrics.predictions import Predictions
from cpsp_dist.report import run_files as module
from cpsp_dist.report.answers import calibrate, measure, recall_by_length
from cpsp_dist.report.collect import collect, stored_answers
from cpsp_dist.report.run_files import run_files
from cpsp_dist.report.run_page import run_page
from cpsp_dist.training.evaluate import evaluate_run
from cpsp_dist.utils import extras
from tests.support.models import untrained_run

pytestmark = pytest.mark.long
PICTURES = ["accuracy_by_segment.png", "confusion.png", "f1_by_category.png", "timelines.png"]


@pytest.fixture(scope="module")
def run(keypad_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ended") / "run"
    untrained_run(keypad_shards, folder)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss/total": 1.0}\n')
    found: list[Predictions] = []
    evaluate_run(str(folder), "test", answers=found)
    found[0].save(folder / "predictions_test.npz")
    return folder


def test_stored_predictions_are_the_same_answers(run: Path) -> None:
    asked, stored = collect(run).answers, stored_answers(run / "predictions_test.npz", 1.0)
    order = [stored.keys.index(key) for key in asked.keys]  # stored ones are sorted by key
    assert sorted(order) == [*range(16)]
    assert np.array_equal(stored.labels[order], asked.labels)
    assert measure(stored) == measure(asked)
    assert recall_by_length(stored) == recall_by_length(asked)
    assert stored.probability[order] == pytest.approx(asked.probability, abs=1e-6)
    assert stored.category_probability.max(1)[order] == pytest.approx(asked.category_probability.max(1), abs=1e-6)
    expected = calibrate(asked.probability, asked.truth_event).error
    assert calibrate(stored.probability, stored.truth_event).error == pytest.approx(expected)


def test_a_page_of_many_videos_asks_for_the_examples_alone(run: Path) -> None:
    data, complete = collect(run, most=3), collect(run)
    assert data.results == complete.results
    affinity = {complete.answers.keys[each.row]: each.affinity for each in complete.examples}
    found = {data.answers.keys[each.row]: each.affinity for each in data.examples}
    assert len(found) == 12
    assert len(found.keys() & affinity.keys()) >= 8, "all but some of those with equally many errors"
    for key in found.keys() & affinity.keys():
        assert found[key] == pytest.approx(affinity[key])
    titles = [section.title for section in run_page(data).sections if section.parts]
    assert "Embeddings" not in titles
    assert "left out" in run_page(data).sections[0].note
    assert "left out" not in run_page(complete).sections[0].note


def test_page_and_pictures(run: Path) -> None:
    files = run_files(run)
    assert [file.relative_to(run).as_posix() for file in files[:1]] == ["report.html"]
    assert sorted(file.relative_to(run).as_posix() for file in files[1:]) == [f"figures/{name}" for name in PICTURES]
    assert all(file.stat().st_size > 1000 for file in files)
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files[1:])


def test_without_matplotlib_the_page_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda module: None)
    with caplog.at_level(logging.INFO):
        assert run_files(run) == [run / "report.html"]
    (line,) = [record.message for record in caplog.records if record.name == module.__name__]
    assert "needs matplotlib" in line
    assert "pip install 'cpsp-dist[report]'" in line


def test_what_cannot_be_made_is_reported(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A training has ended well all the same."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "predictions_test.npz").write_bytes(b"damaged")
    assert run_files(tmp_path / "run") == []
    first, second = caplog.messages
    assert first.startswith(f"{tmp_path}/run: no page of the run: ")
    assert second.startswith(f"{tmp_path}/run: no pictures of the run: ")
