"""What pages are made of, in any size and without a training: the answers of a model, and runs side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cpsp_dist.config import load_config
from cpsp_dist.data.encoders import UNKNOWN
from cpsp_dist.data.manifest import SAMPLE, Field, Manifest, Shard
from cpsp_dist.metrics.predictions import Predictions
from cpsp_dist.report.answers import Answers, measure, trivial
from cpsp_dist.report.collect import Example, Measured, RunData
from cpsp_dist.report.comparison_page import ComparedRuns
from cpsp_dist.tracking.compare import Question, compare_runs
from cpsp_dist.tracking.runs import TrackedRun
from cpsp_dist.training.checkpoint import TrainingProgress
from cpsp_dist.training.engine import TrainingState
from cpsp_dist.training.setup import TrainedRun
from tests.support.runs import KEYPAD

SECONDS = 10


def some_answers(videos: int, categories: int, seed: int = 0) -> Answers:
    """Of a model that is mostly right."""
    rng = np.random.default_rng(seed)
    begin, length = rng.integers(0, SECONDS, (2, videos, 1))
    event = (np.arange(SECONDS) >= begin) & (np.arange(SECONDS) <= begin + length)
    category = np.arange(videos) % categories
    return Answers(
        [f"{n:06d}--video_{n}" for n in range(videos)],
        [f"category {k} with a long name" for k in range(categories)],
        1.0,
        category.astype(np.int64),
        event,
        (3 * event - 1.5 + 2 * rng.normal(size=event.shape)).astype(np.float32),
        (4 * np.eye(categories)[category] + rng.normal(size=(videos, categories))).astype(np.float32),
        rng.normal(size=(videos, 64)).astype(np.float32) + category[:, None] % 7,
    )


def some_run(videos: int, categories: int) -> RunData:
    answers, rng = some_answers(videos, categories), np.random.default_rng(1)
    config = load_config(str(KEYPAD), ["data.shards=shards", "output=runs/large"])
    progress = TrainingProgress(step=60000, config=config.model_dump(mode="json"), fingerprint="f" * 64, finished=True)
    names = ("loss/total", "loss/event", "loss/psa_v", "pool/size", "pool/active_hinges", "grad_norm", "accuracy/val")
    history = [
        {"step": s, "time": 1.7e9 + s} | {name: 3 / (s + 1) ** 0.3 for name in names} for s in range(0, 60000, 20)
    ]
    frames = rng.integers(0, 255, (SECONDS, 112, 112, 3), dtype=np.uint8)
    attention = rng.dirichlet(np.ones(49), (12, SECONDS)).reshape(12, SECONDS, 7, 7)
    examples = [Example(n, attention[n], rng.uniform(-0.2, 1, (SECONDS, SECONDS)), frames) for n in range(12)]
    others = {name: Measured(each, measure(each)) for name, each in trivial(answers).items()}
    fields = {"visual": Field("<f2", (10, 7, 7, 512)), "audio": Field("<f4", (10, 128)), "label": Field("|u1", (10,))}
    shards = [Shard("test-000000.tar", "test", videos, 0, 1, "0" * 64)]
    manifest = Manifest(Path("shards"), fields, [*answers.categories], shards, np.zeros(videos, SAMPLE), None, UNKNOWN)
    run = TrainedRun(config, progress, TrainingState({}, {}, 1, {}), 60000)
    return RunData(Path("runs/large"), run, manifest, "test", history, answers, measure(answers), others, examples)


def predictions(answers: Answers) -> Predictions:
    probability = answers.category_probability.max(1).astype(np.float32)
    return Predictions(
        "test", 5, [*answers.categories], np.array(answers.keys), answers.truth_category, answers.truth_event,
        answers.category, probability, answers.probability,
    )  # fmt: skip


def some_comparison(kinds: int, seeds: int, *, videos: int = 60, categories: int = 5) -> ComparedRuns:
    """`kinds` rows of `seeds` runs each, with histories of 300 points and stored predictions."""
    runs, histories, stored = [], {}, {}
    for kind in range(kinds):
        for seed in range(seeds):
            one = f"id-{kind}-{seed}"
            values = {
                "accuracy/test": 60 + kind % 9 + seed / 3,
                "loss/total": 2 - kind % 5 / 4,
                "videos_per_second": 900.0,
            }
            values |= {"accuracy/val": 61 + kind % 9 + seed / 3}
            params = {"train.seed": str(seed), "train.learning_rate": str(10 ** -(kind % 4)), "pool.bank": str(kind)}
            params |= {"model.name": ("psp", "avel", "cmran")[kind % 3], "train.global_batch": "64"}
            params["world_size"] = "4"
            tags = {"predictions": "test"}
            runs.append(
                TrackedRun(one, f"kind{kind}-seed{seed}", "FINISHED", "cpsp", 1e9, 1e9 + 7200, params, values, tags)
            )
            histories[one] = {
                name: [(step, values[name] * (1 - 1 / (2 + step))) for step in range(300)]
                for name in ("accuracy/val", "loss/total")
            }
            stored[one] = (kind, seed)

    def read(run: TrackedRun, split: str) -> Predictions:
        kind, seed = stored[run.id]
        return predictions(some_answers(videos, categories, 10 * kind + seed))

    question = Question(("accuracy/test", "accuracy/val"), mean=True, baseline="kind0")
    found = compare_runs(runs, question, read)
    return ComparedRuns(found, histories, ["accuracy/val", "loss/total"])
