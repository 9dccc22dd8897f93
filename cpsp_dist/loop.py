"""The training loop: from a configuration to a trained, evaluated, tracked run."""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from cpsp_dist import distributed
from cpsp_dist.batch import Batch
from cpsp_dist.cache import Cache
from cpsp_dist.checkpoint import Checkpoints, Progress, make_folder
from cpsp_dist.config import Config, TrainSettings, flat
from cpsp_dist.distributed import Ranks
from cpsp_dist.engine import PRECISIONS, Engine, PlainModel, TrainingState, build_engine, tune_cpu
from cpsp_dist.errors import DataError, UserError
from cpsp_dist.evaluate import evaluate
from cpsp_dist.losses import Objectives
from cpsp_dist.manifest import Manifest
from cpsp_dist.models import Output, load_weights, model_for
from cpsp_dist.nonfinite import Replay, Witness
from cpsp_dist.signals import StopSignals
from cpsp_dist.stream import EvalStream, TrainStream
from cpsp_dist.tracking import Tracker, take_back, tracking_uri

#: Settings that do not change what is computed: a run may go on with others.
FREE_TO_CHANGE = ("output", "data.", "tracking.", "checkpoint.", "engine.", "evaluation.batch")
#: But these say which samples a position stands for.
POSITION_KEYS = ("data.order", "data.epoch_end")

#: Training videos whose features tell the scale that an encoder's features have.
CALIBRATION_VIDEOS = 64


