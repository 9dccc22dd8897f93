"""A model's answers for the videos of a split: what the metrics are made of, kept so that others can be made later.

By numpy alone. Shape letters: V videos, T segments, K categories (label K is background).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from cpsp_dist.utils import files
from cpsp_dist.utils.errors import DataError, UserError
from cpsp_dist.utils.input_files import open_input
from cpsp_dist.utils.text import one_line

Array = npt.NDArray[Any]

#: An event's probability has to be above it.
THRESHOLD = 0.5
#: Of the file: another one is refused.
FORMAT_VERSION = 1
_ARRAYS = ("key", "category", "event", "answer", "probability", "event_probability")
#: The metrics whose values follow from predictions: see `Predictions.parts`.
FROM_PREDICTIONS = ("accuracy", "event_accuracy", "boundary_f1")


@dataclass(frozen=True)
class Predictions:
    """Rows in the order of the sample table, each video once.

    Attributes:
        split, step: which videos, and of which step the weights were.
        categories: names, in class order. key: [V] the videos' keys.
        category: [V] int64, the true one; -1 where it is not known. event: [V, T] bool, the truth.
        answer: [V] int64, the likeliest category. probability: [V] float32, how likely it is.
        event_probability: [V, T] float32; above `THRESHOLD` the answer is an event.
    """

    split: str
    step: int
    categories: list[str]
    key: Array
    category: Array
    event: Array
    answer: Array
    probability: Array
    event_probability: Array

    def __len__(self) -> int:
        return len(self.key)

    @property
    def truth(self) -> Array:
        """[V, T] int64: the label of each segment, K for background."""
        return np.where(self.event, self.category[:, None], len(self.categories))

    @property
    def label(self) -> Array:
        """[V, T] int64: the label that each segment was given."""
        return np.where(self.event_probability > THRESHOLD, self.answer[:, None], len(self.categories))

    def parts(self, metric: str) -> tuple[Array, Array]:
        """[V] and [V]: for each video what counts as right and out of how many; the metric is the ratio of the sums.

        metric: of `FROM_PREDICTIONS`.
        """
        answered = self.event_probability > THRESHOLD
        if metric == "boundary_f1":
            truth, found = np.diff(self.event.astype(int)) != 0, np.diff(answered.astype(int)) != 0
            return 2 * (truth & found).sum(1), truth.sum(1) + found.sum(1)
        right = answered == self.event if metric == "event_accuracy" else self.label == self.truth
        return right.sum(1), np.full(len(self), right.shape[1])

    def save(self, file: Path, form: str = "npz") -> None:
        """Write `file`. form: of `FORMATS`. Raises OSError."""
        with files.replacing(file) as part, open(part, "wb") as stream:
            FORMATS[form](self, stream)

    @staticmethod
    def load(file: Path) -> Predictions:
        """Of an `npz` file. Raises DataError."""
        try:
            with open_input(file) as stream, np.load(stream, allow_pickle=False) as content:
                about = json.loads(str(content["about"]))
                arrays = {name: content[name] for name in _ARRAYS}
            if about.pop("format") != FORMAT_VERSION:
                raise ValueError("another format")
            found = Predictions(**about, **arrays)
            _require_rows(found)
        except DataError:
            raise
        except Exception as error:  # numpy, zipfile and zlib raise all sorts where a file is damaged
            reason = one_line(error)[:150] or repr(error)
            raise DataError(
                f"{file}: no predictions of `cpsp-dist evaluate` ({reason}); evaluate the run again"
            ) from None
        return found


def _require_rows(found: Predictions) -> None:
    """Raises ValueError where the arrays do not fit each other and the categories."""
    videos, known = len(found), len(found.categories)
    flat = (found.key, found.category, found.answer, found.probability)
    segments = (found.event, found.event_probability)
    if {each.shape for each in flat} != {(videos,)} or {each.shape[:1] for each in segments} != {(videos,)}:
        raise ValueError("arrays of other lengths")
    if found.event.ndim != 2 or found.event.shape != found.event_probability.shape:
        raise ValueError("events and their probabilities of other shapes")
    if ((found.answer < 0) | (found.answer >= known) | (found.category < -1) | (found.category >= known)).any():
        raise ValueError("a category without a name")


def joined(parts: Sequence[Predictions]) -> Predictions:
    """Those of several ranks as one, sorted by `key`."""
    first = parts[0]
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS}
    order = np.argsort(arrays["key"], kind="stable")
    rows = {name: array[order] for name, array in arrays.items()}
    return Predictions(first.split, first.step, first.categories, **rows)


def format_of(file: Path, form: str | None) -> str:
    """`form`, or that of the suffix. Raises UserError where there is none of it."""
    found = form or file.suffix[1:]
    if found not in FORMATS:
        raise UserError(f"--predictions {file}: give --format, one of {', '.join(FORMATS)}, or such a suffix")
    return found


def _npz(found: Predictions, stream: IO[bytes]) -> None:
    about = {"format": FORMAT_VERSION, "split": found.split, "step": found.step, "categories": found.categories}
    arrays = {name: getattr(found, name) for name in _ARRAYS}
    np.savez_compressed(stream, about=np.array(json.dumps(about)), **arrays)


def _rows(found: Predictions) -> Iterator[dict[str, Any]]:
    names = found.categories
    for row in range(len(found)):
        category = int(found.category[row])
        yield {
            "video": str(found.key[row]),
            "category": names[int(found.answer[row])],
            "probability": float(found.probability[row]),
            "event_probability": [float(p) for p in found.event_probability[row]],
            "truth": {
                "category": names[category] if category >= 0 else None,
                "event": found.event[row].astype(int).tolist(),
            },
        }


def _jsonl(found: Predictions, stream: IO[bytes]) -> None:
    for row in _rows(found):
        stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _csv(found: Predictions, stream: IO[bytes]) -> None:
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["video", "category", "probability", "event_probability", "true_category", "true_event"])
    for row in _rows(found):
        truth = row["truth"]
        lists = [
            " ".join(map(repr, row["event_probability"])),
            truth["category"] or "",
            " ".join(map(str, truth["event"])),
        ]
        writer.writerow([row["video"], row["category"], repr(row["probability"]), *lists])
    text.flush()
    text.detach()


FORMATS: dict[str, Callable[[Predictions, IO[bytes]], None]] = {"jsonl": _jsonl, "csv": _csv, "npz": _npz}
