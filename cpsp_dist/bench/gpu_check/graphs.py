"""Parts of `gpu-check` on the network as one piece (`engine.compile`); see `check`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from cpsp_dist.bench.batches import network_of, own_objectives, random_batch
from cpsp_dist.bench.gpu_check.device import GPU
from cpsp_dist.bench.gpu_check.lines import say
from cpsp_dist.bench.step import Variant, make_step
from cpsp_dist.config import load_config
from cpsp_dist.config.schema import TrainSettings
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.models import MODELS
from cpsp_dist.models.layers import start_step
from cpsp_dist.training.engine import build_engine, set_numerics


def compile(folder: Path) -> None:
    """A step whose network is as it is, compiled, and of CUDA graphs; in turn within each round."""
    for precision in ("fp32", "bf16"):
        steps = {
            how: make_step(Variant("ours", precision, how), 64, 512, GPU) for how in ("none", "inductor", "graphs")
        }
        for step in steps.values():
            for _ in range(5):
                step()
        rounds = [{how: _milliseconds(step) for how, step in steps.items()} for _ in range(30)]
        text = ", ".join(f"{how} {statistics.median(times[how] for times in rounds):.2f} ms" for how in steps)
        say("compile", None, f"{precision}, batch 64: {text}")


def graphs(folder: Path) -> None:
    """Every network ends with the same weights, bit for bit, with CUDA graphs of it and without."""
    set_numerics(TrainSettings(), GPU)
    cases: dict[str, list[str]] = {name: [f"model.name={name}", *own_objectives(name)] for name in MODELS}
    cases |= {f"psp, {more}": [more] for more in ("train.precision=bf16", "train.precision=fp64")}
    cases |= {f"psp, {more}": [more] for more in ("train.accumulation=2", "model.supervision=weak")}
    cases["cmran, bf16"] = ["model.name=cmran", "train.precision=bf16"]
    for name, settings in cases.items():
        plain, replayed, again = (
            _trained([*settings, f"engine.compile={how}"]) for how in ("none", "graphs", "graphs")
        )
        apart = [max(float((plain[key] - other[key]).abs().max()) for key in plain) for other in (replayed, again)]
        say("graphs", apart == [0, 0], f"{name}: 6 steps with graphs and without {max(apart):.1e} apart")
    with one_rank_of_nccl():
        plain, replayed = (_trained([f"engine.compile={how}"], world=2) for how in ("none", "graphs"))
    apart = [max(float((plain[key] - replayed[key]).abs().max()) for key in plain)]
    say("graphs", apart == [0], f"psp, within DDP over NCCL: 6 steps {apart[0]:.1e} apart")


@contextmanager
def one_rank_of_nccl() -> Iterator[None]:
    """A process group, so that DDP has one."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _trained(settings: list[str], world: int = 1) -> dict[str, torch.Tensor]:
    """The weights after 6 micro-batches, each of other videos. world: more than 1 for DDP's wrapper."""
    weak = ["objectives.event=0", "objectives.avps=0", "objectives.psa_s=0"]
    more = weak if "model.supervision=weak" in settings else []
    common = ["data.shards=none", "engine.kind=ddp", "train.global_batch=16", "train.precision=fp32"]
    config = load_config("ave_full", [*common, *settings, *more])
    engine = build_engine(network_of(config.model), config, Ranks(0, world, 0, GPU))
    objectives = Objectives(config.objectives, pool="gather", supervision=config.model.supervision)
    engine.module.train()
    for number in range(6):
        batch = random_batch(16, number).to(GPU)
        start_step(engine.module, number / 6)
        torch.manual_seed(number)
        engine.backward(objectives(engine(batch), batch)[0])
        engine.step(1e-3)
    return engine.capture().weights


def _milliseconds(work: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))
