"""What a start prints before its first step: who trains what, on what, with which precision, into where."""

from __future__ import annotations

import logging

import torch
from torch import nn

from cpsp_dist.config import Config
from cpsp_dist.config.unused import without_effect
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.distributed import process_group
from cpsp_dist.distributed.card import Card, idle_gpus, own_card
from cpsp_dist.distributed.launchers import read_place
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.tracking.store import tracking_uri
from cpsp_dist.training.checkpoint import Checkpoints, TrainingProgress
from cpsp_dist.training.engine import describe_numerics, has_bf16
from cpsp_dist.training.lr_schedule import TrainingSchedule
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.redact import without_secrets

logger = logging.getLogger(__name__)


def require_videos_for_all(config: Config, ranks: Ranks) -> None:
    """Raises UserError where some ranks would have no video in any step."""
    batch = config.train.global_batch
    if batch < ranks.world:
        raise UserError(
            f"train.global_batch={batch} leaves {ranks.world - batch} of {ranks.world} ranks without a video: raise it "
            "to at least the number of ranks, or start fewer"
        )


def say_start(
    config: Config,
    manifest: Manifest,
    ranks: Ranks,
    model: nn.Module,
    schedule: TrainingSchedule,
    progress: TrainingProgress,
) -> dict[str, str]:
    """Print it, on rank 0, and return what of it MLflow's tags have; all ranks call it together."""
    cards = [Card(*card) for card in process_group.gather(tuple(vars(own_card(ranks.device)).values()))]
    if not ranks.first:
        return {}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    videos = ", ".join(f"{len(rows):,} {split}" for split, rows in manifest.splits.items())
    engine = f"DeepSpeed ZeRO {config.engine.zero}" if config.engine.kind == "deepspeed" else "DDP"
    engine += {"none": "", "inductor": ", torch.compile", "graphs": ", CUDA graphs"}[config.engine.compile]
    store = without_secrets(tracking_uri(config)) if config.tracking.enabled else "off (tracking.enabled=false)"
    logger.info(f"{describe_ranks(cards)}, {describe_numerics(config.train, ranks.device)}, {engine}")
    logger.info(f"{config.model.name}, {config.model.supervision}: {parameters:,} parameters")
    logger.info(
        f"{without_secrets(manifest.place)}: {videos} videos; {schedule.steps:,} steps of {config.train.global_batch}"
    )
    logger.info(f"MLflow: {store}")
    if ranks.device.type == "cuda" and ranks.world == 1 and config.engine.compile == "none" and config.engine.zero < 3:
        logger.info("engine.compile=graphs would train to the same weights, sooner (docs/results.md)")
    if config.train.precision == "bf16" and not has_bf16(ranks.device):
        kind = ranks.device.type.upper()
        logger.warning(f"train.precision=bf16: this {kind} only emulates it, several times slower than fp32")
    for line in [*without_effect(config), *warnings(config, cards)]:
        logger.warning(line)
    if progress.step:
        note = " (finished)" if progress.finished else ""
        logger.info(f"resuming from {Checkpoints(config.output).path(progress.step)}{note}")
    hosts, gpus = ({getattr(card, name): 0 for card in cards} for name in ("host", "gpu"))
    return {
        "host": ", ".join(hosts),
        "launcher": read_place().launcher,
        "ranks": str(len(cards)),
        "device": ", ".join(gpu or "CPU" for gpu in gpus),
    }


def describe_ranks(cards: list[Card]) -> str:
    """ "8 ranks on 2 nodes (n1, n2), NVIDIA H100", "1 rank on host, CPU (4 threads)"."""
    hosts = list(dict.fromkeys(card.host for card in cards))
    named = ", ".join(hosts[:4]) + (", …" if len(hosts) > 4 else "")
    where = named if len(hosts) == 1 else f"{len(hosts)} nodes ({named})"
    gpus = " and ".join(dict.fromkeys(card.gpu for card in cards if card.gpu))
    device = gpus or f"CPU ({torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)} each)"
    return f"{len(cards)} rank{'s' * (len(cards) > 1)} on {where}, {device}"


def warnings(config: Config, cards: list[Card]) -> list[str]:
    """What works, but wastes machines."""
    world, lines = len(cards), []
    for host, idle in idle_gpus(cards).items():
        lines.append(f"{idle} GPUs of {host} are idle; start a rank for each (torchrun --nproc-per-node)")
    micro = config.train.global_batch // config.train.accumulation
    if micro < world:
        lines.append(f"a micro-batch of {micro} videos leaves {world - micro} ranks idle; lower train.accumulation")
    if config.evaluation.global_batch < world:
        lines.append(
            f"evaluation.global_batch={config.evaluation.global_batch} is over all {world} ranks: "
            f"{world - config.evaluation.global_batch} are idle in evaluations"
        )
    return lines
