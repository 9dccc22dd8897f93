"""The reference vectors of the encoders: keras.applications' VGG-19 and torchvggish (see tests/data/README.md).

CPSP_ENCODER_REFERENCE names a file made from another seed.
"""

from __future__ import annotations

import json
import os
from functools import cache
from typing import Any

import numpy as np

from tests.support.environment import DATA
from tests.support.reference import recipe

DEFAULT = DATA / "reference" / "encoders_seed1.npz"


@cache
def vectors() -> dict[str, np.ndarray]:
    with np.load(os.environ.get("CPSP_ENCODER_REFERENCE", DEFAULT)) as file:
        return dict(file)


@cache
def meta() -> dict[str, Any]:
    return json.loads(vectors()["meta"].tobytes())


def seconds() -> np.ndarray:
    """The waveform's seconds [3, 16000]."""
    return recipe().waveform(meta()["seed"], len(vectors()["log_mel"])).reshape(-1, 16000)


def images() -> np.ndarray:
    return recipe().images(meta()["seed"], len(vectors()["vgg19_caffe"]))


def weight(name: str, shape: list[int]) -> np.ndarray:
    return recipe().encoder_weight(meta()["seed"], name, tuple(shape))
