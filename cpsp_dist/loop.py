"""The training loop: from a configuration to a trained, evaluated, tracked run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cpsp_dist import distributed
from cpsp_dist.batch import Batch
from cpsp_dist.checkpoint import Checkpoints, Progress
from cpsp_dist.config import Config, TrainSettings, flat
from cpsp_dist.distributed import Ranks
from cpsp_dist.engine import Engine, PlainModel, TrainingState, build_engine, tune_cpu
from cpsp_dist.errors import DataError, UserError
from cpsp_dist.evaluate import evaluate
from cpsp_dist.losses import Objectives
from cpsp_dist.manifest import Manifest
from cpsp_dist.models import load_weights, model_for
from cpsp_dist.stream import EvalStream, TrainStream
from cpsp_dist.tracking import Tracker, tracking_uri

#: Settings that do not change what is computed: a run may go on with others.
FREE_TO_CHANGE = ("output", "data.", "tracking.", "checkpoint.", "engine.", "evaluation.batch")

#: Training videos whose features tell the scale that an encoder's features have.
CALIBRATION_VIDEOS = 64


@dataclass(frozen=True)
class Schedule:
    """Which steps there are: a step takes `global_batch` samples of the endless order, `samples` of them an epoch."""

    settings: TrainSettings
    samples: int

    def epoch(self, step: int) -> int:
        """The epoch in which step `step` (from 0) begins; a batch may straddle two."""
        return step * self.settings.global_batch // self.samples

    @property
    def steps(self) -> int:
        whole = math.ceil(self.settings.epochs * self.samples / self.settings.global_batch)
        return min(whole, self.settings.steps or whole)

    def learning_rate(self, step: int) -> float:
        passed = sum(self.epoch(step) >= milestone for milestone in self.settings.milestones)
        return self.settings.learning_rate * self.settings.gamma**passed

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch, or the run, is over after step `step`."""
        return step + 1 == self.steps or self.epoch(step + 1) > self.epoch(step)


def train(config: Config, ranks: Ranks, *, fresh: bool = False, allow_config_change: bool = False) -> dict[str, float]:
    """Train as configured, or go on with the run in `config.output`; the results, also in its `results.json`.

    All ranks, connected already, call it together.

    Raises:
        UserError: see the text; nothing was trained, or the last checkpoint is intact.
    """
    manifest = Manifest.load(config.data.shards)
    checkpoints = Checkpoints(config.output)
    if fresh and checkpoints.steps():
        raise UserError(f"{config.output} holds checkpoints of an earlier run; remove it, or set another output=…")
    if ranks.device.type == "cpu":
        tune_cpu()
    schedule = Schedule(config.train, len(manifest.rows("train")))
    with ExitStack() as stack:
        stream = stack.enter_context(_open_stream(config, manifest, ranks))
        _make_folder(config.output)
        state, progress = _find_state(checkpoints, config, manifest, ranks, allow_config_change)
        tracks = ranks.first and not progress.finished
        tracker = stack.enter_context(
            Tracker(config, manifest, ranks.world, run_id=progress.run_id, step=progress.step, enabled=tracks)
        )
        progress = replace(progress, run_id=tracker.run_id)
        if not progress.finished:
            progress = _train(config, schedule, manifest, ranks, stream, state, progress, checkpoints, tracker)
        results = _final_results(config, manifest, ranks, checkpoints, progress)
        tracker.log(progress.step, results)
    if ranks.first:
        _write_json(config, "results.json", results)
        _say("; ".join(f"{name} {value:.2f} %" for name, value in results.items()))
        _say(f"results in {config.output}/results.json; runs in {tracking_uri(config.output)}")
    return results


