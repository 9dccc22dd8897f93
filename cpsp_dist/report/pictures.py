"""Pictures of stored predictions, for places that show no page: MLflow's artifacts, slides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cpsp_dist.metrics.predictions import THRESHOLD, Predictions
from cpsp_dist.report.comparison_figures import f1_by_label

#: Videos in the picture of timelines, those with most errors.
WORST = 20
#: Of so many labels each still has its name beside an axis.
NAMED = 160


def draw_pictures(found: Predictions, folder: Path) -> list[Path]:
    """PNG files in `folder`: confusion of labels, F1 by category, accuracy at each segment, timelines of the worst.

    Needs matplotlib. Raises OSError.
    """
    import matplotlib

    drawn = {"confusion": _confusion, "f1_by_category": _f1, "accuracy_by_segment": _segments, "timelines": _timelines}
    folder.mkdir(exist_ok=True)
    with matplotlib.rc_context({"text.parse_math": False}):  # a $ of a name is one
        for name, draw in drawn.items():
            draw(found).savefig(folder / f"{name}.png", dpi=80, bbox_inches="tight")
    return [folder / f"{name}.png" for name in drawn]


def _picture(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    picture = Figure(figsize=(width, height))
    return picture, picture.add_subplot()


def _names(found: Predictions) -> list[str]:
    return [*found.categories, "background"]


def _confusion(found: Predictions) -> Any:
    names = _names(found)
    size = len(names)
    counts = np.bincount(found.truth.ravel() * size + found.label.ravel(), minlength=size * size).reshape(size, size)
    side = min(24.0, 4 + 0.22 * size)
    picture, axes = _picture(side + 1, side)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    drawn = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    picture.colorbar(drawn, ax=axes, label="share of the label's segments", shrink=0.8)
    if size <= NAMED:
        axes.set_xticks(range(size), names, rotation=90, fontsize=8)
        axes.set_yticks(range(size), names, fontsize=8)
    axes.set(xlabel="predicted as", ylabel="label", title=f"Confusion of labels on {found.split}")
    return picture


def _f1(found: Predictions) -> Any:
    names, shares = _names(found), f1_by_label(found)
    segments = np.bincount(found.truth.ravel(), minlength=len(names))
    order = np.argsort(shares, kind="stable")
    picture, axes = _picture(8, min(30.0, 1.5 + 0.2 * len(names)))
    axes.barh(range(len(names)), shares[order], color="tab:blue")
    axes.set_yticks(range(len(names)), [f"{names[k]} ({segments[k]:,})" for k in order], fontsize=8)
    axes.set(
        xlim=(0, 1), ylim=(-0.6, len(names) - 0.4), xlabel="F1", title=f"F1 by category on {found.split} (segments)"
    )
    return picture


def _segments(found: Predictions) -> Any:
    picture, axes = _picture(8, 4)
    right = (found.label == found.truth).mean(0)
    always = (found.event & (found.answer == found.category)[:, None]).mean(0)
    place = np.arange(1, len(right) + 1)
    axes.plot(place, 100 * right, marker="o", label="this model")
    axes.plot(place, 100 * always, marker="o", ls="--", color="tab:gray", label="an event everywhere")
    axes.set(xlabel="segment", ylabel="accuracy, %", ylim=(0, 100), xticks=place, title=f"Accuracy on {found.split}")
    axes.legend()
    return picture


def _timelines(found: Predictions) -> Any:
    """Three rows of cells for each video: probability, truth, nothing."""
    errors = (found.label != found.truth).sum(1)
    worst = np.argsort(-errors, kind="stable")[:WORST]
    segments, probability, truth = found.event.shape[1], found.event_probability[worst], found.event[worst]
    cells = np.ones((len(worst), 3, segments, 3))
    cells[:, 0] = 1 - probability[..., None] * (1 - np.array([0.9, 0.4, 0.0]))  # white to orange
    cells[:, 1] = np.where(truth[..., None], [0.1, 0.5, 0.2], [0.94, 0.94, 0.94])
    picture, axes = _picture(10, 1.4 + 0.45 * len(worst))
    axes.imshow(cells.reshape(-1, segments, 3), aspect="auto", interpolation="nearest")
    video, at = np.nonzero(probability > THRESHOLD)
    axes.plot(at, 3 * video, ".", color="black", ms=4)
    names = _names(found)
    texts = [
        f"{found.key[row]}: {names[found.category[row]] if found.category[row] >= 0 else 'no category'}, "
        f"predicted {names[found.answer[row]]}"
        for row in worst
    ]
    axes.set_yticks(3 * np.arange(len(worst)) + 0.5, texts, fontsize=7)
    axes.set(xlabel="segment", xticks=range(segments))
    axes.set_title("Most errors: probability of an event (dot: predicted as one); below it, green: events", fontsize=9)
    return picture