@dataclass(frozen=True)
class Schedule:
    """Which steps there are: a step takes `global_batch` positions of the endless order, `length` of them an epoch.

    `length` is `stream.schedule.epoch_length`: what `data.epoch_end` makes of the samples there are, and the same for
    any number of ranks and parts.
    """

    settings: TrainSettings
    length: int

    def epoch(self, step: int) -> int:
        """The epoch in which step `step` (from 0) begins; a batch may straddle two."""
        return step * self.settings.global_batch // self.length

    @property
    def steps(self) -> int:
        whole = math.ceil(self.settings.epochs * self.length / self.settings.global_batch)
        return min(whole, self.settings.steps or whole)

    def learning_rate(self, step: int) -> float:
        passed = sum(self.epoch(step) >= milestone for milestone in self.settings.milestones)
        return self.settings.learning_rate * self.settings.gamma**passed

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch, or the run, is over after step `step`."""
        return step + 1 == self.steps or self.epoch(step + 1) > self.epoch(step)


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
    distributed.stop_if_asked(signals, ranks.device, "before anything was begun")
    manifest = Manifest.load(config.data.shards, Cache(config.data.cache, config.data.cache_gb))
    checkpoints = Checkpoints(config.output)
    if fresh and checkpoints.steps():
        raise UserError(f"{config.output} holds checkpoints of an earlier run; remove it, or set another output=…")
    if ranks.device.type == "cpu":
        tune_cpu()
    with ExitStack() as stack:
        stream = stack.enter_context(open_stream(config, manifest, ranks))
        schedule = Schedule(config.train, stream.schedule.epoch_length)
        _make_folder(config.output)
        state, progress = _find_state(checkpoints, config, manifest, ranks, allow_config_change)
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
            progress = run.train(state, progress)
        signals.release()
        results = _final_results(config, manifest, ranks, checkpoints, progress, signals)
        tracker.log(progress.step, results)
    if ranks.first:
        _write_json(config, "results.json", results)
        _say("; ".join(f"{name} {value:.2f} %" for name, value in results.items()))
        _say(f"results in {config.output}/results.json; runs in {tracking_uri(config.output)}")
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

    def train(self, state: TrainingState | None, progress: Progress) -> Progress:
        """Train from `progress` to the end.

        Raises:
            Stopped: a signal asked for it; all is saved.
            UserError: too many steps were not finite, or a checkpoint could not be written.
        """
        config, schedule, ranks, tracker = self.config, self.schedule, self.ranks, self.tracker
        engine = build_engine(new_model(config, self.manifest), config, ranks, state)
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
        distributed.stop_if_asked(self.signals, ranks.device, begun if progress.step else "before the first step")
        self.signals.hold()
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
                    _say(f"epoch {schedule.epoch(step) + 1}/{config.train.epochs}: val accuracy {accuracy:.2f} %")
            progress = replace(progress, finished=progress.step == schedule.steps)
            every = config.checkpoint.every_steps
            # One tiny collective: whichever rank a signal reached, all stop after the same step.
            asked = distributed.agree(self.signals.received or 0, ranks.device)
            if asked or schedule.ends_epoch(step) or (every and progress.step % every == 0):
                self._save(engine, objectives, progress)
                tracker.send()
            if asked and not progress.finished:
                self.signals.release()
                raise distributed.stopped(asked, f"saved step {progress.step} of {schedule.steps} in {config.output}")
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
            _say(f"warning: {text}; step left out ({progress.nonfinite} of at most {budget})")

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
        if distributed.agree(bool(mistake), self.ranks.device):
            raise UserError(
                f"{self.checkpoints.folder}: cannot write the checkpoint of step {progress.step}"
                + (f": {mistake}" if mistake else "")
                + "; the ones before are whole: make room, then give the same command again"
            )


class Audit:
    """`audit/rank*.jsonl`: the keys of the samples that each rank trained on, a line for each step."""

    def __init__(self, config: Config, manifest: Manifest, ranks: Ranks, step: int):
        """Going on after `step`: what comes behind it in files there are, of any number of ranks, is taken back."""
        self.file = Path(config.output) / "audit" / f"rank{ranks.rank}.jsonl" if config.data.audit else None
        self.samples, self.rows = manifest.samples, list[int]()
        if self.file is None:
            return
        if ranks.first:
            self.file.parent.mkdir(exist_ok=True)
            for file in self.file.parent.glob("rank*.jsonl"):
                take_back(file, step)
        distributed.barrier()

    def see(self, batch: Batch) -> None:
        if self.file is not None:
            self.rows += batch.index[batch.valid].tolist()

    def close_step(self, step: int) -> None:
        if self.file is not None:
            keys = [self.samples[row]["key"].decode() for row in self.rows]
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "keys": keys}) + "\n")
            self.rows = []


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

    def add(self, parts: list[dict[str, Tensor]]) -> None:
        """The loss terms of a step's micro-batches."""
        self.parts += len(parts)
        for terms in parts:
            for name, value in terms.items():
                self.terms[name] = self.terms.get(name, 0) + value

    def read(self, step: int, norm: float, learning_rate: float) -> dict[str, float]:
        """Metrics after `step`, the loss terms averaged over ranks (all ranks call it); also a line to read."""
        sums = torch.stack(list(self.terms.values())) if self.terms else torch.zeros(0, device=self.ranks.device)
        means = distributed.sum_over_ranks(sums) / (max(self.parts, 1) * self.ranks.world)
        seconds = max(time.monotonic() - self.began, 1e-9)
        done = step + 1 - self.first_step
        rate = done * self.config.train.global_batch / seconds
        wait = (self.stream.wait_seconds - self.waited) / seconds
        metrics = {f"loss/{name}": value for name, value in zip(self.terms, means.tolist(), strict=True)}
        if self.ranks.first and (step + 1) % self.config.tracking.every_steps == 0:
            loss = metrics.get("loss/total", math.nan)
            left = (self.schedule.steps - step - 1) * seconds / done
            _say(
                f"step {step + 1}/{self.schedule.steps}  loss {loss:.4f}  {rate:,.0f} videos/s  "
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
        if before.get(key) != now.get(key) and (key in POSITION_KEYS or not key.startswith(FREE_TO_CHANGE))
    ]
    if progress.fingerprint != manifest.fingerprint:
        changes.append(f"the shards at {manifest.place} are not the ones it was trained on")
    return changes


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
            results |= {f"{key}/{name}": 100 * found[key] for key in ("accuracy", "event_accuracy", "boundary_f1")}
            if ranks.first:
                _write_json(config, f"evaluation_{split}.json", found)
    return results


def _write_json(config: Config, name: str, content: Any) -> None:
    """Results are printed and tracked too: a full disk does not cost a finished run its end."""
    try:
        (Path(config.output) / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        _say(f"warning: {config.output}/{name} could not be written: {error.strerror}")


def _say(line: str) -> None:
    print(line, flush=True)
