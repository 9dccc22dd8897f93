"""The networks: a batch's features in, one `Output` with named fields out.

Shape letters as in `cpsp_dist.data.batch`; D is the width of the fused segment features (256 in every published model)
and P = 49 the positions of a 7×7 visual map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from cpsp_dist.models.avel import AVEL
from cpsp_dist.models.avsdn import AVSDN
from cpsp_dist.models.cmran import CMRAN
from cpsp_dist.models.parts import Network, Output
from cpsp_dist.models.psp import PSP
from cpsp_dist.models.weights import load_weights

if TYPE_CHECKING:  # an exported model is loaded with torch and safetensors alone
    from cpsp_dist.config import ModelSettings
    from cpsp_dist.data.manifest import Manifest

__all__ = ["Network", "Output", "build_model", "load_weights", "model_for"]


def model_for(settings: ModelSettings, manifest: Manifest) -> Network:
    """The configured network, at the sizes of the shards' features."""
    return build_model(
        settings.name,
        supervision=settings.supervision,
        visual_channels=manifest.fields["visual"].shape[-1],
        audio_channels=manifest.fields["audio"].shape[-1],
        categories=len(manifest.categories),
        threshold=settings.threshold,
        dropout=settings.dropout,
        sees=settings.sees,
    )


def build_model(
    name: str,
    *,
    supervision: Literal["full", "weak"] = "full",
    visual_channels: int,
    audio_channels: int,
    categories: int,
    threshold: float = 0.099,
    dropout: float = 0.1,
    sees: Literal["both", "audio", "visual"] = "both",
) -> Network:
    """The named network, freshly initialised from torch's random state.

    Its `forward(visual [B, T, 7, 7, C], audio [B, T, A])` gives an `Output`. It works in the dtype of its parameters,
    or in that of an autocast region around it; at any B and T.

    Args:
        name: psp (the network of CPSP and SSPSP too), avel, avsdn or cmran.
        threshold: similarity below which PSP prunes a segment pair; of psp only.
        dropout: of psp and cmran only.
        sees: the other modality's input is replaced by zeros.
    """
    sizes = {"visual_channels": visual_channels, "audio_channels": audio_channels, "categories": categories}
    match name:
        case "psp":
            return PSP(supervision=supervision, sees=sees, threshold=threshold, dropout=dropout, **sizes)
        case "avel":
            return AVEL(supervision=supervision, sees=sees, **sizes)
        case "avsdn":
            return AVSDN(supervision=supervision, sees=sees, **sizes)
        case "cmran":
            return CMRAN(supervision=supervision, sees=sees, dropout=dropout, **sizes)
    raise ValueError(f"no model named {name!r}")
