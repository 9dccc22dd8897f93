"""Where a run resumes: its newest complete checkpoint, and which settings may have changed since."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch.distributed as dist
from torch import Tensor, nn

from cpsp_dist.config import Config, flat
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.training.checkpoint import Checkpoints, TrainingProgress, require_encoders
from cpsp_dist.training.engine import TrainingState
from cpsp_dist.training.precision import settle_precision
from cpsp_dist.utils.errors import DataError, UserError

logger = logging.getLogger(__name__)

#: Settings that do not change what is computed: a run may be resumed with others. Its length is one: a step does not
#: depend on how many follow.
KEYS_SAFE_TO_CHANGE = (
    *("output", "data.", "tracking.", "checkpoint.", "engine.", "evaluation.global_batch"),
    *("train.epochs", "train.steps"),
)
#: But these say which samples a position stands for.
POSITION_KEYS = ("data.order", "data.epoch_end")


@dataclass(frozen=True)
class Choices:
    """What the command line says of a start. fresh: refuse to resume; allow_change: of another configuration too."""

    fresh: bool = False
    allow_change: bool = False


def load_latest_checkpoint(
    config: Config, manifest: Manifest, ranks: Ranks, choices: Choices, steps: int, model: nn.Module
) -> tuple[Config, TrainingState | None, TrainingProgress]:
    """The newest complete checkpoint, the same one on every rank, or a fresh start; all ranks call it together. Before
    it the configuration, with its precision settled (`settle_precision`).

    A run that was finished with fewer than `steps` steps trains on. For the dry run too: it writes nothing.

    Raises:
        DataError: no checkpoint there is complete, or one has another format.
        UserError: it is another configuration's, or other shards', or of a later step than `steps`, and
            `choices.allow_change` is not given; or there is one, and `choices.fresh` is; or it was trained on features
            of other encoders; or its weights are none of `model`.
    """
    checkpoints = Checkpoints(config.output)
    if choices.fresh and checkpoints.steps():
        raise UserError(f"{config.output} holds checkpoints of an earlier run; remove it, or set another output=…")
    newest = _newest_on_all_ranks(checkpoints, ranks)
    if newest is None:
        if checkpoints.steps():
            raise DataError(f"{checkpoints.folder}: no complete checkpoint found; remove the folder to start anew")
        config = settle_precision(config, ranks, {})
        return (
            config,
            None,
            TrainingProgress(
                config=config.model_dump(mode="json"),
                fingerprint=manifest.fingerprint,
                world=ranks.world,
                encoders=manifest.encoders.as_json(),
            ),
        )
    state, progress = checkpoints.load(newest)
    require_encoders(progress, manifest, str(checkpoints.path(newest)), warn=ranks.first)
    config = settle_precision(config, ranks, progress.config)
    changed = changes(progress, config, manifest)
    if progress.step > steps:
        changed.append(f"it is of step {progress.step}, train.epochs and train.steps now ask for {steps} steps")
    if changed and not choices.allow_change:
        raise UserError(
            f"{checkpoints.path(newest)} was written by another configuration: {'; '.join(changed)}; "
            "set another output=…, or pass --allow-config-change"
        )
    _require_fits(state.weights, model, f"{checkpoints.path(newest)}")
    finished = progress.step >= steps
    return (
        config,
        state,
        replace(
            progress,
            config=config.model_dump(mode="json"),
            fingerprint=manifest.fingerprint,
            world=ranks.world,
            finished=finished,
            encoders=manifest.encoders.as_json() if manifest.encoders.known else progress.encoders,
        ),
    )


def _require_fits(weights: Mapping[str, Tensor], model: nn.Module, checkpoint: str) -> None:
    """Raises UserError where weights are of another network, which --allow-config-change does not make this one."""
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            theirs, ours = (f"{shapes[name]}" if name in shapes else "none" for shapes in (found, wanted))
            raise UserError(
                f"{checkpoint}: its weights are of another network: {name} is {theirs} there, {ours} in this one; set "
                "model.* as they were, or another output=…"
            )


def _newest_on_all_ranks(checkpoints: Checkpoints, ranks: Ranks) -> int | None:
    """The newest complete checkpoint, found by rank 0; one of another format is an error on all ranks."""
    result: list[int | str | None] = [None]
    if ranks.first:
        try:
            result[0], passed_over = checkpoints.newest_valid()
            for line in passed_over:
                logger.warning(line)
        except DataError as error:
            result[0] = str(error)
    if ranks.world > 1:
        dist.broadcast_object_list(result)
    (newest,) = result
    if isinstance(newest, str):
        raise DataError(newest)
    return newest


def changes(progress: TrainingProgress, config: Config, manifest: Manifest) -> list[str]:
    """What differs from the run that wrote the checkpoint and would change what is computed, a line each."""
    before, now = flat(progress.config), flat(config)
    changed = [
        f"{key} {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
        and (
            key in POSITION_KEYS
            or not key.startswith(KEYS_SAFE_TO_CHANGE)
            or (key == "engine.compile" and "inductor" in (before.get(key), now[key]))  # with dropout masks of its own
        )
    ]
    if progress.fingerprint != manifest.fingerprint:
        changed.append(f"the shards at {manifest.place} are not the ones it was trained on")
    return changed
