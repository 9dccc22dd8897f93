"""What a program calls: `import cpsp_dist` offers these by name, each imported when it is first used."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cpsp_dist.config import Config, load_config
from cpsp_dist.data.cache import Cache
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.distributed import process_group
from cpsp_dist.distributed.launchers import EXPORTED, read_place
from cpsp_dist.distributed.signals import StopSignals
from cpsp_dist.inference.export import tracked_model
from cpsp_dist.report.run_files import run_files
from cpsp_dist.training import evaluate as evaluation
from cpsp_dist.training import trainer
from cpsp_dist.training.agreement import facts
from cpsp_dist.utils.logs import console_by_default, run_log

#: `trainer.train` of connected ranks; at its end MLflow gets the model and the page of the run, too.
train_ranks = partial(trainer.train, export=tracked_model, report=run_files)


@dataclass(frozen=True)
class TrainResult:
    """What a finished training left.

    Attributes:
        output: the run's folder, with checkpoints, log and `results.json`; `evaluate` and `cpsp-dist export` take it.
        metrics: percentages by name, such as "accuracy/best_val" and "accuracy/test"; the same on every rank.
    """

    output: Path
    metrics: dict[str, float]


def open_shards(place: str | Path, *, cache: str | Path | None = None, cache_gb: float | None = None) -> Manifest:
    """The checked manifest of a folder or URL of shards, from which `TrainStream` and `EvalStream` read.

    A batch of these streams is valid only until the next one is asked for: its memory is filled anew. Copy what you
    keep, or use `ShardsDataset`.

    Args:
        place: folder written by `cpsp-dist shards pack`, or a URL of one (https://, s3://, ...).
        cache: folder that keeps what comes from a URL; by default that in CPSP_CACHE, or the user's cache folder.
        cache_gb: what the cache may hold, in 10^9 bytes; None: what the disk has.

    Raises:
        DataError: no shards there, or shards that are damaged or incomplete.
    """
    return Manifest.load(place, Cache(cache, cache_gb))


def train(
    config: Config | str | Path,
    overrides: Sequence[str] = (),
    *,
    fresh: bool = False,
    allow_config_change: bool = False,
) -> TrainResult:
    """Train as `cpsp-dist train` does, or resume the run in `config.output`; may be called many times in a process.

    Without a launcher it is one process. Under one, all ranks call it together; where torch.distributed is initialised
    already, its group is used and left open, else a group is made for the call. No signal handler is installed.

    Args:
        config: a `Config`, or the path of a YAML file or the name of a shipped one, as "keypad".
        overrides: settings on top of a file, as "train.seed=2"; none with a `Config`.
        fresh: refuse to resume from checkpoints in the output folder.
        allow_config_change: resume from a checkpoint of another configuration or other data.

    Raises:
        ConfigError: mistakes of the configuration, a line each.
        UserError: data, checkpoints or settings that cannot be used; the text names them.
        LostRank: another rank ended early.
        ValueError: overrides with a `Config`.
    """
    if isinstance(config, Config):
        if overrides:
            raise ValueError("overrides go with a config file; a Config is changed with model_copy")
    else:
        config = load_config(config, overrides)
    place = read_place()
    ranks = process_group.discover(place=place)
    signals = StopSignals()  # never entered: it receives nothing
    before = dict(os.environ)
    joined = dist.is_initialized()
    group: Any = nullcontext()
    if not joined:
        settings = process_group.Connection(config.engine.timeout, config.engine.heartbeat_timeout, facts(config))
        group = process_group.connected(place, ranks, settings, signals)
    try:
        with console_by_default(), run_log(config.output, ranks.rank), group:
            results = train_ranks(config, ranks, signals, fresh=fresh, allow_config_change=allow_config_change)
    finally:
        if not joined:
            if ranks.world == 1 and dist.is_initialized():  # after an exception
                dist.destroy_process_group()
            _restore_launcher_variables(before)
    return TrainResult(Path(config.output), results)


def evaluate(output: str | Path, split: str = "test", *, shards: str | Path | None = None) -> dict[str, Any]:
    """The best weights of the run in `output`, evaluated on `split` of its shards, or of others, in this process.

    `accuracy` is the published one, of segments, from 0 to 1 (`TrainResult.metrics` has percentages); `videos` how many
    there were, `step` the step of the weights.

    Raises:
        UserError: no complete checkpoint, no such split, or shards of other categories or sizes.
    """
    return evaluation.evaluate_run(str(output), split, None if shards is None else str(shards))


def _restore_launcher_variables(before: dict[str, str]) -> None:
    """As the launcher left them: LOCAL_RANK is the number of the GPU during a training."""
    for name in EXPORTED:
        os.environ.pop(name, None)
        os.environ.update({name: before[name]} if name in before else {})
