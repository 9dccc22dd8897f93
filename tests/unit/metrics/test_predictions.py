"""Predictions make the metrics again, and survive their file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cpsp_dist.data.batch import Batch
from cpsp_dist.metrics import METRICS
from cpsp_dist.metrics.predictions import FROM_PREDICTIONS, Predictions, format_of, joined
from cpsp_dist.models.layers import Output
from cpsp_dist.utils.errors import DataError, UserError
from tests.support.mutations import damaged


def made(videos: int = 30, seed: int = 0) -> Predictions:
    random = np.random.default_rng(seed)
    keys = np.array([f"k{n:03}" for n in random.permutation(1000)[:videos]])
    event, probability = random.random((videos, 10)) < 0.6, random.random((videos, 10), np.float32)
    category, answer = random.integers(0, 4, videos), random.integers(0, 4, videos)
    return Predictions("test", 7, list("abcd"), keys, category, event, answer, probability[:, 0], probability)


def test_they_make_the_metrics() -> None:
    found = made()
    logits = torch.nn.functional.one_hot(torch.from_numpy(found.answer), 4).float()
    event_logits = torch.from_numpy(found.event_probability).double().logit()
    size = len(found)
    empty = torch.zeros(size)
    output = Output(event_logits, logits, None, empty, empty, empty, empty, None)
    event, category = torch.from_numpy(found.event), torch.from_numpy(found.category)
    batch = Batch(empty, empty, event, category, torch.ones(size, dtype=torch.bool), empty, empty)
    results = {}
    for kind in METRICS.values():
        metric = kind(found.categories, 10)
        metric.update(output, batch)
        results |= metric.result()
    for name in FROM_PREDICTIONS:
        parts, totals = found.parts(name)
        assert parts.sum() / totals.sum() == pytest.approx(results[name], abs=1e-12), name


def test_parts_of_ranks_are_joined_in_one_order() -> None:
    found = made()
    cut = [made_part(found, slice(start, None, 3)) for start in range(3)]
    one, other = joined(cut), joined([found])
    assert one.key.tolist() == other.key.tolist() == sorted(found.key)
    assert (one.event_probability == other.event_probability).all()


def made_part(found: Predictions, rows: slice) -> Predictions:
    arrays = [each[rows] for each in (found.key, found.category, found.event, found.answer, found.probability)]
    return Predictions(found.split, found.step, found.categories, *arrays, found.event_probability[rows])


def test_files(tmp_path: Path) -> None:
    found = made()
    for form in ("npz", "jsonl", "csv"):
        found.save(tmp_path / f"p.{form}", format_of(tmp_path / f"p.{form}", None))
    again = Predictions.load(tmp_path / "p.npz")
    assert (again.split, again.step, again.categories) == ("test", 7, list("abcd"))
    assert (again.label == found.label).all()
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [np.float32(line["event_probability"]).tolist() for line in lines] == found.event_probability.tolist()
    assert [line["truth"]["event"] for line in lines] == found.event.astype(int).tolist()
    header, *rows = (tmp_path / "p.csv").read_text().splitlines()
    assert header.startswith("video,category,probability")
    assert [row.split(",")[0] for row in rows] == found.key.tolist()
    with pytest.raises(UserError, match="give --format, one of jsonl, csv, npz"):
        format_of(tmp_path / "p.txt", None)


def test_a_damaged_file_is_one_error(tmp_path: Path) -> None:
    file = tmp_path / "p.npz"
    made().save(file)
    content = file.read_bytes()
    for other in (b"", content[:300], content[:-40], b"x" * 500):
        file.write_bytes(other)
        with pytest.raises(DataError, match="evaluate the run again"):
            Predictions.load(file)


def test_every_damage_is_found_or_harmless(tmp_path: Path) -> None:
    """A flipped byte of a compressed array is an error of zlib, one of the zip's directory another kind of zip."""
    file = tmp_path / "p.npz"
    made().save(file)
    stored = Predictions.load(file)
    refused = 0
    for content in damaged(file.read_bytes(), seed=1, count=150):
        file.write_bytes(content)
        try:
            found = Predictions.load(file)
        except DataError:
            refused += 1
        else:
            for name in ("key", "category", "event", "answer", "probability", "event_probability"):
                assert (getattr(found, name) == getattr(stored, name)).all()
    assert refused > 50


def test_a_category_without_a_name(tmp_path: Path) -> None:
    file = tmp_path / "p.npz"
    dataclasses.replace(made(), categories=list("abc")).save(file)
    with pytest.raises(DataError, match="a category without a name"):
        Predictions.load(file)
