"""What a run's page needs, read from the run's folder and computed with its best weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.reader import EvalStream
from cpsp_dist.distributed.process_group import discover
from cpsp_dist.metrics.predictions import Predictions
from cpsp_dist.models import Network, Output, model_for
from cpsp_dist.report.answers import Answers, Floats, measure, trivial
from cpsp_dist.report.frames import FramesOf, Pixels, wall
from cpsp_dist.tracking.known_runs import recorded_run, started_as
from cpsp_dist.tracking.predictions import predictions_file
from cpsp_dist.tracking.store import Store, StoreError, sqlite_file, tracking_uri
from cpsp_dist.training.checkpoint import require_encoders
from cpsp_dist.training.engine import PlainModel, set_numerics
from cpsp_dist.training.setup import TrainedRun, load_run, open_manifest, reader_options
from cpsp_dist.utils.console import Progress
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.json_lines import parse_line, read_bytes
from cpsp_dist.utils.text import one_line

logger = logging.getLogger(__name__)

BATCH = 32
#: Videos shown with attention and affinity, those with most errors first.
EXAMPLES = 12


@dataclass(frozen=True)
class Example:
    """What the network computes inside for a video (row of `Answers`).

    Attributes:
        attention: [T, H, W] weights of the map's positions; None where the network has none.
        affinity: [T, T] cosine of visual (row) and audio (column) segment features.
        frames: [T, h, w, 3] what the visual features are of, where that is there.
    """

    row: int
    attention: Floats | None
    affinity: Floats
    frames: Pixels | None


@dataclass(frozen=True)
class Measured:
    answers: Answers
    results: dict[str, Any]


@dataclass(frozen=True)
class RunData:
    """
    Attributes:
        folder: of the run. run: its configuration, progress and best weights. manifest: of the shards.
        history: the lines of metrics.jsonl.
        results: of all metrics, from `answers`. others: by name, what stands beside them: answers without a look at the
            features, and those of the same weights with one modality blanked.
        tags: of the run in MLflow.
    """

    folder: Path
    run: TrainedRun
    manifest: Manifest
    split: str
    history: list[dict[str, Any]]
    answers: Answers
    results: dict[str, Any]
    others: dict[str, Measured]
    examples: list[Example]
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether the network was asked about every video, and not only what the run had stored."""
        return self.answers.embedding is not None


def collect(
    folder: Path,
    split: str | None = None,
    shards: str | None = None,
    *,
    most: int | None = None,
    frames_of: FramesOf | None = None,
) -> RunData:
    """The answers of the run's best weights on `split` (by default test, where there is none val), on this process'
    device. Of more than `most` videos the answers are those that the run stored, without what costs a look at each
    video: the map of embeddings, and the network with one modality alone.

    Raises:
        UserError: no checkpoint there, no such split, or shards of other categories or sizes.
    """
    run = load_run(folder)
    manifest = open_manifest(run.config, shards)
    chosen = split or ("test" if "test" in manifest.splits else "val")
    manifest.rows(chosen)
    require_encoders(run.progress, manifest, f"the model of {folder}")
    device = discover().device
    set_numerics(run.config.train, device)
    try:
        network = model_for(run.config.model, manifest)
        model = PlainModel(network, run.state.weights, device)
    except RuntimeError as error:
        raise UserError(
            f"{manifest.place}: these shards do not fit the weights of {folder}: {one_line(error)[:200]}"
        ) from None
    network.eval()
    stored = most is not None and len(manifest.rows(chosen)) > most
    modalities = ("audio", "visual") if run.config.model.modality == "both" and not stored else ()
    options = replace(reader_options(run.config, discover()), pin=False)
    with EvalStream(manifest, chosen, batch=BATCH, options=options) as stream:
        if stored:
            found = [stored_answers(folder / predictions_file(chosen), manifest.encoders.segment_seconds)]
        else:
            found = _predict(model, network, stream, manifest, modalities)
        answers = found[0]
        examples = [*_examples(model, stream, answers, manifest, frames_of)]
    beside = trivial(answers) | {f"{name} alone": each for name, each in zip(modalities, found[1:], strict=True)}
    others = {name: Measured(each, measure(each)) for name, each in beside.items()}
    history = read_history(folder)
    return RunData(
        folder, run, manifest, chosen, history, answers, measure(answers), others, examples, read_tags(folder, run)
    )