def _train(
    config: Config,
    schedule: Schedule,
    manifest: Manifest,
    ranks: Ranks,
    stream: TrainStream,
    state: TrainingState | None,
    progress: Progress,
    checkpoints: Checkpoints,
    tracker: Tracker,
) -> Progress:
    engine = build_engine(_new_model(config, manifest), config, ranks, state)
    objectives = Objectives(
        config.objectives,
        pool=config.pool.scope,
        supervision=config.model.supervision,
    )
    batches = stream.batches(progress.position)
    meter = Meter(config, schedule, ranks, stream, progress.step)
    engine.module.train()
    for step in range(progress.step, schedule.steps):
        # Dropout as a function of (seed, step, rank): no random state to lose, whatever happens to the process.
        torch.manual_seed((config.train.seed * 1_000_003 + step) * 65_537 + ranks.rank)
        learning_rate = schedule.learning_rate(step)
        norm = math.nan
        for batch in _parts(batches, config.train.accumulation, ranks.device):
            loss, terms = objectives(engine(batch), batch)
            engine.backward(loss)
            norm = engine.step(learning_rate)
            meter.add(terms)
        _require_finite(norm, terms, step)
        progress = replace(progress, step=step + 1, position=progress.position + config.train.global_batch)

        if progress.step % config.tracking.every_steps == 0 or schedule.ends_epoch(step):
            tracker.log(progress.step, meter.read(step, norm, learning_rate))
        meter.pause()
        if schedule.ends_epoch(step) and _evaluates(config, schedule, step) and "val" in manifest.splits:
            accuracy = 100 * evaluate(engine, manifest, "val", config, ranks)["accuracy"]
            tracker.log(progress.step, {"accuracy/val": accuracy})
            if progress.best_accuracy is None or accuracy > progress.best_accuracy:
                progress = replace(progress, best_accuracy=accuracy, best_step=progress.step)
            if ranks.first:
                _say(f"epoch {schedule.epoch(step) + 1}/{config.train.epochs}: val accuracy {accuracy:.2f} %")
        every = config.checkpoint.every_steps
        if schedule.ends_epoch(step) or (every and progress.step % every == 0):
            progress = replace(progress, finished=progress.step == schedule.steps)
            tracker.send()
            _save(checkpoints, engine, progress, config, ranks)
        meter.resume()
    return progress


class Meter:
    """Means of the loss terms, the rate and the time left, over the steps since it was last read."""

    def __init__(self, config: Config, schedule: Schedule, ranks: Ranks, stream: TrainStream, step: int):
        self.config, self.schedule, self.ranks, self.stream = config, schedule, ranks, stream
        self._start(step)

    def _start(self, step: int) -> None:
        self.terms: dict[str, Tensor] = {}
        self.parts, self.first_step = 0, step
        self.began, self.waited = time.monotonic(), self.stream.wait_seconds

    def pause(self) -> None:
        """Evaluations and checkpoints are not part of the rate."""
        self.paused = time.monotonic()

    def resume(self) -> None:
        self.began += time.monotonic() - self.paused

    def add(self, terms: dict[str, Tensor]) -> None:
        self.parts += 1
        for name, value in terms.items():
            self.terms[name] = self.terms.get(name, 0) + value

    def read(self, step: int, norm: float, learning_rate: float) -> dict[str, float]:
        """Metrics after `step`, the loss terms averaged over ranks (all ranks call it); also a line to read."""
        means = distributed.sum_over_ranks(torch.stack(list(self.terms.values()))) / (self.parts * self.ranks.world)
        seconds = max(time.monotonic() - self.began, 1e-9)
        done = step + 1 - self.first_step
        rate = done * self.config.train.global_batch / seconds
        wait = (self.stream.wait_seconds - self.waited) / seconds
        metrics = {f"loss/{name}": value for name, value in zip(self.terms, means.tolist(), strict=True)}
        if self.ranks.first and (step + 1) % self.config.tracking.every_steps == 0:
            left = (self.schedule.steps - step - 1) * seconds / done
            _say(
                f"step {step + 1}/{self.schedule.steps}  loss {metrics['loss/total']:.4f}  {rate:,.0f} videos/s  "
                f"waiting for data {100 * wait:.0f} %  {int(left) // 60}:{int(left) % 60:02d} left"
            )
        self._start(step + 1)
        return metrics | {
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "epoch": self.schedule.epoch(step),
            "videos_per_second": rate,
            "data_wait_share": wait,
            "skipped_samples": float(self.stream.skipped),
        }


def _open_stream(config: Config, manifest: Manifest, ranks: Ranks) -> TrainStream:
    return TrainStream(
        manifest,
        "train",
        global_batch=config.train.global_batch,
        seed=config.train.seed,
        rank=ranks.rank,
        world=ranks.world,
        accumulation=config.train.accumulation,
        threads=config.data.threads,
        depth=config.data.depth,
        check_crc=config.data.check_crc,
        on_error=config.data.on_error,
        skip_budget=config.data.skip_budget,
        pin=ranks.device.type == "cuda",
    )


def _make_folder(output: str) -> None:
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={output}: cannot make this folder: {error.strerror}") from None


