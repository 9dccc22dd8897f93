"""A model's answers on a split: the AVEL metric and what lies behind it, exact over any number of ranks."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cpsp_dist.config import Config
from cpsp_dist.data.batch import Batch
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.distributed import process_group
from cpsp_dist.distributed.process_group import Ranks, discover, sum_over_ranks
from cpsp_dist.distributed.signals import StopSignals
from cpsp_dist.metrics import METRICS, reported
from cpsp_dist.metrics.predictions import Predictions, joined
from cpsp_dist.models import Output, model_for
from cpsp_dist.tracking.predictions import predictions_file
from cpsp_dist.training.checkpoint import Checkpoints, TrainingProgress, require_encoders
from cpsp_dist.training.engine import Forward, PlainModel, set_numerics
from cpsp_dist.training.setup import load_run, open_eval_stream, open_manifest
from cpsp_dist.utils.console import Progress
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.text import one_line

logger = logging.getLogger(__name__)


@torch.no_grad()
def evaluate(
    model: Forward,
    manifest: Manifest,
    split: str,
    config: Config,
    ranks: Ranks,
    signals: StopSignals | None = None,
    answers: list[Predictions] | None = None,
) -> dict[str, Any]:
    """The results of all `METRICS` over the videos of `split`, and how many there were; background counts as a class.

    `accuracy` (0 to 1) is the published one. All ranks call it together and get the same answer; each video counts once
    whatever the world size. `skipped` counts damaged samples that `data.on_error=skip` passed over. What this rank's
    videos were predicted to be is added to `answers`, where given.

    Raises:
        Stopped: one of `signals` came; on all ranks.
    """
    signals = signals or StopSignals()
    was_training = model.module.training
    model.module.eval()
    seconds = manifest.fields["label"].shape[0]
    metrics = [metric(manifest.categories, seconds) for metric in METRICS.values()]
    videos = torch.zeros(2, dtype=torch.int64)  # read, skipped
    total = len(manifest.rows(split))
    with (
        open_eval_stream(config, manifest, split, ranks) as stream,
        Progress(total, "videos", f"evaluating {split}", summary=False, enabled=ranks.first) as shown,
    ):
        for cpu_batch in stream:
            if signals.received:
                break
            batch = cpu_batch.to(ranks.device)
            output = model(batch)
            for metric in metrics:
                metric.update(output, batch)
            if answers is not None:
                answers.append(predictions_of(output, batch, manifest, split))
            videos[0] += batch.valid.sum().cpu()
            shown.update(min(int(cpu_batch.valid.sum()) * ranks.world, total - shown.done))  # as far as the others are
        videos[1] = stream.skipped
    model.module.train(was_training)
    process_group.raise_if_stop_requested(signals, ranks.device, "trained and saved, not yet evaluated")
    tables = [*(metric.counts for metric in metrics), videos]
    totals = sum_over_ranks(torch.cat([table.flatten() for table in tables]).to(ranks.device)).cpu()
    *sums, videos = totals.split([table.numel() for table in tables])
    for metric, counts in zip(metrics, sums, strict=True):
        metric.counts = counts.view(metric.counts.shape)
    read, skipped = videos.tolist()
    assert read + skipped == len(manifest.rows(split)), (split, read, skipped)
    results = {name: value for metric in metrics for name, value in metric.result().items()}
    return results | {"split": split, "videos": read, "skipped": skipped}


def predictions_of(output: Output, batch: Batch, manifest: Manifest, split: str, step: int = 0) -> Predictions:
    """What a batch's videos were predicted to be; padding is left out."""
    valid = batch.valid.cpu().numpy()
    probability, answer = output.category_logits.double().softmax(1).max(1)
    # In the network's precision, as the metrics compare it with the threshold.
    event = output.event_logits.sigmoid().float()
    arrays = (batch.category, batch.event, answer, probability.float(), event)
    rows = [array.cpu().numpy()[valid] for array in arrays]
    keys = manifest.samples["key"][batch.index.cpu().numpy()[valid]].astype("U48")
    return Predictions(split, step, manifest.categories, keys, *rows)


def gather_predictions(parts: list[Predictions], step: int) -> Predictions:
    """Those of all ranks, each video once; all ranks call it together."""
    found = [part for rank in process_group.gather([joined(parts)] if parts else []) for part in rank]
    return replace(joined(found), step=step)


def evaluate_best(
    config: Config, manifest: Manifest, ranks: Ranks, progress: TrainingProgress, signals: StopSignals
) -> dict[str, float]:
    """Percentages of the weights that were best on val (the last ones without a val split), on val and test.

    The details go to `evaluation_val.json` and `evaluation_test.json` in the run's folder, what each video was
    predicted to be to `predictions_val.npz` and `predictions_test.npz`.
    """
    state, step, warning = Checkpoints(config.output).load_best(progress)
    if warning and ranks.first:
        logger.warning(warning)
    model = PlainModel(model_for(config.model, manifest), state.weights, ranks.device)
    results: dict[str, float] = {}
    for split, name in (("val", "best_val"), ("test", "test")):
        if split in manifest.splits:
            answers: list[Predictions] = []
            details = evaluate(model, manifest, split, config, ranks, signals, answers)
            predictions = gather_predictions(answers, step)
            results |= {f"{key}/{name}": 100 * details[key] for key in reported()}
            if ranks.first:
                write_json(config, f"evaluation_{split}.json", details)
                write_predictions(predictions, Path(config.output) / predictions_file(split))
    return results


def write_json(config: Config, name: str, content: Any) -> None:
    """Results are printed and tracked too: a full disk does not cost a finished run its end."""
    try:
        (Path(config.output) / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        logger.warning(f"{config.output}/{name} could not be written: {error.strerror}")


def write_predictions(predictions: Predictions, file: Path) -> None:
    """As `write_json`."""
    try:
        predictions.save(file)
    except OSError as error:
        logger.warning(f"{file} could not be written: {error.strerror}")


def evaluate_run(
    output: str,
    split: str,
    shards: str | None = None,
    ranks: Ranks | None = None,
    answers: list[Predictions] | None = None,
) -> dict[str, Any]:
    """`evaluate` of a run's best weights (its last ones without a val split); by all of `ranks` together, where given,
    else in this process. `answers`: the predictions for all videos are added to it.

    Raises:
        UserError: no checkpoint there, no such split, or shards of other categories or sizes than it was trained on.
    """
    run, ranks = load_run(output), ranks or discover()
    manifest = open_manifest(run.config, shards)
    manifest.rows(split)
    require_encoders(run.progress, manifest, f"the model of {output}")
    set_numerics(run.config.train, ranks.device)
    try:
        model = PlainModel(model_for(run.config.model, manifest), run.state.weights, ranks.device)
    except RuntimeError as error:
        reason = one_line(error)[:200]
        raise UserError(f"{manifest.place}: these shards do not fit the weights of {output}: {reason}") from None
    own: list[Predictions] | None = None if answers is None else []
    found = evaluate(model, manifest, split, run.config, ranks, None, own)
    if answers is not None and own is not None:
        answers.append(gather_predictions(own, run.step))
    return found | {"step": run.step}
