"""Parts of `gpu-check` on the objectives: the same as on the CPU, and pools of many ranks; see `check`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from cpsp_dist.bench.batches import network_of, random_batch
from cpsp_dist.bench.gpu_check.lines import say
from cpsp_dist.bench.large_pools import tiles
from cpsp_dist.bench.step import AUDIO, CATEGORIES
from cpsp_dist.config import Config
from cpsp_dist.losses.global_batch import GlobalBatch
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.models import MODELS, build_model
from cpsp_dist.models.layers import start_step

GPU = torch.device("cuda", 0)
#: Simulated ranks, and the videos of each.
WORLD, BATCH = 512, 64


def agree(folder: Path) -> None:
    """Loss and gradients of every network and way of mining, on the GPU and on the CPU, in float64, where both round
    alike, and in float32 without TF32."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.allow_tf32 = False
    cases: dict[str, dict[str, Any]] = {name: {"model": {"name": name}} for name in MODELS}
    cases |= {f"psp, {mining}": {"objectives": {"mining": mining}} for mining in ("proportional", "semihard", "supcon")}
    weak = {"model": {"supervision": "weak"}, "objectives": {"event": 0, "avps": 0, "psa_s": 0}}
    cases |= {"psp, sspsp": {"objectives": {"sspsp": 1.0}}, "psp, weak": weak}
    for dtype, limit in ((torch.float64, 1e-9), (torch.float32, 2e-3)):
        worst = {name: _apart(settings, dtype) for name, settings in cases.items()}
        name = max(worst, key=lambda each: worst[each])
        text = f"{str(dtype).removeprefix('torch.')}: {len(worst)} networks and objectives, CPU and GPU up to"
        say("agree", worst[name] <= limit, f"{text} {worst[name]:.1e} apart (relative; {name}), at most {limit:g}")


def _apart(settings: dict[str, Any], dtype: torch.dtype) -> float:
    """The largest difference of the loss, or of a parameter's gradient, over the largest entry of either."""
    config = Config.model_validate({"data": {"shards": "-"}, **settings})
    network = network_of(config.model.model_copy(update={"dropout": 0.0}))
    network.to(dtype).train()
    found: list[list[Tensor]] = []
    for device in (torch.device("cpu"), GPU):
        network.to(device).zero_grad()
        start_step(network, 1.0)
        batch = random_batch(8, 0).to(device, dtype)
        objectives = Objectives(config.objectives, pool="gather", supervision=config.model.supervision)
        loss = objectives(network(batch.visual, batch.audio), batch)[0]
        loss.backward()
        found.append([loss.detach().cpu(), *(p.grad.cpu().clone() for p in network.parameters() if p.grad is not None)])
    largest = max(float(x.abs().max()) for x in found[0][1:])
    apart = 0.0
    for cpu, gpu in zip(*found, strict=True):
        apart = max(apart, float((cpu - gpu).abs().max()) / max(float(cpu.abs().max()), 1e-3 * largest))
    return apart


class _Done:
    def wait(self) -> bool:
        return True


def _gather(received: Tensor, sent: Tensor, async_op: bool = False) -> _Done:
    received.view(WORLD, *sent.shape).copy_(sent.expand(WORLD, *sent.shape))
    return _Done()


def _scatter(received: Tensor, sent: Tensor, async_op: bool = False) -> _Done:
    received.copy_(sent.view(WORLD, *received.shape)[0])
    return _Done()


def scale(folder: Path) -> None:
    """The objectives of one of 512 ranks: the pool is there, nothing is sent."""
    labels = _labels()
    cases: dict[str, dict[str, Any]] = {
        "psa_v": {},
        "psa_v, proportional": {"mining": "proportional"},
        "psa_v, supcon": {"mining": "supcon"},
        "psa_v and sspsp": {"sspsp": 1.0},
    }
    torch.manual_seed(0)
    network = build_model("psp", visual_channels=512, audio_channels=AUDIO, categories=CATEGORIES).to(GPU)
    batch = random_batch(BATCH, 0).to(GPU)
    ranks = mock.patch("cpsp_dist.losses.gather.rank_and_world", return_value=(0, WORLD))
    sent = mock.patch.multiple(dist, all_gather_into_tensor=_gather, reduce_scatter_tensor=_scatter)
    with ranks, sent, mock.patch.object(dist, "get_backend", return_value="nccl"):
        for name, settings in cases.items():
            config = Config.model_validate({"data": {"shards": "-"}, "objectives": settings})
            objectives = Objectives(config.objectives, pool="gather")
            prepared = objectives.prepare(labels)
            torch.cuda.reset_peak_memory_stats()
            for count in (2, 3):
                torch.cuda.synchronize()
                began = time.perf_counter()
                for _ in range(count):
                    objectives(network(batch.visual, batch.audio), batch, prepared)[0].backward()
                torch.cuda.synchronize()
                ms = 1e3 * (time.perf_counter() - began) / count
            peak = torch.cuda.max_memory_allocated() / 1e9
            say("scale", None, f"{name}, a pool of {WORLD * BATCH:,}: {ms:.1f} ms a step, memory {peak:.2f} GB")
    for count in (65_536, 262_144):
        costs = ", ".join(f"{name} {_cost(call, rows)}" for name, (call, rows) in tiles(count, BATCH, GPU).items())
        say("scale", None, f"values and gradient of {BATCH} anchors, a pool of {count:,}: {costs}")


def _cost(call: Callable[[Tensor], None], rows: Tensor) -> str:
    """Time, and the most memory beside the rows and their gradient."""
    for _ in range(2):
        rows.grad = None
        torch.cuda.synchronize()
        kept, began = torch.cuda.memory_allocated(), time.perf_counter()
        torch.cuda.reset_peak_memory_stats()
        call(rows)
        torch.cuda.synchronize()
        ms = 1e3 * (time.perf_counter() - began)
    most = torch.cuda.max_memory_allocated() - kept - (rows.nbytes if rows.requires_grad else 0)
    return f"{ms:.1f} ms {most / 1e6:.0f} MB"


def _labels() -> GlobalBatch:
    g = torch.Generator().manual_seed(0)
    slots = WORLD * BATCH
    return GlobalBatch(
        torch.ones(slots, dtype=torch.bool),
        torch.randint(0, CATEGORIES, (slots,), generator=g),
        torch.arange(slots),
        torch.ones(slots, dtype=torch.bool),
        0,
        WORLD,
    )
