"""Checkpoints of the published code: their parameters under the names they have here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cpsp_dist.errors import DataError
from cpsp_dist.models.weights import require_fit

_CLASSIFIERS = [
    (r"^event_classifier\.0\.", "classifier.event."),
    (r"^category_classifier\.0\.", "classifier.category."),
]
_ATTENTION_AND_FUSION = [(r"^affine_", "attention.affine_"), (r"^(U_[av])\.", r"fuse.\1.")]

#: For each network, what to replace in a published name, in this order.
_RENAMED: dict[str, list[tuple[str, str]]] = {
    "psp": [(r"^lstm_a_v\.", ""), (r"^psp\.", "propagation."), *_CLASSIFIERS],
    "avel": [*_ATTENTION_AND_FUSION, *_CLASSIFIERS],
    "avsdn": [*_ATTENTION_AND_FUSION, *_CLASSIFIERS],
    "cmran": [
        (r"^spatial_channel_att\.", "attention."),
        (r"_encoder\.encoder\.layers\.(\d)\.", r"_encoder.layers.\1."),
        (r"_decoder\.decoder\.layers\.0\.", "_decoder.layer."),
        (r"\.(self_attn|multihead_attn)\.", ".attention."),
        (r"^AVInter\.video_multihead\.", "interaction.attention."),
        (r"^AVInter\.norm1\.", "interaction.norm."),
        (r"\.out_proj\.", ".out."),
        (r"^localize_module\.classifier\.", "classifier.event."),
        (r"^localize_module\.event_classifier\.", "classifier.category."),
    ],
}

#: Published parameters that no output depends on. They have no counterpart here: DDP and ZeRO wait for the gradient
#: of each parameter.
_UNUSED = {
    "psp": r"(linear_v|v_classify|a_classify|L1|L2|align_v)\.",
    "avel": r"$",
    "avsdn": r"$",
    "cmran": r".*\.(affine_video_guided_\d|encoder_layer|decoder_layer|decoder\.layers\.0\.self_attn)\.",
}

MODELS = tuple(_RENAMED)


def translate(state: Mapping[str, Tensor], model: str) -> dict[str, Tensor]:
    """A published state dict of `model` with the names of ours; parameters that are of no use are left out.

    Takes the prefix `module.` away (DataParallel), and the `psp.` that the published ResNet variant puts around PSP.
    Unknown names stay as they are, so that loading can tell them.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if any(name.startswith("psp.psp.") for name in state):
        state = {name.removeprefix("psp."): value for name, value in state.items()}
    ours = {}
    for name, value in state.items():
        if re.match(_UNUSED[model], name):
            continue
        for pattern, replacement in _RENAMED[model]:
            name = re.sub(pattern, replacement, name)
        if model == "cmran" and (packed := re.search(r"in_proj_(weight|bias)$", name)):
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=False):
                ours[f"{name[: packed.start()]}{part}.{packed[1]}"] = rows
        else:
            ours[name] = value
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
            raise DataError(f"{path}: entry {key!r} is no parameter")
    return content
