"""The encoders: frames or sound of a segment in, its features out.

A network (or function) that computes features, and how its weights are read, belongs here; nothing here decodes a file.

To add an encoder: write a file with an `encoder.VisualEncoder` or `encoder.AudioEncoder`, and name it in the table. The
description begins with the modality. `cpsp-dist extract --visual` (or `--audio`) then takes its name.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.registry import Registry

if TYPE_CHECKING:
    from cpsp_dist.extraction.encoders.encoder import Encoder

__all__ = ["ENCODERS", "build_encoder", "encoders_of"]

ENCODERS: Registry[type[Encoder]] = Registry(
    "cpsp_dist.extraction.encoders",
    {
        "vgg19": ("vgg19:VGG19", "visual: VGG-19, block5_pool, 7x7x512 (the published features)"),
        "efficientnet-lite0": ("efficientnet_lite0:EfficientNetLite0", "visual: EfficientNet-Lite0, block 11, 7x7x192"),
        "resnet": ("resnet:ResNet", "visual: ResNet-50, -101 or -152, stage 3, 7x7x1024"),
        "clip": ("clip:ClipImages", "visual: an image tower of CLIP, a vector; extra 'encoders'"),
        "vggish": ("vggish:VGGish", "audio: VGGish, 128 values (the published features)"),
        "clap": ("clap:ClapSound", "audio: an audio tower of CLAP, a vector; extra 'encoders'"),
        "logmel": ("logmel:LogMel", "audio: log-mel energies of each second, 512 values; no weights"),
    },
)


def encoders_of(modality: Literal["visual", "audio"]) -> list[str]:
    """The names of the encoders of one modality; imports none of them."""
    return [name for name in ENCODERS if ENCODERS.description(name).startswith(f"{modality}:")]


def build_encoder(
    name: str,
    weights: str | Path | None = None,
    device: str = "cpu",
    precision: Literal["float32", "float16"] = "float32",
) -> Encoder:
    """The named encoder, ready to run on `device`.

    Args:
        name: one of `ENCODERS`.
        weights: a file (a folder for clip and clap) with its weights; None: the published ones, fetched to the cache.
        precision: in which it computes; float16 on a GPU only, and recorded in its identity.

    Raises:
        UserError: no such encoder; the weights are missing, damaged or another network's; its library is missing.
    """
    if name not in ENCODERS:
        raise UserError(f"no encoder named '{name}'; there are {', '.join(ENCODERS)}")
    encoder: Any = ENCODERS[name]
    built: Encoder = encoder(None if weights is None else Path(weights), device, precision)
    return built