def _new_model(config: Config, manifest: Manifest) -> nn.Module:
    """The network as every rank begins with it: from the seed and the scale of the features, or `model.weights`."""
    torch.manual_seed(config.train.seed)
    model = model_for(config.model, manifest)
    if config.model.weights is not None:
        load_weights(config.model.weights, model)
        return model
    with EvalStream(manifest, "train", batch=CALIBRATION_VIDEOS) as stream:
        batch = next(iter(stream))
        model.calibrate(*(x[batch.valid].float().square().mean().sqrt().item() for x in (batch.visual, batch.audio)))
    return model


def _find_state(
    checkpoints: Checkpoints, config: Config, manifest: Manifest, ranks: Ranks, allow_change: bool
) -> tuple[TrainingState | None, Progress]:
    """The newest whole checkpoint, the same one on every rank, or a fresh start."""
    choice: list[int | None] = [None]
    if ranks.first:
        choice[0], passed_over = checkpoints.newest_valid()
        for line in passed_over:
            _say(line)
    if ranks.world > 1:
        dist.broadcast_object_list(choice)
    described = config.model_dump(mode="json")
    if choice[0] is None:
        if checkpoints.steps():
            raise DataError(f"{checkpoints.folder}: no checkpoint here is whole; remove the folder to start anew")
        return None, Progress(config=described, fingerprint=manifest.fingerprint, world=ranks.world)
    state, progress = checkpoints.load(choice[0])
    changes = _changes(progress, config, manifest)
    if changes and not allow_change:
        raise UserError(
            f"{checkpoints.path(choice[0])} was written by another configuration: {'; '.join(changes)}; "
            "set another output=…, or pass --allow-config-change"
        )
    if ranks.first:
        _say(f"going on from {checkpoints.path(choice[0])}" + (" (finished)" if progress.finished else ""))
    return state, replace(progress, config=described, fingerprint=manifest.fingerprint, world=ranks.world)


def _changes(progress: Progress, config: Config, manifest: Manifest) -> list[str]:
    before, now = flat(progress.config), flat(config)
    changes = [
        f"{key} {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not key.startswith(FREE_TO_CHANGE)
    ]
    if progress.fingerprint != manifest.fingerprint:
        changes.append(f"the shards at {config.data.shards} are not the ones it was trained on")
    return changes


def _parts(batches: Iterator[Batch], count: int, device: torch.device) -> Iterator[Batch]:
    for _ in range(count):
        yield next(batches).to(device)


def _require_finite(norm: float, terms: dict[str, Tensor], step: int) -> None:
    """The norm is of averaged gradients: all ranks see the same and stop together."""
    if not math.isfinite(norm):
        bad = [name for name, value in terms.items() if not torch.isfinite(value)]
        raise UserError(
            f"step {step + 1}: the gradient is not finite"
            + (f", nor is the loss term {', '.join(bad)}" if bad else "")
            + "; lower train.learning_rate, or use train.precision=fp32"
        )


def _evaluates(config: Config, schedule: Schedule, step: int) -> bool:
    return (schedule.epoch(step) + 1) % config.evaluation.every_epochs == 0 or step + 1 == schedule.steps


def _save(checkpoints: Checkpoints, engine: Engine, progress: Progress, config: Config, ranks: Ranks) -> None:
    state = engine.capture()
    if ranks.first:
        try:
            checkpoints.save(state, progress, config.checkpoint.keep)
        except OSError as error:
            raise UserError(
                f"{checkpoints.folder}: cannot write a checkpoint: {error}; the one before is whole"
            ) from None
    distributed.barrier()


def _final_results(
    config: Config, manifest: Manifest, ranks: Ranks, checkpoints: Checkpoints, progress: Progress
) -> dict[str, float]:
    """Percentages of the weights that were best on val (the last ones without a val split), on val and test.

    What lies behind them goes to `evaluation_val.json` and `evaluation_test.json` in the run's folder.
    """
    state, _ = checkpoints.load(progress.best_step or progress.step)
    model = PlainModel(model_for(config.model, manifest), state.weights, ranks.device)
    results: dict[str, float] = {}
    for split, name in (("val", "best_val"), ("test", "test")):
        if split in manifest.splits:
            found = evaluate(model, manifest, split, config, ranks)
            results |= {f"accuracy/{name}": 100 * found["accuracy"], f"boundary_f1/{name}": 100 * found["boundary_f1"]}
            if ranks.first:
                _write_json(config, f"evaluation_{split}.json", found)
    return results


def _write_json(config: Config, name: str, content: Any) -> None:
    (Path(config.output) / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _say(line: str) -> None:
    print(line, flush=True)
