"""The reference vectors: what the published code computes, in float64 (see tests/data/README.md).

CPSP_REFERENCE names a file made from another seed. Inputs and weights are made from its seed by the `recipe.py` that
comes with the vectors.
"""

from __future__ import annotations

import importlib.util
import json
import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpsp_dist.data.batch import Batch
from tests.support.environment import DATA

DEFAULT = DATA / "reference" / "published_seed1.npz"


@cache
def vectors() -> dict[str, np.ndarray]:
    with np.load(os.environ.get("CPSP_REFERENCE", DEFAULT)) as file:
        return dict(file)


@cache
def meta() -> dict[str, Any]:
    return json.loads(vectors()["meta"].tobytes())


def seed() -> int:
    return meta()["seed"]


@cache
def recipe() -> ModuleType:
    beside = Path(os.environ.get("CPSP_REFERENCE", DEFAULT)).parent / "recipe.py"
    spec = importlib.util.spec_from_file_location(
        "recipe", beside if beside.is_file() else DEFAULT.parent / "recipe.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expected(key: str) -> Tensor:
    return torch.from_numpy(np.asarray(vectors()[key]))


def checkpoint(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """A case's weights under their published names."""
    return {name: torch.from_numpy(recipe().weight(seed(), name, tuple(shape))) for name, shape in shapes.items()}


def features(case: str, batch: int, channels: int, layout: str = "BTHWC") -> tuple[Tensor, Tensor]:
    """visual [B, T, 7, 7, C] float16 (channels last, whatever the published layout was), audio [B, T, 128] float32."""
    visual = recipe().visual(seed(), case, batch, channels, layout)
    if layout == "BTCHW":
        visual = np.ascontiguousarray(visual.transpose(0, 1, 3, 4, 2))
    return torch.from_numpy(visual), torch.from_numpy(recipe().audio(seed(), case, batch))


def normal(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(recipe().normal(seed(), name, shape)).double()


def batch(case: str, size: int, categories: int, visual: Tensor | None = None, audio: Tensor | None = None) -> Batch:
    """A case's labels as a batch of ours; without features where none are given."""
    labels, category = recipe().labels(seed(), case, size, categories)
    return Batch(
        visual=torch.zeros(size, 0) if visual is None else visual,
        audio=torch.zeros(size, 0) if audio is None else audio,
        event=torch.from_numpy(labels[:, :, :-1].max(-1) > 0),
        category=torch.from_numpy(category.astype(np.int64)),
        valid=torch.ones(size, dtype=torch.bool),
        video=torch.arange(size),
        index=torch.arange(size),
    )
