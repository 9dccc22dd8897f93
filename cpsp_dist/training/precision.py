"""What `train.precision=auto` is for a run."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch

from cpsp_dist.config import Config
from cpsp_dist.distributed.process_group import Ranks, all_reduce_max
from cpsp_dist.training.checkpoint import LONGEST_PROGRESS, PROGRESS, Checkpoints
from cpsp_dist.training.engine import has_bf16
from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.json_lines import read_bytes

_NAMES = (None, "fp32", "bf16", "fp64")


def settle_precision(config: Config, ranks: Ranks) -> Config:
    """The configuration with a precision in place of auto: that of the run's newest checkpoint where there is one, so
    that a run is resumed on other machines as it was begun; else bf16 where the devices of all ranks compute in it,
    and fp32 where one does not. All ranks call it together."""
    if config.train.precision != "auto":
        return config
    before = recorded_precision(config.output) if ranks.first else None
    known = _NAMES[all_reduce_max(_NAMES.index(before if before in _NAMES else None), ranks.device)]
    lacking = all_reduce_max(int(not has_bf16(ranks.device)), ranks.device)
    return with_precision(config, known or ("fp32" if lacking else "bf16"))


def settle_alone(config: Config, device: torch.device) -> Config:
    """As `settle_precision` would on ranks with this device alone, without asking others or reading a checkpoint."""
    if config.train.precision != "auto":
        return config
    return with_precision(config, "bf16" if has_bf16(device) else "fp32")


def recorded_precision(output: str | Path) -> str | None:
    """Of the run whose checkpoints are in `output`, by the newest that says so; what is damaged, or cannot be listed,
    is reported by what resumes from there."""
    checkpoints, steps = Checkpoints(output), list[int]()
    with contextlib.suppress(DataError):
        steps = checkpoints.steps()
    for step in reversed(steps):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            text = read_bytes(checkpoints.path(step) / PROGRESS, limit=LONGEST_PROGRESS)
            return str(json.loads(text)["config"]["train"]["precision"])
    return None


def with_precision(config: Config, precision: str) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
