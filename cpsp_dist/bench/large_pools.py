"""What pools beyond a batch cost: tables in tiles, and a pool over all parts of a global batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cpsp_dist.bench.batches import AUDIO, CATEGORIES, SEGMENTS, VISUAL, WIDTH, random_batch
from cpsp_dist.bench.memory import peak_bytes
from cpsp_dist.config import Config
from cpsp_dist.data.batch import Batch
from cpsp_dist.data.reader.schedule import ReadSchedule
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.losses.mining import mine
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.losses.sspsp import sspsp
from cpsp_dist.losses.supcon import supcon
from cpsp_dist.models import build_model
from cpsp_dist.training.engine import build_engine
from cpsp_dist.training.feed import MicroBatch
from cpsp_dist.training.step import StepRunner

PARTS = 4


def measure_tiles(ranks: Ranks, anchors: int, pools: list[int]) -> dict[str, dict[str, dict[str, float]]]:
    """For each pool of N videos and each way: CPU `ms` of the values and their gradient, and `peak_bytes`, the most
    memory beside the pool's rows [N, 256] (SSPSP: [N, 10, 256]) and their gradient."""
    return {
        str(count): {name: _cost(call, rows) for name, (call, rows) in tiles(count, min(anchors, count)).items()}
        for count in pools
    }


def tiles(
    count: int,
    anchors: int,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> dict[str, tuple[Callable[[Tensor], None], Tensor]]:
    """What compares `anchors` videos with a pool of `count`, by name: a call for its values and their gradient, and the
    rows [N, 256] or [N, 10, 256] to call it with."""
    g = torch.Generator().manual_seed(count)
    category = torch.randint(0, CATEGORIES, (count,), generator=g).to(device)
    video = torch.arange(count, device=device)
    own = video[:anchors]

    def mined(rows: Tensor) -> None:
        mine(rows[:anchors], own, rows, category, video, 3)

    def softly(rows: Tensor) -> None:
        supcon(rows[:anchors].detach(), own, rows, category, video, 0.1).sum().backward()

    def self_supervised(rows: Tensor) -> None:
        sspsp(rows[:anchors].detach(), own, rows, 0.1).sum().backward()

    def rows(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device)

    return {
        "mining": (mined, rows(count, WIDTH)),
        "supcon": (softly, rows(count, WIDTH).requires_grad_()),
        "sspsp": (self_supervised, rows(count, SEGMENTS, WIDTH).requires_grad_()),
    }


def _cost(call: Callable[[Tensor], None], rows: Tensor) -> dict[str, float]:
    began = time.process_time()
    call(rows)
    ms = 1e3 * (time.process_time() - began)
    rows.grad = None
    return {"ms": ms, "peak_bytes": peak_bytes(lambda: call(rows)) - (rows.nbytes if rows.requires_grad else 0)}


@dataclass
class _Feed:
    """Gives the same batches again."""

    batches: list[Batch]
    taken: int = field(default=0)

    def take(self) -> MicroBatch:
        batch = self.batches[self.taken % len(self.batches)]
        self.taken += 1
        return MicroBatch(batch, torch.where(batch.valid, batch.index, -1), None)

    def prefetch(self) -> None:
        return


def measure_parts(ranks: Ranks, size: int, rounds: int) -> dict[str, Any]:
    """A step of PSP at the published sizes over 4 parts of `size` videos, with a pool for each part and one for all:
    CPU `ms`, in turn, medians; `peak_bytes` of a step; `pool`, rows that an anchor is compared with."""
    found: dict[str, dict[str, Any]] = {"part": {}, "parts": {}}
    steps: dict[str, Callable[[], object]] = {}
    batches = [random_batch(size, number) for number in range(PARTS)]
    for over in found:
        train = {"global_batch": size * PARTS, "optimizer": "sgd", "accumulation": PARTS, "precision": "fp32"}
        described = {"data": {"shards": "-"}, "engine": {"kind": "ddp"}, "train": train, "pool": {"over": over}}
        config = Config.model_validate(described)
        model = build_model("psp", visual_channels=VISUAL, audio_channels=AUDIO, categories=CATEGORIES)
        objectives = Objectives(config.objectives, pool="gather", parts=PARTS if over == "parts" else 1)
        engine = build_engine(model, config, ranks)
        schedule = ReadSchedule([size * PARTS], global_batch=size * PARTS, seed=1, accumulation=PARTS)
        runner = StepRunner(config, ranks, schedule, engine, objectives)
        feed: Any = _Feed(batches)
        steps[over] = partial(runner.run_micro_batches, feed, 0, 0, 0.0)
        steps[over]()
        found[over]["pool"] = objectives.health()["pool/size"]
    times: dict[str, list[float]] = {over: [] for over in steps}
    for _ in range(rounds):
        for over, step in steps.items():
            began = time.process_time()
            step()
            times[over].append(1e3 * (time.process_time() - began))
    for over, step in steps.items():
        found[over] |= {"ms": statistics.median(times[over]), "peak_bytes": peak_bytes(step)}
    return found
