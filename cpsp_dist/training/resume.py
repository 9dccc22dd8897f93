"""Where a run goes on: its newest whole checkpoint, and what may be another setting now than when it was written."""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist

from cpsp_dist.config import Config, flat
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.errors import DataError, UserError
from cpsp_dist.training.checkpoint import Checkpoints, Progress
from cpsp_dist.training.engine import TrainingState
from cpsp_dist.training.step_metrics import say

#: Settings that do not change what is computed: a run may go on with others.
FREE_TO_CHANGE = ("output", "data.", "tracking.", "checkpoint.", "engine.", "evaluation.batch")
#: But these say which samples a position stands for.
POSITION_KEYS = ("data.order", "data.epoch_end")


def find_state(
    checkpoints: Checkpoints, config: Config, manifest: Manifest, ranks: Ranks, allow_change: bool
) -> tuple[TrainingState | None, Progress]:
    """The newest whole checkpoint, the same one on every rank, or a fresh start; all ranks call it together.

    Raises:
        DataError: no checkpoint there is whole.
        UserError: it is another configuration's, or other shards', and `allow_change` is not given.
    """
    choice: list[int | None] = [None]
    if ranks.first:
        choice[0], passed_over = checkpoints.newest_valid()
        for line in passed_over:
            say(line)
    if ranks.world > 1:
        dist.broadcast_object_list(choice)
    described = config.model_dump(mode="json")
    if choice[0] is None:
        if checkpoints.steps():
            raise DataError(f"{checkpoints.folder}: no checkpoint here is whole; remove the folder to start anew")
        return None, Progress(config=described, fingerprint=manifest.fingerprint, world=ranks.world)
    state, progress = checkpoints.load(choice[0])
    changed = changes(progress, config, manifest)
    if changed and not allow_change:
        raise UserError(
            f"{checkpoints.path(choice[0])} was written by another configuration: {'; '.join(changed)}; "
            "set another output=…, or pass --allow-config-change"
        )
    if ranks.first:
        say(f"going on from {checkpoints.path(choice[0])}" + (" (finished)" if progress.finished else ""))
    return state, replace(progress, config=described, fingerprint=manifest.fingerprint, world=ranks.world)


def changes(progress: Progress, config: Config, manifest: Manifest) -> list[str]:
    """What differs from the run that wrote the checkpoint and would change what is computed, a line each."""
    before, now = flat(progress.config), flat(config)
    changed = [
        f"{key} {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and (key in POSITION_KEYS or not key.startswith(FREE_TO_CHANGE))
    ]
    if progress.fingerprint != manifest.fingerprint:
        changed.append(f"the shards at {manifest.place} are not the ones it was trained on")
    return changed
