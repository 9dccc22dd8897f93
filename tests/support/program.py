"""A program that trains several times, for the prefork: see test_python_api.py."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

import cpsp_dist
from tests.support.environment import LAUNCHER


def main(arguments: Sequence[str]) -> int:
    """`launched|alone CONFIG OUTPUT|SETTINGS ...`: a training for each.

    Alone, each is evaluated too. Whether it ends well or not, nothing keeps the network of a training (but for ZeRO-3).
    """
    how, config, *runs = arguments
    if how == "alone":
        for name in [name for name in os.environ if name.startswith(LAUNCHER)]:
            del os.environ[name]
    models = record_models()
    for run in runs:
        output, _, settings = run.partition("|")
        try:
            result = cpsp_dist.train(config, [f"output={output}", *settings.split()])
        except RuntimeError as error:
            print(f"failed: {error}", flush=True)
        else:
            if how == "alone":
                found = cpsp_dist.evaluate(result.output, "test")
                assert 100 * found["accuracy"] == result.metrics["accuracy/test"], (found, result)
        gc.collect()
        if "engine.zero=3" in settings:  # DeepSpeed 0.19's autograd functions keep it
            models[:] = []
            continue
        alive = [model() for model in models if model() is not None]
        assert not alive, f"after {output} {len(alive)} networks are in memory"
    return 0


def record_models() -> list[weakref.ref[nn.Module]]:
    """To this list each training adds its network."""
    from cpsp_dist.training import trainer

    made: list[weakref.ref[nn.Module]] = []
    make = trainer.initial_model

    def recorded(*args: Any, **kwargs: Any) -> Any:
        model = make(*args, **kwargs)
        made.append(weakref.ref(model))
        return model

    trainer.initial_model = recorded
    return made


def fail_in_training(rank: int, settings: str) -> None:
    """A bug in the second step of each training with these settings."""
    from cpsp_dist.training.trainer import Trainer

    count_step = Trainer.count_step

    def fail(self: Trainer, step: int, result: Any) -> None:
        if step == 1 and settings in self.config.output:
            raise RuntimeError("planted")
        count_step(self, step, result)

    Trainer.count_step = fail  # type: ignore[method-assign]
