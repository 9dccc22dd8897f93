"""The training loop: from a configuration to a trained, evaluated, tracked run."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack, closing
from dataclasses import replace

import torch
from torch import Tensor, nn

from cpsp_dist.config import Config
from cpsp_dist.data.batch import Batch
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.reader import EvalStream, TrainStream
from cpsp_dist.distributed import process_group
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.distributed.signals import StopSignals
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.metrics import reported
from cpsp_dist.models import Output, model_for
from cpsp_dist.models.layers import start_step
from cpsp_dist.tracking.describe import Export, Report, Start
from cpsp_dist.tracking.environment import with_environment
from cpsp_dist.tracking.mlflow import Tracker
from cpsp_dist.training import gc_control
from cpsp_dist.training.agreement import require_same_data
from cpsp_dist.training.checkpoint import TrainingProgress
from cpsp_dist.training.engine import (
    PRECISIONS,
    Engine,
    PlainModel,
    TrainingState,
    build_engine,
    check_engine_settings,
    set_numerics,
)
from cpsp_dist.training.evaluate import evaluate, evaluate_best, write_json
from cpsp_dist.training.feed import BatchFeed
from cpsp_dist.training.header import require_videos_for_all, say_start
from cpsp_dist.training.lr_schedule import TrainingSchedule
from cpsp_dist.training.nonfinite import Replay
from cpsp_dist.training.resume import Choices, load_latest_checkpoint
from cpsp_dist.training.run_lock import run_folder, save_where_held
from cpsp_dist.training.setup import build_objectives, initial_model, open_manifest, open_train_stream
from cpsp_dist.training.step import StepResult, StepRunner, dropout_seed
from cpsp_dist.training.step_metrics import Audit, Meter
from cpsp_dist.utils.errors import UserError

logger = logging.getLogger(__name__)


def train(
    config: Config,
    ranks: Ranks,
    signals: StopSignals | None = None,
    *,
    fresh: bool = False,
    allow_config_change: bool = False,
    export: Export | None = None,
    report: Report | None = None,
) -> dict[str, float]:
    """Train as configured, or resume the run in `config.output`; the results, also in its `results.json`.

    All ranks, connected already, call it together. signals: an entered context, where this process listens; export,
    report: make what MLflow gets at the end, on rank 0.

    Raises:
        UserError: see the text; nothing was trained, or the last checkpoint is intact.
        Stopped: a signal asked for it; all is saved.
    """
    began, signals = time.time(), signals or StopSignals()
    config = with_environment(config) if ranks.first else config
    process_group.raise_if_stop_requested(signals, ranks.device, "before anything was begun")
    manifest = open_manifest(config)
    require_same_data(manifest)
    require_videos_for_all(config, ranks)
    set_numerics(config.train, ranks.device)
    choices = Choices(fresh, allow_config_change)
    with ExitStack() as stack:
        stream = stack.enter_context(open_train_stream(config, manifest, ranks))
        schedule = TrainingSchedule(config.train, stream.schedule.epoch_length)
        # Both read files that the user names; a mistake there is reported before anything is made, but for a precision
        # that contradicts them where train.precision=auto.
        check_engine_settings(config, ranks)
        model = initial_model(config, manifest)
        stack.enter_context(run_folder(config.output, write=ranks.first))
        config, state, progress = load_latest_checkpoint(config, manifest, ranks, choices, schedule.steps, model)
        check_engine_settings(config, ranks)  # now that the precision is settled
        about = say_start(config, manifest, ranks, model, schedule, progress)
        tracker = Tracker(
            config,
            manifest,
            ranks.world,
            run_id=progress.run_id,
            step=progress.step,
            finished=progress.finished,
            enabled=ranks.first,
            start=Start(began, about, export, report),
        )
        results = _trained(tracker, ranks, signals, stream, model, state, progress)
        if ranks.first:
            write_json(config, "results.json", results)
            logger.info("; ".join(f"{name} {value:.2f} %" for name, value in results.items()))
            logger.info(f"results in {config.output}/results.json")
            if config.tracking.enabled:
                logger.info(tracker.where())
    return results


def _trained(
    tracker: Tracker,
    ranks: Ranks,
    signals: StopSignals,
    stream: TrainStream,
    model: nn.Module,
    state: TrainingState | None,
    progress: TrainingProgress,
) -> dict[str, float]:
    """The results of training from `progress` to the end, tracked."""
    config, manifest = tracker.config, tracker.manifest
    with tracker:
        if not progress.finished:
            engine, objectives = build_engine(model, config, ranks, state), build_objectives(config, state)
            progress = Trainer(config, manifest, ranks, stream, engine, objectives, tracker, signals).train(progress)
        signals.allow_exit()
        results = evaluate_best(config, manifest, ranks, progress, signals)
        tracker.log(progress.step, results)
        tracker.keep_results(progress.best_step or progress.step)
    return results


class Trainer:
    """The loop over the steps of one run. Every method below is called by all ranks together."""

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        ranks: Ranks,
        stream: TrainStream,
        engine: Engine,
        objectives: Objectives,
        tracker: Tracker,
        signals: StopSignals,
    ):
        self.config, self.manifest, self.ranks, self.stream = config, manifest, ranks, stream
        self.engine, self.objectives, self.tracker, self.signals = engine, objectives, tracker, signals
        self.schedule = TrainingSchedule(config.train, stream.schedule.epoch_length)
        self.steps = StepRunner(config, ranks, stream.schedule, engine, objectives)

    def train(self, progress: TrainingProgress) -> TrainingProgress:
        """Train from `progress` to the end.

        Raises:
            Stopped: a signal asked for it; all is saved.
            UserError: too many steps were not finite, or a checkpoint could not be written.
        """
        try:
            self.begin(progress)
            with closing(self.audit):
                for step in range(progress.step, self.schedule.steps):
                    result = self.run_micro_batches(step)
                    self.count_step(step, result)
                    self.log_step(step, result)
                    with self.meter.paused():
                        self.validate(step)
                        # One tiny collective: whichever rank a signal reached, all stop after the same step.
                        stop_signal = process_group.all_reduce_max(self.signals.received or 0, self.ranks.device)
                        self.save_if_due(step, stop_signal)
                        self.stop_if_requested(stop_signal)
        finally:  # a program may continue, and train again
            self.engine.close()
        return self.progress

    def begin(self, progress: TrainingProgress) -> None:
        """Make ready for the first step; the last point at which a signal costs nothing."""
        self.progress = progress
        self.meter = Meter(self.config, self.schedule, self.ranks, self.stream, progress.step)
        self.audit = Audit(self.config, self.manifest, self.ranks, progress.step)
        self.feed = BatchFeed(self.stream, self.ranks.device, self.objectives, progress.position)
        self.engine.module.train()
        saved = f"{progress.step} of {self.schedule.steps} steps are saved in {self.config.output}"
        process_group.raise_if_stop_requested(
            self.signals, self.ranks.device, saved if progress.step else "before the first step"
        )
        self.signals.require_checkpoint()
        gc_control.restore_gc()

    def run_micro_batches(self, step: int) -> StepResult:
        """Forward, backward and update of step `step` (from 0)."""
        learning_rate = self.schedule.learning_rate(step)
        return self.steps.run_micro_batches(self.feed, step, self.progress.position, learning_rate)

    def count_step(self, step: int, result: StepResult) -> None:
        """Count the step as done, or as left out because it was not finite."""
        position = self.progress.position + self.config.train.global_batch
        finished = step + 1 == self.schedule.steps
        self.progress = replace(self.progress, step=step + 1, position=position, finished=finished)
        if result.finite:
            self.meter.add(result.micro_losses)
        else:
            self.progress = replace(self.progress, nonfinite=self.progress.nonfinite + 1)
            self._handle_nonfinite_step(result)
        self.audit.write_step(self.progress.step, result.diagnostics.rows())

    def log_step(self, step: int, result: StepResult) -> None:
        """Every `tracking.every_steps` and at the end of an epoch: means since the last time, to metrics and MLflow."""
        if self.progress.step % self.config.tracking.every_steps and not self.schedule.ends_epoch(step):
            return
        metrics = self.meter.read(step, result.grad_norm, result.learning_rate) | self.objectives.health()
        self.tracker.log(self.progress.step, metrics | {"nonfinite_steps": float(self.progress.nonfinite)})

    def validate(self, step: int) -> None:
        """Every `evaluation.every_epochs` and at the end: accuracy on val, and whether it is the best so far."""
        epoch = self.schedule.epoch(step) + 1
        due = self.schedule.ends_epoch(step) and (
            epoch % self.config.evaluation.every_epochs == 0 or step + 1 == self.schedule.steps
        )
        if not due or "val" not in self.manifest.splits:
            return
        found = evaluate(self.engine, self.manifest, "val", self.config, self.ranks)
        accuracy = 100 * found["accuracy"]
        if self.progress.best_accuracy is None or accuracy > self.progress.best_accuracy:
            self.progress = replace(self.progress, best_accuracy=accuracy, best_step=self.progress.step)
        best = self.schedule.epoch((self.progress.best_step or 1) - 1) + 1
        self.tracker.log(self.progress.step, {f"{n}/val": 100 * found[n] for n in reported()} | {"best_epoch": best})
        if self.ranks.first:
            logger.info(f"epoch {epoch}/{self.config.train.epochs}: val accuracy {accuracy:.2f} %")

    def save_if_due(self, step: int, stop_signal: int) -> None:
        """A checkpoint every `checkpoint.every_steps`, at the end of an epoch, and before the run stops."""
        every = self.config.checkpoint.every_steps
        if stop_signal or self.schedule.ends_epoch(step) or (every and self.progress.step % every == 0):
            self._save()
            self.tracker.send()

    def stop_if_requested(self, stop_signal: int) -> None:
        """Raises Stopped where a signal asked for it, and there is anything left to do."""
        if stop_signal and not self.progress.finished:
            self.signals.allow_exit()
            saved = f"saved step {self.progress.step} of {self.schedule.steps} in {self.config.output}"
            raise process_group.stopped(stop_signal, saved)

    def _save(self) -> None:
        state = replace(self.engine.capture(), objectives=self.objectives.state())
        problem = ""
        if self.ranks.first:
            progress = replace(self.progress, run_id=self.tracker.run_id)
            problem = save_where_held(self.config, state, progress)
        # All ranks wait for it, and stop together where it failed.
        if process_group.all_reduce_max(bool(problem), self.ranks.device):
            raise UserError(
                problem or f"{self.config.output}: cannot write the checkpoint of step {self.progress.step}"
            )

    def _handle_nonfinite_step(self, result: StepResult) -> None:
        """Name the cause. Raises UserError where there were more such steps than `train.max_nonfinite_steps`."""
        samples, budget, step = self.manifest.samples, self.config.train.max_nonfinite_steps, self.progress.step

        def key(row: int) -> str:
            return str(samples[row]["key"], encoding="utf-8")

        diagnostics = result.diagnostics
        cause = diagnostics.diagnose_loss(key) or diagnostics.diagnose_backward(self._replay(step - 1), key)
        text = f"step {step}: the loss or its gradient is not finite: {cause}"
        if self.progress.nonfinite > budget:
            raise UserError(
                f"{text}; this is step {self.progress.nonfinite} of that kind, "
                f"and train.max_nonfinite_steps is {budget}; look at these videos, "
                "lower train.learning_rate, or use train.precision=fp32"
            )
        if self.ranks.first:
            logger.warning(f"{text}; step left out ({self.progress.nonfinite} of at most {budget})")

    def _replay(self, step: int) -> Replay:
        """The network of step `step`, a copy on each rank that needs no other one."""
        config, ranks = self.config, self.ranks
        weights = self.engine.capture().weights
        model = model_for(config.model, self.manifest)
        network = PlainModel(model, weights, ranks.device, PRECISIONS[config.train.precision])
        start_step(model, self.schedule.progress(step))

        def read(rows: Tensor) -> Batch:
            # Read again: the reader fills a batch's memory anew, and a GPU has no memory to spare for copies.
            with EvalStream(self.manifest, "train", batch=len(rows)) as stream:
                return stream.read(rows.numpy())

        def run(micro_batch: int, batch: Batch) -> Output:
            torch.manual_seed(dropout_seed(config, step, micro_batch, ranks))
            return network(batch)

        return Replay(network.module, read, run)