def read_tags(folder: Path, run: TrainedRun) -> dict[str, str]:
    """What the run's starts left of the machine, as host, launcher, restarts, and what MLflow knows beside it where its
    store is a file of this machine."""
    tags = started_as(folder)
    uri, run_id = recorded_run(folder) or (tracking_uri(run.config), run.progress.run_id)
    file = sqlite_file(uri)
    try:
        if run_id is None or file is None or not file.is_file():
            return tags
        return {**tags, **Store(uri).get_run(run_id).data.tags}
    except (StoreError, OSError) as error:  # somebody else's store among them
        logger.warning("%s; the page lacks what MLflow knows of the machine", error)
        return tags


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics.jsonl, oldest first."""
    try:
        lines = read_bytes(folder / "metrics.jsonl").splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{folder / 'metrics.jsonl'}: cannot be read ({error.strerror})") from None
    return [content for line in lines if (content := parse_line(line)) is not None]


@contextmanager
def _only(network: Network, modality: Any) -> Iterator[None]:
    """The network sees this modality alone inside."""
    before, network.modality = network.modality, modality
    try:
        yield
    finally:
        network.modality = before


@torch.no_grad()
def _predict(
    model: PlainModel, network: Network, stream: EvalStream, manifest: Manifest, modalities: tuple[str, ...]
) -> list[Answers]:
    """The answers of the network as it is, and with each modality alone, in one pass over the data."""
    parts: list[list[dict[str, Tensor]]] = [[] for _ in range(1 + len(modalities))]
    with Progress(stream.samples, "videos", f"predicting {stream.split}", summary=False) as shown:
        for batch in stream:
            valid = batch.valid
            common = {"index": batch.index, "truth_event": batch.event, "truth_category": batch.category}
            for number, modality in enumerate((network.modality, *modalities)):
                with _only(network, modality):
                    output = model(batch)
                found = {"event_logits": output.event_logits, "category_logits": output.category_logits}
                found |= {"embedding": output.fusion.mean(1)}
                kept = {name: value.cpu()[valid].clone() for name, value in {**common, **found}.items()}
                parts[number].append(kept)
            shown.update(int(valid.sum()))
    return [_joined(each, manifest) for each in parts]


def _joined(parts: list[dict[str, Tensor]], manifest: Manifest) -> Answers:
    arrays = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
    keys = [manifest.samples[row]["key"].decode() for row in arrays.pop("index").tolist()]
    return Answers(keys, manifest.categories, manifest.encoders.segment_seconds, **arrays)


def stored_answers(file: Path, seconds: float) -> Answers:
    """What a run's evaluation stored, as answers with the same labels and probabilities. seconds: of a segment.

    Raises:
        DataError: the file is no such one, or cannot be read.
    """
    found = Predictions.load(file)
    count, categories = len(found), len(found.categories)
    event, sure = found.event_probability.astype(float), found.probability.astype(float)
    with np.errstate(divide="ignore"):  # probabilities of 0 and 1
        event = np.log(event) - np.log1p(-event)
        others = np.log((1 - sure) / max(categories - 1, 1))
        category = np.repeat(others[:, None], categories, axis=1)
        category[np.arange(count), found.answer] = np.maximum(np.log(sure), others + 1e-9)  # also among equal ones
    keys = [str(key) for key in found.key]
    return Answers(keys, found.categories, seconds, found.category, found.event, event, category, None)


@torch.no_grad()
def _examples(
    model: PlainModel, stream: EvalStream, answers: Answers, manifest: Manifest, frames_of: FramesOf | None
) -> Iterator[Example]:
    worst = np.argsort(-answers.errors, kind="stable")[:EXAMPLES]
    rows = np.full(BATCH, -1, dtype=np.int64)
    keys = manifest.samples["key"][stream.rows.start : stream.rows.stop]  # answers may lack skipped ones
    rows[: len(worst)] = [stream.rows.start + np.flatnonzero(keys == answers.keys[row].encode())[0] for row in worst]
    batch = stream.read(rows)
    output: Output = model(batch)
    visual, audio = (torch.nn.functional.normalize(x.double().cpu(), dim=-1) for x in (output.visual, output.audio))
    affinity = (visual @ audio.transpose(1, 2)).numpy()
    grid = batch.visual.shape[2:-1]
    attention = None if output.attention is None else output.attention.float().cpu().unflatten(-1, grid).numpy()
    for slot, row in enumerate(worst.tolist()):
        drawn = None
        if frames_of is not None:
            drawn = frames_of(answers.keys[row], answers.truth.shape[1], answers.seconds)
        if drawn is None:
            drawn = wall(batch.visual[slot].float().numpy(), manifest.categories)
        yield Example(row, None if attention is None else attention[slot], affinity[slot], drawn)
