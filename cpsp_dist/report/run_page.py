"""The page about one run."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from cpsp_dist import __version__
from cpsp_dist.config import flat
from cpsp_dist.data.encoders import encoder_text
from cpsp_dist.metrics import reported
from cpsp_dist.report import answer_figures, charts
from cpsp_dist.report.collect import Example, RunData
from cpsp_dist.report.frames import attended
from cpsp_dist.report.page import Choice, Column, Facts, Figure, Page, PageSection, Picture, Table
from cpsp_dist.utils.redact import without_secrets

#: Groups of the logged values: title, prefix or names, what they are.
CURVES = (
    ("Accuracy on val", ("accuracy/val",), "percent"),
    ("Gradient norm", ("grad_norm",), "norm"),
    ("Learning rate", ("learning_rate",), "rate"),
    ("Videos per second", ("videos_per_second",), "videos/s"),
    ("Share of time spent waiting for data", ("data_wait_share",), "share"),
)


#: Seconds since 1970 up to the year 9999; what is above is no time.
LAST_TIME = 253_402_300_800
#: Tags of the run in MLflow that say what it ran on, and how often it was started again.
OF_THE_MACHINE = ("host", "nodes", "device", "launcher", "restarts", "command", "version.torch", "git.commit")


def run_page(data: RunData) -> Page:
    """What the run was, how it went, and what its best weights predict for `data.split`."""
    results = data.results
    best = f"{100 * results['accuracy']:.2f} % of the segments of {data.split} are right"
    return Page(
        title=f"Run {data.run.config.tracking.run_name or data.folder.resolve().name}",
        lead=f"{data.run.config.model.name}, {data.run.config.model.supervision} supervision, weights of step "
        f"{data.run.step:,}: {best} ({len(data.answers.keys):,} videos).",
        notices=[f"{text[0].upper()}{text[1:]} ({data.split})." for text in results["flags"]],
        sections=[
            PageSection("Figures", [figures_table(data)], _FIGURES_NOTE + ("" if data.complete else _LEFT_OUT)),
            PageSection("What the run was", _facts(data)),
            PageSection("Loss and pool", curves(data.history)),
            PageSection("Categories", _categories(data)),
            PageSection("Time", _time(data)),
            PageSection("Videos", [answer_figures.timelines(data.answers), *_examples(data)], _videos_note(data)),
            PageSection("Embeddings", answer_figures.embedding_map(data.answers)),
        ],
    )


_FIGURES_NOTE = (
    "Beside each figure stands what needs no look at the features, and what the same weights reach with one modality "
    "blanked. A model is worth what it is above them."
)
_LEFT_OUT = (
    " Of so many videos a training makes no more predictions for its page: the answers with one modality blanked and "
    "the map of the videos are left out. `cpsp-dist report` writes a page with both."
)
_VIDEOS_NOTE = (
    "Each box is a segment: filled where the model predicts an event, underlined where there is one. The list "
    "chooses a video of those with most errors."
)


def figures_table(data: RunData) -> Table:
    """The reported metrics, recomputed from the answers, beside others."""
    columns = [Column("metric"), *(Column(name, "percent") for name in ("this run", *data.others))]
    found = [data.results, *(each.results for each in data.others.values())]
    rows = [[name.replace("_", " "), *(results[name] for results in found)] for name in reported()]
    return Table(f"Metrics on {data.split}", columns, rows)


def _facts(data: RunData) -> list[Facts | Table]:
    progress, config, manifest = data.run.progress, data.run.config, data.manifest
    state = "finished" if progress.finished else "not finished"
    best = f"{progress.best_accuracy:.2f} % on val at step {progress.best_step:,}" if progress.best_step else "unknown"
    run = [
        ("folder", str(data.folder)),
        ("state", f"{state}, step {progress.step:,}"),
        ("best", best),
        ("first and last line of its log", logged(data.history)),
        ("steps left out (not finite)", f"{progress.nonfinite:,}"),
        ("MLflow run", progress.run_id or "none"),
        ("page made by", f"cpsp-dist {__version__}"),
    ]
    engine = f"DeepSpeed ZeRO {config.engine.zero}" if config.engine.kind == "deepspeed" else "DDP"
    machine = [
        ("ranks", f"{progress.world:,}"),
        ("engine", f"{engine}, {config.train.precision}"),
        ("global batch", f"{config.train.global_batch:,} videos"),
        *((name, data.tags[name]) for name in OF_THE_MACHINE if name in data.tags),
    ]
    records = manifest.encoders
    shards = [
        ("shards", without_secrets(manifest.place)),
        ("fingerprint", progress.fingerprint),
        ("videos", ", ".join(f"{len(rows):,} {split}" for split, rows in manifest.splits.items())),
        ("categories", f"{len(manifest.categories):,}"),
        ("visual features", encoder_text(records.visual)),
        ("audio features", encoder_text(records.audio)),
    ]
    if manifest.fingerprint != progress.fingerprint:
        shards.insert(2, ("attention", f"predicted on other data: {manifest.fingerprint}"))
    settings = [[key, "none" if value is None else without_secrets(str(value))] for key, value in flat(config).items()]
    return [
        Facts("Run", run),
        Facts("Data", shards),
        Facts("Machine", machine, wide=True),
        Table("Configuration", [Column("setting"), Column("value")], settings, page=15),
    ]


def logged(history: Sequence[dict[str, Any]]) -> str:
    """When the first and the last line were written."""
    times = [at for line in history if isinstance(at := line.get("time"), int | float) and 0 <= at < LAST_TIME]
    return " to ".join(map(_clock, (times[0], times[-1]))) if times else "none"


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def curves(history: Sequence[dict[str, Any]]) -> list[Figure]:
    """Of every logged loss term and value of the pool, over the steps."""
    names = dict.fromkeys(name for line in history for name in line if name not in ("step", "time", "epoch"))
    losses = [name for name in names if name.startswith("loss/")]
    figures = []
    if losses:
        figures.append(
            _curve(
                "Loss terms",
                "Mean over the steps since the line before, on a logarithmic scale.",
                losses,
                history,
                "loss",
                True,
            )
        )
    for title, wanted, unit in CURVES:
        if found := [name for name in wanted if name in names]:
            figures.append(_curve(title, _last(found[0], history), found, history, unit))
    for name in names:
        if name.startswith("pool/"):
            title = name.removeprefix("pool/").replace("_", " ")
            figures.append(_curve(f"Pool: {title}", _last(name, history), [name], history, ""))
    return figures


def _points(name: str, history: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in history if isinstance(line.get(name), int | float)]


def _last(name: str, history: Sequence[dict[str, Any]]) -> str:
    values = [value for _, value in _points(name, history)]
    return f"Last {values[-1]:.4g}, from {min(values):.4g} to {max(values):.4g}." if values else "No values."


def _curve(
    title: str, caption: str, names: Sequence[str], history: Sequence[dict[str, Any]], unit: str, log: bool = False
) -> Figure:
    series: dict[str, Sequence[tuple[int, float | None]]]
    series = {name.partition("/")[2] if len(names) > 1 else name: _points(name, history) for name in names}
    if log:  # a logarithm has no 0
        series = {
            name: [(step, value if value and value > 0 else None) for step, value in points]
            for name, points in series.items()
        }
    rows = [[name, len(p), p[0][1], p[-1][1], min(v for _, v in p)] for name in names if (p := _points(name, history))]
    columns = [Column("value"), Column("points", "number"), *(Column(n, "number") for n in ("first", "last", "least"))]
    return Figure(
        title,
        caption,
        charts.lines(series, "step", unit, log=log),
        height=420 if log else 260,
        wide=log,
        table=Table(title, columns, rows) if len(names) > 1 else None,
    )


def _categories(data: RunData) -> list[Figure]:
    return [
        answer_figures.by_category(
            data.answers, data.results, {name: each.results for name, each in data.others.items()}
        ),
        *answer_figures.calibration(data.answers),
        answer_figures.confusion(data.answers, data.results["confusion"], _beside(data, "accuracy")),
    ]


def _beside(data: RunData, metric: str) -> str:
    """Percentages of this run and of what stands beside it."""
    found = {"this run": data.results, **{name: each.results for name, each in data.others.items()}}
    return ", ".join(f"{name} {100 * results[metric]:.1f} %" for name, results in found.items())


def _videos_note(data: RunData) -> str:
    found = {"this run": data.answers, **{name: each.answers for name, each in data.others.items()}}
    wrong = ", ".join(f"{name} {answers.errors.mean():.2f}" for name, answers in found.items())
    return f"{_VIDEOS_NOTE} Wrong segments of a video, on average: {wrong}."


def _time(data: RunData) -> list[Figure]:
    others = {name: each.answers for name, each in data.others.items()}
    length = answer_figures.by_length(data.answers, {name: each for name, each in others.items() if "alone" in name})
    return [answer_figures.by_second(data.answers, others), *([length] if length else [])]


def _examples(data: RunData) -> list[Choice]:
    groups = [(_label(data, each), _example(data, each)) for each in data.examples]
    return [Choice("Inside the model, for the video", groups)] if groups else []


def _label(data: RunData, example: Example) -> str:
    answers, row = data.answers, example.row
    return f"{answers.keys[row]}: {int(answers.errors[row])} of {answers.truth.shape[1]} segments wrong"


def _example(data: RunData, example: Example) -> list[Figure | Picture]:
    answers, row = data.answers, example.row
    count = answers.truth.shape[1]
    ends = [f"{answers.seconds * t:g}" for t in range(count)]
    true = int(answers.truth_category[row])
    name = answers.categories[true] if true >= 0 else "no category"
    answer = answers.categories[int(answers.category[row])]
    probability = {
        "truth": answers.truth_event[row].astype(int).tolist(),
        "probability of an event": [round(float(p), 3) for p in answers.probability[row]],
    }
    rows = [[ends[t], probability["truth"][t], probability["probability of an event"][t]] for t in range(count)]
    columns = [Column("second"), Column("truth", "number"), Column("probability", "percent")]
    cells = [(t, s, round(float(example.affinity[s, t]), 3)) for s in range(count) for t in range(count)]
    low = min(0.0, float(example.affinity.min()))
    figures: list[Figure | Picture] = [
        Figure(
            f"Events of {answers.keys[row]}",
            f"True category: {name}; predicted: {answer}.",
            charts.bars(ends, probability, "seconds from the begin", "probability", share=True),
            table=Table(f"Events of {answers.keys[row]}", columns, rows),
        ),
        Figure(
            "Audio-visual affinity",
            "Cosine of the visual features of a second (row) and the audio features of another (column), -1 to 1.",
            charts.heatmap(cells, ("audio of second", ends), ("visual of second", ends), (low, 1.0)),
            height=420,
        ),
    ]
    if example.attention is not None:
        figures.append(_attention(example.attention, ends))
        if example.frames is not None:
            figures.append(_over_frames(example.frames, example.attention, answers.truth_event[row]))
    return figures


def _over_frames(frames: np.ndarray, maps: np.ndarray, event: np.ndarray) -> Picture:
    return Picture(
        "Attention over the frames",
        f"{len(frames)} segments from left to right, orange where the weight is large; a green line below an event.",
        attended(frames, maps, event),
    )


def _attention(maps: np.ndarray, ends: Sequence[str]) -> Figure:
    """maps: [T, H, W], drawn side by side with a column between."""
    count, height, width = maps.shape
    cells = [
        (t * (width + 1) + x, y, round(float(maps[t, y, x]), 4))
        for t in range(count)
        for y in range(height)
        for x in range(width)
    ]
    names = [f"{ends[t]} s" if x == width // 2 else "" for t in range(count) for x in range(width + 1)][:-1]
    option = charts.heatmap(cells, ("second", names), ("", [""] * height), (0, float(maps.max())))
    option["xAxis"] |= {"axisLabel": {"interval": 0}, "axisTick": {"show": False}, "nameGap": 26}
    return Figure(
        "Attention over the picture",
        f"Weights of the {height} by {width} positions of the picture at each second; each map sums to 1.",
        option,
        height=280,
        wide=True,
        least_width=640,
    )
