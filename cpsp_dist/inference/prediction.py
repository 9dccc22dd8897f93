"""What a model predicts for one video, and its forms: JSON lines, CSV, a table."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cpsp_dist.utils.console import table

Floats = npt.NDArray[np.float64]

#: An event's probability has to be above it, as in evaluation.
THRESHOLD = 0.5
_LEVELS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Truth:
    """What is known of a video: its category (None: not known, or none), and event [n] of 0 and 1."""

    category: str | None
    event: list[int]


@dataclass(frozen=True)
class Span:
    """An event: in seconds from the video's begin, `start` included, `end` not; `probability`: of its category."""

    start: float
    end: float
    category: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The answer for one video of n segments.

    Attributes:
        input: what it was predicted for, as it was given.
        video: the video's id: a file's name, or a sample's key.
        category, probability: the likeliest category, and how likely it is, 0 to 1.
        segment_seconds: how long a segment lasts.
        event: [n] probability that the segment is an event, 0 to 1.
        spans: runs of segments whose probability is above `THRESHOLD`, cut where the category changes.
        truth: where it is known.
        attention: [n, H, W] weights of the positions of the picture, where the network has them.
    """

    input: str
    video: str
    category: str
    probability: float
    segment_seconds: float
    event: list[float]
    spans: list[Span]
    truth: Truth | None = None
    attention: npt.NDArray[np.float32] | None = None

    def as_json(self) -> dict[str, Any]:
        """What a JSON line holds."""
        content: dict[str, Any] = {name: getattr(self, name) for name in ("input", "video", "category", "probability")}
        content |= {"segment_seconds": self.segment_seconds, "event_probability": self.event}
        content["spans"] = [vars(span) for span in self.spans]
        if self.truth is not None:
            content["truth"] = vars(self.truth)
        return content


@dataclass(frozen=True)
class Scores:
    """Probabilities for the n segments of a video: event [n], category [n, K]; attention [n, H, W], if there is one."""

    event: Floats
    category: Floats
    attention: npt.NDArray[np.float32] | None


def make_prediction(
    scores: Scores, categories: Sequence[str], name: tuple[str, str], seconds: float, truth: Truth | None
) -> Prediction:
    """name: the input and the video's id. seconds: of a segment.

    A video's category is the likeliest on average over the segments with an event, over all where there is none.
    """
    events = scores.event > THRESHOLD
    mean = scores.category[events if events.any() else slice(None)].mean(axis=0)
    best = int(mean.argmax())
    labels = np.where(events, scores.category.argmax(axis=1), -1)
    spans = []
    for start, end in _runs(labels):
        own = scores.category[start:end].mean(axis=0)
        label = int(labels[start])
        spans.append(Span(start * seconds, end * seconds, categories[label], float(own[label])))
    return Prediction(
        *name,
        category=categories[best],
        probability=float(mean[best]),
        segment_seconds=seconds,
        event=scores.event.tolist(),
        spans=spans,
        truth=truth,
        attention=scores.attention,
    )


def _runs(labels: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """[start, end) of each run of one label that is not -1."""
    cuts = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]
    for start, end in itertools.pairwise(cuts):
        if labels[start] >= 0:
            yield start, end


def spans_text(spans: Iterable[Span], *, categories: bool) -> str:
    """`2-5, 7.5-9`, in seconds; with the category of each where `categories`."""
    return ", ".join(f"{span.start:g}-{span.end:g}" + (f" {span.category}" if categories else "") for span in spans)


def truth_spans(truth: Truth, seconds: float) -> list[Span]:
    """The events of the truth."""
    labels = np.where(np.array(truth.event) > 0, 0, -1)
    return [Span(start * seconds, end * seconds, truth.category or "event", 1.0) for start, end in _runs(labels)]


def json_lines(predictions: Iterable[Prediction]) -> Iterator[str]:
    """A line each, all numbers in full: metrics made of them are those of `cpsp-dist evaluate`."""
    for each in predictions:
        yield json.dumps(each.as_json(), ensure_ascii=False)


COLUMNS = ("input", "video", "category", "probability", "spans", "event_probability")


def csv_lines(predictions: Iterable[Prediction]) -> Iterator[str]:
    """A header, then a row each; spans and probabilities are lists with semicolons and spaces."""
    yield ",".join(COLUMNS)
    for each in predictions:
        text = io.StringIO()
        spans = "; ".join(f"{span.start:g}-{span.end:g} {span.category}" for span in each.spans)
        values = [each.input, each.video, each.category, f"{each.probability:.6g}", spans]
        csv.writer(text, lineterminator="").writerow([*values, " ".join(f"{p:.6g}" for p in each.event)])
        yield text.getvalue()


def table_lines(predictions: Iterable[Prediction]) -> Iterator[str]:
    """For people: event probability as a bar of one character a segment."""
    found = list(predictions)
    if not found:
        return
    known = any(each.truth is not None for each in found)
    rows = []
    for each in found:
        several = len({span.category for span in each.spans}) > 1
        bar = "".join(_LEVELS[min(int(p * len(_LEVELS)), len(_LEVELS) - 1)] for p in each.event)
        row = {"video": each.video, "category": each.category, "probability": f"{each.probability:.2f}"}
        row |= {"events (s)": spans_text(each.spans, categories=several) or "none", "event probability": bar}
        if known:
            row["truth"] = _truth_text(each) if each.truth else "-"
        rows.append(row)
    yield table(rows)


def _truth_text(each: Prediction) -> str:
    assert each.truth is not None
    spans = spans_text(truth_spans(each.truth, each.segment_seconds), categories=False)
    return f"{each.truth.category or 'no category'}: {spans or 'none'}"


FORMATS: dict[str, Callable[[Iterable[Prediction]], Iterator[str]]] = {
    "jsonl": json_lines,
    "csv": csv_lines,
    "table": table_lines,
}
