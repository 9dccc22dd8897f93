"""What `train.precision=auto` is in a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from cpsp_dist.config import Config, flat
from cpsp_dist.distributed.process_group import Ranks, all_reduce_max
from cpsp_dist.training.engine import has_bf16

logger = logging.getLogger(__name__)

SETTLED = ("bf16", "fp32")


def settle_precision(config: Config, ranks: Ranks, saved: Mapping[str, Any]) -> Config:
    """The configuration with bf16 or fp32 in place of auto: as in `saved`, the configuration of the checkpoint that is
    resumed ({} for a new run), so that a run stays what it is on other machines; where that has neither, bf16 where the
    devices of all ranks compute in it. All ranks call it together."""
    if config.train.precision != "auto":
        return config
    before = flat({**saved}).get("train.precision")
    if before in SETTLED:
        precision, why = str(before), "as in the checkpoint"
    elif all_reduce_max(int(not has_bf16(ranks.device)), ranks.device):
        precision, why = "fp32", f"not every rank's {ranks.device.type.upper()} computes in bf16"
    else:
        precision, why = "bf16", f"every rank's {ranks.device.type.upper()} computes in it"
    if ranks.first:
        logger.info(f"train.precision=auto is {precision} in this run: {why}")
    return with_precision(config, precision)


def with_precision(config: Config, precision: str) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
