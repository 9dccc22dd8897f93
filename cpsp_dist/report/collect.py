"""What a run's page needs, read from the run's folder and computed with its best weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.reader import EvalStream
from cpsp_dist.distributed.process_group import discover
from cpsp_dist.models import Network, Output, model_for
from cpsp_dist.report.answers import Answers, Floats, measure, trivial
from cpsp_dist.tracking.store import Store, StoreError, sqlite_file, tracking_uri
from cpsp_dist.training.checkpoint import require_encoders
from cpsp_dist.training.engine import PlainModel, set_numerics
from cpsp_dist.training.setup import TrainedRun, load_run, open_manifest
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
        maps: [T, H, W] mean size of the visual features; of vectors [T].
    """

    row: int
    attention: Floats | None
    affinity: Floats
    maps: Floats


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


def collect(folder: Path, split: str | None = None, shards: str | None = None) -> RunData:
    """The answers of the run's best weights on `split` (by default test, where there is none val), on this process'
    device.

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
    with EvalStream(manifest, chosen, batch=BATCH) as stream:
        modalities = ("audio", "visual") if run.config.model.modality == "both" else ()
        found = _predict(model, network, stream, manifest, modalities)
        answers = found[0]
        examples = [*_examples(model, stream, answers)]
    beside = trivial(answers) | {f"{name} alone": each for name, each in zip(modalities, found[1:], strict=True)}
    others = {name: Measured(each, measure(each)) for name, each in beside.items()}
    history = read_history(folder)
    return RunData(folder, run, manifest, chosen, history, answers, measure(answers), others, examples, read_tags(run))


def read_tags(run: TrainedRun) -> dict[str, str]:
    """What MLflow knows of a run, as host, launcher, restarts; none where its store is no file of this machine."""
    uri = tracking_uri(run.config)
    file = sqlite_file(uri)
    if run.progress.run_id is None or file is None or not file.is_file():
        return {}
    try:
        return dict(Store(uri).get_run(run.progress.run_id).data.tags)
    except StoreError as error:
        logger.warning("%s; the page lacks what MLflow knows of the machine", error)
        return {}


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


@torch.no_grad()
def _examples(model: PlainModel, stream: EvalStream, answers: Answers) -> Iterator[Example]:
    worst = np.argsort(-answers.errors, kind="stable")[:EXAMPLES]
    rows = np.full(BATCH, -1, dtype=np.int64)
    rows[: len(worst)] = stream.rows.start + worst
    batch = stream.read(rows)
    output: Output = model(batch)
    visual, audio = (torch.nn.functional.normalize(x.double().cpu(), dim=-1) for x in (output.visual, output.audio))
    affinity = (visual @ audio.transpose(1, 2)).numpy()
    maps = batch.visual.float().abs().mean(-1).numpy()
    grid = batch.visual.shape[2:-1]
    attention = None if output.attention is None else output.attention.float().cpu().unflatten(-1, grid).numpy()
    for slot, row in enumerate(worst.tolist()):
        yield Example(row, None if attention is None else attention[slot], affinity[slot], maps[slot].copy())
