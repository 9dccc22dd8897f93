"""A model's answers on a split: the AVEL metric and what lies behind it, exact over any number of ranks."""

from __future__ import annotations

from typing import Any

import torch

from cpsp_dist.config import Config
from cpsp_dist.data.cache import Cache
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.reader import EvalStream
from cpsp_dist.distributed import process_group
from cpsp_dist.distributed.process_group import Ranks, discover, sum_over_ranks
from cpsp_dist.distributed.signals import StopSignals
from cpsp_dist.errors import UserError
from cpsp_dist.metrics import METRICS
from cpsp_dist.models import model_for
from cpsp_dist.training.checkpoint import Checkpoints
from cpsp_dist.training.engine import Forward, PlainModel


@torch.no_grad()
def evaluate(
    model: Forward,
    manifest: Manifest,
    split: str,
    config: Config,
    ranks: Ranks,
    signals: StopSignals | None = None,
) -> dict[str, Any]:
    """The results of all `METRICS` over the videos of `split`, and how many there were; background counts as a class.

    `accuracy` (0 to 1) is the published one. All ranks call it together and get the same answer; each video counts once
    whatever the world size. `skipped` counts damaged samples that `data.on_error=skip` passed over.

    Raises:
        Stopped: one of `signals` came; on all ranks.
    """
    signals = signals or StopSignals()
    was_training = model.module.training
    model.module.eval()
    seconds = manifest.fields["label"].shape[0]
    metrics = [metric(manifest.categories, seconds) for metric in METRICS.values()]
    videos = torch.zeros(2, dtype=torch.int64)  # read, skipped
    with EvalStream(
        manifest,
        split,
        batch=config.evaluation.batch,
        rank=ranks.rank,
        world=ranks.world,
        threads=config.data.threads,
        depth=config.data.depth,
        check_crc=config.data.check_crc,
        on_error=config.data.on_error,
        skip_budget=config.data.skip_budget,
        pin=ranks.device.type == "cuda",
        access=config.data.access,
    ) as stream:
        for cpu_batch in stream:
            if signals.received:
                break
            batch = cpu_batch.to(ranks.device)
            output = model(batch)
            for metric in metrics:
                metric.update(output, batch)
            videos[0] += batch.valid.sum().cpu()
        videos[1] = stream.skipped
    model.module.train(was_training)
    process_group.stop_if_asked(signals, ranks.device, "trained and saved, not yet evaluated")
    tables = [*(metric.counts for metric in metrics), videos]
    totals = sum_over_ranks(torch.cat([table.flatten() for table in tables]).to(ranks.device)).cpu()
    *sums, videos = totals.split([table.numel() for table in tables])
    for metric, counts in zip(metrics, sums, strict=True):
        metric.counts = counts.view(metric.counts.shape)
    read, skipped = videos.tolist()
    assert read + skipped == len(manifest.rows(split)), (split, read, skipped)
    found = {name: value for metric in metrics for name, value in metric.result().items()}
    return found | {"split": split, "videos": read, "skipped": skipped}


def evaluate_run(output: str, split: str, shards: str | None = None) -> dict[str, Any]:
    """`evaluate` of a run's best weights (its last ones without a val split), in this process.

    Raises:
        UserError: no checkpoint there, no such split, or shards of other categories or sizes than it was trained on.
    """
    checkpoints = Checkpoints(output)
    newest, _ = checkpoints.newest_valid()
    if newest is None:
        raise UserError(f"{output}: no whole checkpoint here; give the output folder of a training run")
    progress = checkpoints.load(newest)[1]
    state, _ = checkpoints.load(progress.best_step or newest)
    config = Config.model_validate(progress.config, strict=False)
    manifest = Manifest.load(shards or config.data.shards, Cache(config.data.cache, config.data.cache_gb))
    manifest.rows(split)
    model = model_for(config.model, manifest)
    try:
        plain = PlainModel(model, state.weights, discover().device)
    except RuntimeError as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(f"{manifest.place}: these shards do not fit the weights of {output}: {told}") from None
    return evaluate(plain, manifest, split, config, discover()) | {"step": progress.best_step or newest}
