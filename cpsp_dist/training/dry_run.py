"""`python -m cpsp_dist.train --dry-run`: the plan of a run, and its first step; nothing is written."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cpsp_dist.config import Config
from cpsp_dist.config.unused import without_effect
from cpsp_dist.config.yaml_text import write_yaml
from cpsp_dist.data.manifest import ARRAY_FIELDS, Manifest
from cpsp_dist.data.reader import TrainStream
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.losses.tiles import tile_width
from cpsp_dist.training.agreement import require_same_data
from cpsp_dist.training.checkpoint import Checkpoints, TrainingProgress
from cpsp_dist.training.engine import PRECISIONS, build_engine, check_engine_settings, deepspeed_settings, set_numerics
from cpsp_dist.training.feed import BatchFeed
from cpsp_dist.training.header import require_videos_for_all
from cpsp_dist.training.lr_schedule import TrainingSchedule
from cpsp_dist.training.resume import Choices, load_latest_checkpoint
from cpsp_dist.training.run_lock import require_startable
from cpsp_dist.training.setup import build_objectives, initial_model, open_manifest, open_train_stream
from cpsp_dist.training.step import StepRunner
from cpsp_dist.training.step_metrics import average_losses
from cpsp_dist.utils.console import echo, table
from cpsp_dist.utils.text import format_bytes

_size = partial(format_bytes, digits=2)
#: Tables of an anchor's distances to a tile of the pool that mining has at a time (distances, keys, masks).
TABLES = 4


def dry_run(config: Config, ranks: Ranks, world: int, choices: Choices | None = None) -> None:
    """Print the plan for `world` ranks, on rank 0. All ranks, connected already, call it together.

    One process may plan for more: it then takes the step that rank 0 would, with its own share as the pool.

    Raises:
        UserError: what a training would raise before its first step.
    """
    manifest = open_manifest(config)
    require_same_data(manifest)
    require_videos_for_all(config, replace(ranks, world=world))
    set_numerics(config.train, ranks.device)
    planned = replace(ranks, world=world)
    with open_train_stream(config, manifest, planned) as stream:
        check_engine_settings(config, planned)
        model = initial_model(config, manifest)
        parameters = sum(p.numel() for p in model.parameters())
        checkpoint = Checkpoints.bytes_needed(model, config)
        schedule = TrainingSchedule(config.train, stream.schedule.epoch_length)
        require_startable(config.output, write=ranks.first)
        choices = choices or Choices()
        config, _, progress = load_latest_checkpoint(config, manifest, ranks, choices, schedule.steps, model)
        check_engine_settings(config, planned)  # now that the precision is settled
        # Checked above for the planned ranks; this process alone has another share of the batch.
        checked = config.engine.model_copy(update={"ignore_conflicts": True})
        if checked.compile == "graphs":  # whose warm-up would count among the activations
            checked = checked.model_copy(update={"compile": "none"})
        step = first_step(model, config.model_copy(update={"engine": checked}), ranks, stream, schedule)
    if not ranks.first:
        return
    memory = memory_of_a_rank(parameters, config, manifest, ranks.device, world, step.activations, step.width)
    plain = ", without CUDA graphs" if config.engine.compile == "graphs" else ""
    sections = {
        "Settings": _settings(config),
        "Data": _data_plan(config, manifest, schedule, world),
        f"Memory of a rank, of {world} on {ranks.device.type} (estimate)": _memory(memory, parameters, config),
        "Output": _output(config, progress, *checkpoint),
        f"First step, on {ranks.device.type}{plain}": _step(step, ranks, world),
    }
    for title, lines in sections.items():
        echo(title, *(f"  {line}" for line in lines))
    echo("Nothing was written." if manifest.remote is None else "Nothing was written but fetched shards, to the cache.")


@dataclass(frozen=True)
class FirstStep:
    """The first optimizer step of a run.

    Attributes:
        losses: loss terms, means over all ranks. seconds: without the wait for data.
        activations: bytes that a micro-batch of this rank keeps for the backward pass. width: of the pool's rows.
        peak: most bytes of memory so far. received: bytes that the pool received from other ranks.
    """

    losses: dict[str, float]
    grad_norm: float
    seconds: float
    activations: int
    width: int
    peak: int
    received: int


def first_step(
    model: nn.Module, config: Config, ranks: Ranks, stream: TrainStream, schedule: TrainingSchedule
) -> FirstStep:
    """The first step, made by the same code as in a training, and measured; all ranks call it together."""
    engine, objectives = build_engine(model, config, ranks), build_objectives(config)
    engine.module.train()
    kept, widths = [0], [0]

    @contextmanager
    def measure() -> Iterator[None]:
        with _activations(engine.module) as count:
            yield
        kept.append(count())

    hook = engine.module.register_forward_hook(lambda _, __, output: widths.append(output.fusion.shape[-1]))
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    steps = StepRunner(config, ranks, stream.schedule, engine, objectives)
    result = steps.run_micro_batches(
        BatchFeed(stream, ranks.device, objectives), 0, 0, schedule.learning_rate(0), measure
    )
    seconds = time.perf_counter() - began - stream.wait_seconds
    hook.remove()
    engine.close()
    first, *rest = result.micro_losses
    sums = {name: sum((losses[name] for losses in rest), value) for name, value in first.items()}
    return FirstStep(
        losses=average_losses(sums, len(result.micro_losses), ranks),
        grad_norm=result.grad_norm,
        seconds=seconds,
        activations=max(kept),
        width=max(widths),
        peak=_peak_memory(ranks),
        received=objectives.traffic.bytes,
    )


def _peak_memory(ranks: Ranks) -> int:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def _activations(module: nn.Module) -> Iterator[Callable[[], int]]:
    """Counts the bytes that autograd keeps for the backward pass, each storage once, without the parameters."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Anew each time: ZeRO 3 gathers parameters for the moment.
        if storage.data_ptr() not in {p.data.untyped_storage().data_ptr() for p in module.parameters()}:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(kept.values())


