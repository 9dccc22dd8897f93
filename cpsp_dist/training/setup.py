"""The parts of a run, each built in one place: for training, evaluation, dry run, export and benchmarks alike."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import nn

from cpsp_dist.config import Config
from cpsp_dist.data.cache import Cache
from cpsp_dist.data.encoders import UNKNOWN, Encoders, require_same
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.reader import EvalStream, ReaderOptions, TrainStream
from cpsp_dist.data.reader.ring import PATIENCE
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.models import load_weights, model_for
from cpsp_dist.training.checkpoint import PROGRESS, Checkpoints, TrainingProgress
from cpsp_dist.training.engine import TrainingState
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.json_lines import read_bytes
from cpsp_dist.utils.logs import environment_rank

logger = logging.getLogger(__name__)

#: Videos named in a warning, at most.
NAMED = 5
#: Training videos from which the scale of the features is estimated.
CALIBRATION_VIDEOS = 64
#: The file of an exported model that describes it.
EXPORTED = "config.json"


def open_manifest(config: Config, shards: str | None = None) -> Manifest:
    """The manifest of `data.shards`, or of `shards` where given; shards at a URL go through `data.cache`.

    Raises:
        DataError, UserError: no shards there, or a damaged manifest.
    """
    return Manifest.load(shards or config.data.shards, Cache(config.data.cache, config.data.cache_gb))


def reader_options(config: Config, ranks: Ranks) -> ReaderOptions:
    """How this rank reads, by the settings `data.*`."""
    data = config.data
    return ReaderOptions(
        threads=data.reader_threads,
        depth=data.prefetch_batches,
        check_crc=data.check_crc,
        on_error=data.on_error,
        skip_budget=data.max_skipped_samples,
        pin=ranks.device.type == "cuda",
        access=data.access,
        order=data.order,
        epoch_end=data.epoch_end,
        patience=min(PATIENCE, config.engine.timeout / 2),  # before the ranks that wait for this one give up
    )


def open_train_stream(config: Config, manifest: Manifest, ranks: Ranks) -> TrainStream:
    """This rank's part of the endless stream of training samples."""
    return TrainStream(
        manifest,
        "train",
        global_batch=config.train.global_batch,
        seed=config.train.seed,
        rank=ranks.rank,
        world=ranks.world,
        accumulation=config.train.accumulation,
        options=reader_options(config, ranks),
    )


def open_eval_stream(config: Config, manifest: Manifest, split: str, ranks: Ranks) -> EvalStream:
    """This rank's part of one pass over `split`; a small one has no empty slots, which would be computed, too."""
    return EvalStream(
        manifest,
        split,
        batch=min(config.evaluation.global_batch, len(manifest.rows(split))),
        rank=ranks.rank,
        world=ranks.world,
        options=reader_options(config, ranks),
    )


def initial_model(config: Config, manifest: Manifest) -> nn.Module:
    """The network as every rank begins with it: from the seed and the scale of the features, or `model.weights`."""
    torch.manual_seed(config.train.seed)
    model = model_for(config.model, manifest)
    if config.model.weights is not None:
        trained, weights = _recorded_beside(config.model.weights), config.model.weights
        require_same(trained, manifest.encoders, weights, manifest.place, warn=environment_rank() == 0)
        load_weights(config.model.weights, model)
        return model
    options = ReaderOptions(access=config.data.access)
    with EvalStream(manifest, "train", batch=CALIBRATION_VIDEOS, options=options) as stream:
        batch = next(iter(stream))
        scales = [_scale(x[batch.valid].float()) for x in (batch.visual, batch.audio)]
        if not all(finite for _, finite in scales) and environment_rank() == 0:
            bad = ~(batch.visual.isfinite().flatten(1).all(1) & batch.audio.isfinite().flatten(1).all(1)) & batch.valid
            keys = [manifest.samples[row]["key"].decode() for row in batch.index[bad].tolist()]
            more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
            logger.warning(
                "%s%s: NaN or infinite values, left out of the features' scale; `cpsp-dist shards verify` names all",
                *(", ".join(keys[:NAMED]), more),
            )
        model.calibrate(*(scale for scale, _ in scales))
    return model


def _recorded_beside(weights: str) -> Encoders:
    """The encoders that the folder of a weight file records: of a checkpoint, or of an exported model."""
    for name in (PROGRESS, EXPORTED):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if content := read_bytes(Path(weights).with_name(name), limit=1 << 24):
                return Encoders.parse(json.loads(content).get("encoders"))
    return UNKNOWN


def _scale(x: torch.Tensor) -> tuple[float, bool]:
    """The root mean square of the finite values, and whether all are finite."""
    scale = x.square().mean().sqrt().item()
    if math.isfinite(scale):
        return scale, True
    finite = x[x.isfinite()].double()
    return finite.square().mean().sqrt().item() if len(finite) else 1.0, len(finite) == x.numel()


def build_objectives(config: Config, state: TrainingState | None = None) -> Objectives:
    """The weighted sum of loss terms; with the memory bank of `state`, where given."""
    objectives = Objectives(
        config.objectives,
        pool=config.pool.scope,
        bank=config.pool.bank,
        supervision=config.model.supervision,
        parts=config.train.accumulation if config.pool.over == "parts" else 1,
    )
    if state is not None:
        objectives.load(state.objectives)
    return objectives


@dataclass(frozen=True)
class TrainedRun:
    """What an output folder holds: the resolved configuration, the last progress, and the best weights.

    Attributes:
        step: the step of those weights; the last one without a val split.
    """

    config: Config
    progress: TrainingProgress
    state: TrainingState
    step: int


def load_run(output: str | Path) -> TrainedRun:
    """The best weights of the run in `output`.

    Raises:
        UserError: no complete checkpoint there.
    """
    checkpoints = Checkpoints(output)
    newest, passed_over = checkpoints.newest_valid()
    if newest is None:
        why = f" ({passed_over[0]})" if passed_over else ""
        raise UserError(f"{output}: no complete checkpoint here{why}; give the output folder of a training run")
    progress = checkpoints.load(newest)[1]
    state, step, warning = checkpoints.load_best(progress)
    if warning:
        logger.warning("%s", warning)
    try:
        config = Config.model_validate(progress.config, strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{checkpoints.path(newest)}: its setting {key} is none of this program's ({first['msg']}); use the "
            "version that wrote it"
        ) from None
    return TrainedRun(config, progress, state, step)
