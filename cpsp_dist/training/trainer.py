"""The training loop: from a configuration to a trained, evaluated, tracked run."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cpsp_dist.config import Config
from cpsp_dist.data.batch import Batch
from cpsp_dist.data.cache import Cache
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.reader import EvalStream, TrainStream
from cpsp_dist.distributed import process_group
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.distributed.signals import StopSignals
from cpsp_dist.errors import UserError
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.metrics import reported
from cpsp_dist.models import Output, load_weights, model_for
from cpsp_dist.tracking.mlflow import Tracker, tracking_uri
from cpsp_dist.training import gc_control
from cpsp_dist.training.checkpoint import Checkpoints, Progress, make_folder
from cpsp_dist.training.engine import (
    PRECISIONS,
    Engine,
    PlainModel,
    TrainingState,
    build_engine,
    deepspeed_settings,
    tune_cpu,
)
from cpsp_dist.training.evaluate import evaluate
from cpsp_dist.training.lr_schedule import Schedule
from cpsp_dist.training.nonfinite import Replay, Witness
from cpsp_dist.training.resume import find_state
from cpsp_dist.training.step_metrics import Audit, Meter, say

#: Training videos whose features tell the scale that an encoder's features have.
CALIBRATION_VIDEOS = 64


def train(
    config: Config,
    ranks: Ranks,
    signals: StopSignals | None = None,
    *,
    fresh: bool = False,
    allow_config_change: bool = False,
) -> dict[str, float]:
    """Train as configured, or go on with the run in `config.output`; the results, also in its `results.json`.

    All ranks, connected already, call it together. signals: an entered context, where this process listens.

    Raises:
        UserError: see the text; nothing was trained, or the last checkpoint is intact.
        Stopped: a signal asked for it; all is saved.
    """
    signals = signals or StopSignals()
    process_group.stop_if_asked(signals, ranks.device, "before anything was begun")
    manifest = Manifest.load(config.data.shards, Cache(config.data.cache, config.data.cache_gb))
    checkpoints = Checkpoints(config.output)
    if fresh and checkpoints.steps():
        raise UserError(f"{config.output} holds checkpoints of an earlier run; remove it, or set another output=…")
    if ranks.device.type == "cpu":
        tune_cpu()
    with ExitStack() as stack:
        stream = stack.enter_context(open_stream(config, manifest, ranks))
        schedule = Schedule(config.train, stream.schedule.epoch_length)
        # Both read files that the user names; a mistake there is told before anything is made.
        deepspeed_settings(config, ranks.world)
        model = new_model(config, manifest)
        _make_folder(config.output)
        state, progress = find_state(checkpoints, config, manifest, ranks, allow_config_change)
        tracker = stack.enter_context(
            Tracker(
                config,
                manifest,
                ranks.world,
                run_id=progress.run_id,
                step=progress.step,
                finished=progress.finished,
                enabled=ranks.first,
            )
        )
        if not progress.finished:
            run = Run(config, schedule, manifest, ranks, stream, checkpoints, tracker, signals)
            progress = run.train(model, state, progress)
        signals.release()
        results = _final_results(config, manifest, ranks, checkpoints, progress, signals)
        tracker.log(progress.step, results)
    if ranks.first:
        _write_json(config, "results.json", results)
        say("; ".join(f"{name} {value:.2f} %" for name, value in results.items()))
        say(f"results in {config.output}/results.json; runs in {tracking_uri(config.output)}")
    return results


@dataclass(frozen=True)
class Run:
    """What the training of a run works with."""

    config: Config
    schedule: Schedule
    manifest: Manifest
    ranks: Ranks
    stream: TrainStream
    checkpoints: Checkpoints
    tracker: Tracker
    signals: StopSignals

    def train(self, model: nn.Module, state: TrainingState | None, progress: Progress) -> Progress:
        """Train `model`, with the weights of `state` where there is one, from `progress` to the end.

        Raises:
            Stopped: a signal asked for it; all is saved.
            UserError: too many steps were not finite, or a checkpoint could not be written.
        """
        config, schedule, ranks, tracker = self.config, self.schedule, self.ranks, self.tracker
        engine = build_engine(model, config, ranks, state)
        objectives = Objectives(
            config.objectives,
            pool=config.pool.scope,
            bank=config.pool.bank,
            supervision=config.model.supervision,
        )
        if state is not None:
            objectives.load(state.objectives)
        batches = self.stream.batches(progress.position)
        meter = Meter(config, schedule, ranks, self.stream, progress.step)
        audit = Audit(config, self.manifest, ranks, progress.step)
        engine.module.train()
        begun = f"{progress.step} of {schedule.steps} steps are saved in {config.output}"
        process_group.stop_if_asked(self.signals, ranks.device, begun if progress.step else "before the first step")
        self.signals.hold()
        gc_control.collect_as_usual()
        for step in range(progress.step, schedule.steps):
            learning_rate = schedule.learning_rate(step)
            norm, witness, parts = math.nan, Witness(), []
            weights = self.stream.schedule.weights(progress.position, config.train.accumulation)
            for part, weight in enumerate(weights):
                batch = next(batches).to(ranks.device)
                audit.see(batch)
                torch.manual_seed(dropout_seed(config, step, part, ranks))
                output = witness.see(engine(batch), batch)
                loss, terms = objectives(output, batch)
                witness.hear(terms)
                engine.backward(weight * loss)
                norm = engine.step(learning_rate)
                parts.append({name: weight * value for name, value in terms.items()})
            progress = replace(progress, step=step + 1, position=progress.position + config.train.global_batch)
            if not math.isfinite(norm):
                progress = replace(progress, nonfinite=progress.nonfinite + 1)
                self._tell_nonfinite(witness, engine, progress)
            else:
                meter.add(parts)
            audit.close_step(progress.step)

            if progress.step % config.tracking.every_steps == 0 or schedule.ends_epoch(step):
                metrics = meter.read(step, norm, learning_rate) | objectives.health()
                tracker.log(progress.step, metrics | {"nonfinite_steps": float(progress.nonfinite)})
            meter.pause()
            if schedule.ends_epoch(step) and _evaluates(config, schedule, step) and "val" in self.manifest.splits:
                accuracy = 100 * evaluate(engine, self.manifest, "val", config, ranks)["accuracy"]
                tracker.log(progress.step, {"accuracy/val": accuracy})
                if progress.best_accuracy is None or accuracy > progress.best_accuracy:
                    progress = replace(progress, best_accuracy=accuracy, best_step=progress.step)
                if ranks.first:
                    say(f"epoch {schedule.epoch(step) + 1}/{config.train.epochs}: val accuracy {accuracy:.2f} %")
            progress = replace(progress, finished=progress.step == schedule.steps)
            every = config.checkpoint.every_steps
            # One tiny collective: whichever rank a signal reached, all stop after the same step.
            asked = process_group.agree(self.signals.received or 0, ranks.device)
            if asked or schedule.ends_epoch(step) or (every and progress.step % every == 0):
                self._save(engine, objectives, progress)
                tracker.send()
            if asked and not progress.finished:
                self.signals.release()
                raise process_group.stopped(asked, f"saved step {progress.step} of {schedule.steps} in {config.output}")
            meter.resume()
        return progress

    def _tell_nonfinite(self, witness: Witness, engine: Engine, progress: Progress) -> None:
        samples, budget = self.manifest.samples, self.config.train.nonfinite_budget

        def key(row: int) -> str:
            return samples[row]["key"].decode()

        told = witness.explain(key) or witness.explain_inside(self._replay(engine, progress.step - 1), key)
        text = f"step {progress.step}: the loss or its gradient is not finite: {told}"
        if progress.nonfinite > budget:
            raise UserError(
                f"{text}; this is step {progress.nonfinite} of that kind, and train.nonfinite_budget is {budget}; look "
                "at these videos, lower train.learning_rate, or use train.precision=fp32"
            )
        if self.ranks.first:
            say(f"warning: {text}; step left out ({progress.nonfinite} of at most {budget})")

    def _replay(self, engine: Engine, step: int) -> Replay:
        """The network of step `step`, a copy on each rank that needs no other one; all ranks call it together."""
        config, ranks = self.config, self.ranks
        dtype = PRECISIONS[config.train.precision]
        weights = engine.capture().weights
        network = PlainModel(model_for(config.model, self.manifest), weights, ranks.device, dtype)

        def read(rows: Tensor) -> Batch:
            # Not kept since: the reader fills a batch's memory anew, and a GPU has none to spare.
            with EvalStream(self.manifest, "train", batch=len(rows)) as stream:
                return stream.read(rows.numpy())

        def run(part: int, batch: Batch) -> Output:
            torch.manual_seed(dropout_seed(config, step, part, ranks))
            return network(batch)

        return Replay(network.module, read, run)

    def _save(self, engine: Engine, objectives: Objectives, progress: Progress) -> None:
        state = replace(engine.capture(), objectives=objectives.state())
        mistake = ""
        if self.ranks.first:
            try:
                progress = replace(progress, run_id=self.tracker.run_id)
                self.checkpoints.save(state, progress, self.config.checkpoint.keep)
            except (OSError, SafetensorError) as error:
                mistake = " ".join(str(error).split()) or repr(error)
        # All ranks wait for it, and stop together where it failed.
        if process_group.agree(bool(mistake), self.ranks.device):
            raise UserError(
                f"{self.checkpoints.folder}: cannot write the checkpoint of step {progress.step}"
                + (f": {mistake}" if mistake else "")
                + "; the ones before are whole: make room, then give the same command again"
            )


def open_stream(config: Config, manifest: Manifest, ranks: Ranks) -> TrainStream:
    return TrainStream(
        manifest,
        "train",
        global_batch=config.train.global_batch,
        seed=config.train.seed,
        rank=ranks.rank,
        world=ranks.world,
        accumulation=config.train.accumulation,
        order=config.data.order,
        epoch_end=config.data.epoch_end,
        threads=config.data.threads,
        depth=config.data.depth,
        check_crc=config.data.check_crc,
        on_error=config.data.on_error,
        skip_budget=config.data.skip_budget,
        pin=ranks.device.type == "cuda",
        access=config.data.access,
    )


def _make_folder(output: str) -> None:
    try:
        make_folder(Path(output))
    except OSError as error:
        raise UserError(f"output={output}: cannot make this folder: {error.strerror}") from None


def new_model(config: Config, manifest: Manifest) -> nn.Module:
    """The network as every rank begins with it: from the seed and the scale of the features, or `model.weights`."""
    torch.manual_seed(config.train.seed)
    model = model_for(config.model, manifest)
    if config.model.weights is not None:
        load_weights(config.model.weights, model)
        return model
    with EvalStream(manifest, "train", batch=CALIBRATION_VIDEOS, access=config.data.access) as stream:
        batch = next(iter(stream))
        model.calibrate(*(x[batch.valid].float().square().mean().sqrt().item() for x in (batch.visual, batch.audio)))
    return model


def dropout_seed(config: Config, step: int, part: int, ranks: Ranks) -> int:
    """Dropout as a function of (seed, step, micro-batch, rank): no random state to lose, whatever ends the process."""
    seed = (config.train.seed * 1_000_003 + step) * 65_537 + ranks.rank
    return (seed + part * 0x9E37_79B9_7F4A_7C15) % 2**63


def _evaluates(config: Config, schedule: Schedule, step: int) -> bool:
    return (schedule.epoch(step) + 1) % config.evaluation.every_epochs == 0 or step + 1 == schedule.steps


def _final_results(
    config: Config,
    manifest: Manifest,
    ranks: Ranks,
    checkpoints: Checkpoints,
    progress: Progress,
    signals: StopSignals,
) -> dict[str, float]:
    """Percentages of the weights that were best on val (the last ones without a val split), on val and test.

    What lies behind them goes to `evaluation_val.json` and `evaluation_test.json` in the run's folder.
    """
    state, _ = checkpoints.load(progress.best_step or progress.step)
    model = PlainModel(model_for(config.model, manifest), state.weights, ranks.device)
    results: dict[str, float] = {}
    for split, name in (("val", "best_val"), ("test", "test")):
        if split in manifest.splits:
            found = evaluate(model, manifest, split, config, ranks, signals)
            results |= {f"{key}/{name}": 100 * found[key] for key in reported()}
            if ranks.first:
                _write_json(config, f"evaluation_{split}.json", found)
    return results


def _write_json(config: Config, name: str, content: Any) -> None:
    """Results are printed and tracked too: a full disk does not cost a finished run its end."""
    try:
        (Path(config.output) / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        say(f"warning: {config.output}/{name} could not be written: {error.strerror}")
