"""The vectors of the later models, CMBS and CACE-Net (see tests/data/README.md).

CPSP_LATER_REFERENCE names a file made from another seed. Inputs and weights are made by `recipe.py`, as in `reference`.
"""

from __future__ import annotations

import json
import os
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpsp_dist.data.batch import Batch
from cpsp_dist.models import Network, build_model
from cpsp_dist.models.published import translate
from tests.support import reference
from tests.support.environment import DATA

DEFAULT = DATA / "reference" / "later_models_seed1.npz"
#: What the published training sets; the networks' own defaults are those of CMBS and CACE-Net, fully supervised.
PUBLISHED = {"cmbs_weak": {"alpha": 0.2, "beta": 0.5, "gamma": 0.5, "weak_gates": "published"}}


@cache
def vectors() -> dict[str, np.ndarray]:
    with np.load(os.environ.get("CPSP_LATER_REFERENCE", DEFAULT)) as file:
        return dict(file)


@cache
def meta() -> dict[str, Any]:
    return json.loads(vectors()["meta"].tobytes())


def expected(key: str) -> Tensor:
    return torch.from_numpy(np.asarray(vectors()[key]))


def checkpoint(case: str, shapes: dict[str, list[int]] | None = None) -> dict[str, Tensor]:
    """A case's weights under their published names; of other shapes, where given."""
    described, make = meta()["cases"][case], reference.recipe().weight
    shapes = described["shapes"] if shapes is None else shapes
    return {
        name: torch.from_numpy(make(meta()["seed"], f"{described['weights_of']}/{name}", tuple(shape)))
        for name, shape in shapes.items()
    }


def network(case: str, categories: int = 28) -> Network:
    """Ours with the weights of a case, float64, in training mode without dropout and noise."""
    name, supervision = case.split("_")[:2]
    settings = {"dropout": 0.0, "noise": 0.0} | PUBLISHED.get(case, {})
    sizes = {"visual_channels": 512, "audio_channels": 128, "categories": categories}
    model = build_model(name, supervision=supervision, **sizes, **settings)  # type: ignore[arg-type]
    model.load_state_dict(translate(checkpoint(case), name))
    model.start_step(1.0 if case.endswith("switched") else 0.0)
    return model.double()


def batch(case: str) -> Batch:
    """A case's features and labels; the video that is background throughout has class 28 with weak supervision."""
    size, seed, recipe = meta()["batch"], meta()["seed"], reference.recipe()
    named = meta()["cases"][case]["weights_of"]
    labels, category = recipe.labels(seed, named, size, 28)
    event = torch.from_numpy(labels[:, :, :-1].max(-1) > 0)
    classes = torch.from_numpy(category.astype(np.int64))
    if "weak" in case:
        classes = torch.where(event.any(1), classes, 28)
    numbers = torch.arange(size)
    visual = torch.from_numpy(recipe.visual(seed, named, size, 512, "BTHWC"))
    audio = torch.from_numpy(recipe.audio(seed, named, size))
    return Batch(visual, audio, event, classes, numbers >= 0, numbers, numbers)