def memory_of_a_rank(
    parameters: int,
    config: Config,
    manifest: Manifest,
    device: torch.device,
    world: int,
    activations: int,
    width: int,
) -> dict[str, float]:
    """Bytes by purpose. activations: bytes, measured; width: of the pool's rows."""
    stage = 0
    if config.engine.kind == "deepspeed":
        stage = deepspeed_settings(config, world)["zero_optimization"]["stage"]
    weight = PRECISIONS[config.train.precision].itemsize
    state = 8 if config.train.precision == "fp64" else 4
    if config.engine.kind == "ddp":
        weight = state  # bf16 by autocast: the weights stay float32
    share = {at: 1 / world if stage >= at else 1 for at in (1, 2, 3)}
    slots = samples_of_a_rank(config, world)
    parts = config.train.accumulation if config.pool.over == "parts" else 1
    anchors = parts * slots
    pool = anchors * (world if config.pool.scope == "gather" else 1) + config.pool.bank
    ddp_buckets = config.engine.kind == "ddp" and world > 1
    batch = slots * sum(manifest.fields[name].nbytes for name in ARRAY_FIELDS)
    memory = {
        "weights": parameters * weight * share[3],
        "gradients": parameters * weight * share[2] * (2 if ddp_buckets else 1),
        "float32 weights": parameters * 4 * share[1] if stage else 0,
        "Adam": parameters * 2 * state * share[1] if config.train.optimizer == "adam" else 0,
        "reader": (config.data.prefetch_batches + 1) * batch,
        "activations": activations,
    }
    if parts > 1:
        memory["parts"] = parts * batch
    if config.objectives.psa_v:
        memory["pool"] = pool * width * 4 + TABLES * anchors * min(pool, tile_width(max(anchors, width), device)) * 4
    return memory


