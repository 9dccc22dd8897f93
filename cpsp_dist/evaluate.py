"""Accuracy of a model on a split: the AVEL metric, exact over any number of ranks."""

from __future__ import annotations

import torch

from cpsp_dist.config import Config
from cpsp_dist.distributed import Ranks, sum_over_ranks
from cpsp_dist.engine import Forward
from cpsp_dist.manifest import Manifest
from cpsp_dist.metrics import accuracy, confusion
from cpsp_dist.stream import EvalStream


@torch.no_grad()
def evaluate(model: Forward, manifest: Manifest, split: str, config: Config, ranks: Ranks) -> dict[str, float]:
    """Segment accuracy in percent on all videos of `split`, background counted as a class (AVEL, ECCV 2018).

    All ranks call it together and get the same answer; each video counts once whatever the world size.
    """
    was_training = model.module.training
    model.module.eval()
    size = len(manifest.categories) + 1
    table, videos = torch.zeros(size, size, dtype=torch.int64), 0
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
    ) as stream:
        for cpu_batch in stream:
            batch = cpu_batch.to(ranks.device)
            table += confusion(model(batch), batch).cpu()
            videos += int(batch.valid.sum())
        local = torch.cat([table.flatten(), torch.tensor([videos, stream.skipped])])
    model.module.train(was_training)
    *cells, videos, skipped = sum_over_ranks(local.to(ranks.device)).tolist()
    assert videos + skipped == len(manifest.rows(split)), (split, videos, skipped)
    return {
        "accuracy": 100 * accuracy(torch.tensor(cells).view(size, size)),
        "videos": float(videos),
        "skipped": float(skipped),
    }
