"""The encoders: frames or sound of a segment in, its features out.

A network (or function) that computes features, and how its weights are read, belongs here; nothing here decodes a file.

To add an encoder: write a file with an `encoder.VisualEncoder` or `encoder.AudioEncoder`, and name it in the table. The
description begins with the modality. `cpsp-dist extract --visual` (or `--audio`) then takes its name.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cpsp_dist.errors import UserError
from cpsp_dist.utils.registry import Registry

if TYPE_CHECKING:
    from cpsp_dist.extraction.encoders.encoder import Encoder

__all__ = ["ENCODERS", "build_encoder", "encoders_of"]

ENCODERS: Registry[type[Encoder]] = Registry(
    "cpsp_dist.extraction.encoders",
    {
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
    return ENCODERS[name](None if weights is None else Path(weights), device, precision)
