"""The networks: a batch's features in, one `Output` with named fields out.

Networks and their layers belong here; nothing here knows of losses or ranks. Shape letters as in
`cpsp_dist.data.batch`; D is the width of the fused segment features (256 in every published model) and P = H·W the
positions of a visual map (49 of the published 7×7 ones, 1 of a vector).

To add a network: write a file with a `layers.Network`, and name it in the table. `model.name` of the configuration then
takes its name, and the section `model` its settings; `cpsp-dist import-checkpoint --model` takes it too.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

from cpsp_dist.utils.registry import Registry, settings_from

if TYPE_CHECKING:
    from cpsp_dist.data.manifest import Manifest
    from cpsp_dist.models.layers import Network, Output
    from cpsp_dist.models.settings import ModelSettings
    from cpsp_dist.models.weights import load_weights

__all__ = ["MODELS", "Network", "Output", "build_model", "load_weights", "model_for"]

MODELS: Registry[type[Network]] = Registry(
    "cpsp_dist.models",
    {
        "psp": ("psp:PSP", "positive sample propagation, the network of CPSP and SSPSP"),
        "avel": ("avel:AVEL", "attention and two LSTMs (Tian et al., ECCV 2018)"),
        "avsdn": ("avsdn:AVSDN", "dual-modality sequence to sequence (Lin et al., ICASSP 2019)"),
        "cmran": ("cmran:CMRAN", "cross-modal relation-aware networks (Xu et al., ACM MM 2020)"),
        "cmbs": ("cmbs:CMBS", "cross-modal background suppression (Xia and Zhao, CVPR 2022)"),
        "cace": ("cace:CACE", "co-guidance attention and contrastive enhancement (CACE-Net, He et al., ACM MM 2024)"),
    },
)


def __getattr__(name: str) -> Any:
    """The names that need torch, imported when they are asked for: the table is read by command line parsers."""
    if name in ("Network", "Output"):
        from cpsp_dist.models import layers

        return getattr(layers, name)
    if name == "load_weights":
        from cpsp_dist.models.weights import load_weights

        return load_weights
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def model_for(settings: ModelSettings, manifest: Manifest) -> Network:
    """The configured network, at the sizes of the shards' features."""
    return model_of(settings, **sizes_for(manifest))


def model_of(settings: ModelSettings, **sizes: int) -> Network:
    """The configured network, at the sizes that `build_model` takes."""
    return build_model(
        settings.name,
        supervision=settings.supervision,
        modality=settings.modality,
        **sizes,
        **vars(settings_from(MODELS[settings.name].Settings, settings)),
    )


def sizes_for(manifest: Manifest) -> dict[str, int]:
    """What `build_model` has to know of the shards' features."""
    visual = manifest.fields["visual"].shape
    return {
        "visual_channels": visual[-1],
        "audio_channels": manifest.fields["audio"].shape[-1],
        "categories": len(manifest.categories),
        "positions": math.prod(visual[1:-1]),
    }


def build_model(
    name: str,
    *,
    supervision: Literal["full", "weak"] = "full",
    visual_channels: int,
    audio_channels: int,
    categories: int,
    modality: Literal["both", "audio", "visual"] = "both",
    positions: int = 49,
    **settings: Any,
) -> Network:
    """The named network, freshly initialised from torch's random state.

    Its `forward(visual [B, T, H, W, C], audio [B, T, A])` gives an `Output`. It works in the dtype of its parameters,
    or in that of an autocast region around it; at any B and T.

    Args:
        name: one of `MODELS`.
        modality: the other modality's input is replaced by zeros.
        positions: H·W of the visual maps; with 1 they may also be vectors [B, T, C], and no network attends over them.
        settings: of the network's `Settings`; those of other networks are ignored.

    Raises:
        ValueError: no such network.
        TypeError: a setting that no network has.
    """
    if name not in MODELS:
        raise ValueError(f"no model named {name!r}; there are {', '.join(MODELS)}")
    network: Any = MODELS[name]
    own = {f.name for f in fields(network.Settings)}
    if rest := settings.keys() - own:
        known = {f.name for other in MODELS.values() for f in fields(other.Settings)}
        if rest - known:
            raise TypeError(f"no model has a setting {', '.join(sorted(rest - known))}")
    model: Network = network(
        network.Settings(**{key: value for key, value in settings.items() if key in own}),
        supervision=supervision,
        visual_channels=visual_channels,
        audio_channels=audio_channels,
        categories=categories,
        modality=modality,
        positions=positions,
    )
    return model
