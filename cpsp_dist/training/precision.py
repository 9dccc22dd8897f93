"""What `train.precision=auto` is in a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from cpsp_dist.config import Config, flat
from cpsp_dist.distributed.process_group import Ranks, all_reduce_max
from cpsp_dist.training.engine import has_bf16

logger = logging.getLogger(__name__)


def settle_precision(config: Config, ranks: Ranks, saved: Mapping[str, Any]) -> Config:
    """The configuration with bf16 or fp32 in place of auto: as in `saved`, the configuration of the checkpoint that is
    resumed ({} for a new run), so that a run stays what it is on other machines; where that has neither, bf16 where the
    devices of all ranks have it in hardware. All ranks call it together."""
    device = ranks.device
    settled, why = _settled(config, saved, device, lambda: not all_reduce_max(int(not has_bf16(device)), device))
    if why and ranks.first:
        logger.info(f"train.precision=auto is {settled.train.precision} in this run: {why}")
    return settled


def settle_alone(config: Config, device: torch.device, saved: Mapping[str, Any]) -> tuple[Config, str]:
    """As `settle_precision` where all ranks have such a device; and why ('' where the configuration has no auto)."""
    return _settled(config, saved, device, lambda: has_bf16(device))


def _settled(
    config: Config, saved: Mapping[str, Any], device: torch.device, have_bf16: Callable[[], bool]
) -> tuple[Config, str]:
    if config.train.precision != "auto":
        return config, ""
    kind, before = device.type.upper(), flat({**saved}).get("train.precision")
    if before in ("bf16", "fp32"):
        precision, why = before, "as in the checkpoint"
    elif have_bf16():
        precision, why = "bf16", f"every rank's {kind} has it"
    else:
        precision, why = "fp32", f"not every rank's {kind} has bf16"
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})}), why
