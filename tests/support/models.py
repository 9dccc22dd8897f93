"""Runs and exported models without a training, for tests of what is done with them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from cpsp_dist.config import Config, load_config
from cpsp_dist.data.encoders import Encoders
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.training.checkpoint import Checkpoints, TrainingProgress
from cpsp_dist.training.engine import TrainingState
from cpsp_dist.training.setup import initial_model
from tests.support.runs import KEYPAD, overrides


def untrained_run(shards: Path, output: Path, *more: str) -> Config:
    """An output folder with one checkpoint, of the network as a training begins with it, but for its classifiers: these
    are so large that events, background and several categories are predicted."""
    config = load_config(str(KEYPAD), overrides(shards, output, *more))
    manifest = Manifest.load(shards)
    model = initial_model(config, manifest)
    with torch.no_grad():
        for layer in (model.classifier.event, model.classifier.category):
            layer.weight *= 10
    progress = TrainingProgress(
        step=1,
        position=4,
        config=config.model_dump(mode="json"),
        fingerprint=manifest.fingerprint,
        finished=True,
        encoders=manifest.encoders.as_json(),
    )
    state = TrainingState(dict(model.state_dict()), {}, 1, {})
    Checkpoints(output).save(state, progress, keep=1)
    return config


def with_encoders(shards: Path, out: Path, encoders: Encoders) -> Path:
    """The same shards with another record of their encoders."""
    shutil.copytree(shards, out)
    replace(Manifest.load(out), encoders=encoders).save()
    return out
