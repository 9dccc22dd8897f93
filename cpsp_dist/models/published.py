"""Checkpoints of the published code: their parameters under the names they have here.

Each network defines how names are replaced: see `Network.published_names`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cpsp_dist.errors import DataError
from cpsp_dist.models import MODELS
from cpsp_dist.models.weights import require_fit


def translate(state: Mapping[str, Tensor], model: str) -> dict[str, Tensor]:
    """A published state dict of `model` with the names of ours; parameters that are of no use are left out.

    Takes the prefix `module.` away (DataParallel), and the `psp.` that the published ResNet variant puts around PSP.
    Unknown names stay as they are, so that loading reports them.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if any(name.startswith("psp.psp.") for name in state):
        state = {name.removeprefix("psp."): value for name, value in state.items()}
    network = MODELS[model]
    ours: dict[str, Tensor] = {}
    for name, value in state.items():
        if re.match(network.published_unused, name):
            continue
        for pattern, replacement in network.published_names:
            name = re.sub(pattern, replacement, name)
        ours |= network.convert_published(name, value)
    return ours


def load_published(path: str | Path, name: str, model: nn.Module) -> dict[str, Tensor]:
    """The weights in a published checkpoint, as a state dict of `model` (built as network `name`).

    Only tensors are read; a file that would run code when unpickled is refused.

    Raises:
        DataError: not such a file, or its parameters are not exactly those of `model`; each of them is listed.
    """
    ours = translate(_read(Path(path)), name)
    require_fit(ours, model, path)
    return {key: value.detach().contiguous().clone() for key, value in ours.items()}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"{path}: cannot read this checkpoint: {error.strerror or error}") from None
    except Exception as error:  # a damaged file makes torch.load raise all sorts
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise DataError(f"{path}: refused: it holds '{asked[1]}' beside tensors, which could run code") from None
        raise DataError(f"{path}: not a checkpoint that torch can read, or a damaged one") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: holds no parameters by name")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or not value.is_floating_point():
            raise DataError(f"{path}: entry {key!r} is not a parameter")
    return content