def samples_of_a_rank(config: Config, world: int) -> int:
    """Slots of a micro-batch on a rank."""
    return -(-config.train.global_batch // (config.train.accumulation * world))


def _settings(config: Config) -> list[str]:
    content = config.model_dump(mode="json")
    lines: list[str] = write_yaml(content, default_flow_style=None, width=110).splitlines()
    return lines + [f"warning: {line}" for line in without_effect(config)]


def _data_plan(config: Config, manifest: Manifest, schedule: TrainingSchedule, world: int) -> list[str]:
    train = config.train
    fields = ", ".join(f"{name} {np.dtype(f.dtype).name} {list(f.shape)}" for name, f in manifest.fields.items())
    lines = [f"{manifest.place}: {len(manifest.categories)} categories; {fields}"]
    for name, rows in manifest.splits.items():
        shards = [shard for shard in manifest.shards if shard.split == name]
        size = sum(shard.filesize for shard in shards)
        lines.append(f"{name}: {len(rows):,} samples in {len(shards):,} shard{'s' * (len(shards) > 1)}, {_size(size)}")
    sample = sum(manifest.fields[name].nbytes for name in ARRAY_FIELDS)
    each = samples_of_a_rank(config, world)
    text = f"global batch: {train.global_batch} samples, {each} at a time on each of {world} rank{'s' * (world > 1)}"
    lines.append(text + (f", in {train.accumulation} micro-batches" if train.accumulation > 1 else ""))
    stop = f", stopped by train.steps={train.steps}" if schedule.steps == train.steps else ""
    lines.append(f"steps: {schedule.steps:,}, for {train.epochs} epochs of {schedule.length:,} samples{stop}")
    a_rank = each * train.accumulation * sample
    lines.append(f"a step reads {_size(train.global_batch * sample)}, {_size(a_rank)} of it on a rank")
    if "val" in manifest.splits:
        every = config.evaluation.every_epochs
        lines.append(f"val is evaluated every {f'{every} epochs' if every > 1 else 'epoch'}, and at the end")
    return lines


def _memory(memory: dict[str, float], parameters: int, config: Config) -> list[str]:
    remarks = {
        "weights": f"{parameters:,} parameters, {config.train.precision}",
        "float32 weights": "ZeRO's own",
        "Adam": "two moments of each weight",
        "reader": f"data.prefetch_batches + 1 = {config.data.prefetch_batches + 1} batches (not on a GPU)",
        "activations": "measured: kept for the backward pass of a micro-batch",
        "parts": "features of all parts of a global batch, for their second pass",
        "pool": "gathered rows and distances" if config.pool.scope == "gather" else "distances",
    }
    if config.engine.kind == "deepspeed" and config.engine.zero:
        remarks["gradients"] = f"ZeRO {config.engine.zero}"
    rows = {name: (size, remarks.get(name, "")) for name, size in memory.items() if size}
    rows["together"] = sum(memory.values()), "without Python and its libraries"
    # The lines are indented below a title, so that they do not fit a terminal's width.
    text = table([{"for": name, "bytes": _size(size), "": text} for name, (size, text) in rows.items()], fits=False)
    return text.splitlines()


def _output(config: Config, progress: TrainingProgress, one: int, most: int) -> list[str]:
    state = "exists, without a checkpoint" if Path(config.output).exists() else "new"
    if progress.step:
        state = f"holds checkpoints, the newest of step {progress.step}: a start resumes from there"
        state += " (finished: it evaluates only)" if progress.finished else ""
    return [f"{config.output}: {state}", f"checkpoints of {_size(one)}, up to {_size(most)} at a time"]


def _step(step: FirstStep, ranks: Ranks, world: int) -> list[str]:
    total = step.losses["total"]
    alone = f" (of rank 0's share alone, of {world})" if world > ranks.world else ""
    rest = ", ".join(f"{name} {value:.4g}" for name, value in step.losses.items() if name != "total")
    peak = "of this process, libraries included" if ranks.device.type == "cpu" else "on the GPU"
    lines = [
        f"loss {total:.9g}{alone}: {rest}",
        f"gradient norm {step.grad_norm:.6g}",
        f"{step.seconds:.2f} s (a first step is slower than the others)",
        f"most memory so far: {_size(step.peak)} {peak}",
    ]
    if ranks.world > 1:
        lines.append(f"the pool received {_size(step.received)} from other ranks")
    if not all(map(math.isfinite, (total, step.grad_norm))):
        lines.append("warning: not finite: look at the features, lower train.learning_rate, or train.precision=fp32")
    return lines
