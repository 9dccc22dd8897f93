"""The section `model` of the configuration: what all networks have, and the settings of each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from cpsp_dist.models import MODELS
from cpsp_dist.utils.sections import Section, make_section

if TYPE_CHECKING:

    class ModelSettings(Section):
        """Made below of the registered networks."""

        name: str
        supervision: Literal["full", "weak"]
        modality: Literal["both", "audio", "visual"]
        weights: str | None

        def __init__(self, **values: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

else:
    ModelSettings = make_section(
        "ModelSettings",
        __name__,
        "The network. Channel and category counts are no settings: they come from the shards.",
        {
            "name": (
                Literal[tuple(MODELS)],
                Field("psp", description="; ".join(f"{name}: {MODELS.description(name)}" for name in MODELS)),
            ),
            "supervision": (
                Literal["full", "weak"],
                Field("full", description="full: a label for each second; weak: a video's"),
            ),
            "modality": (
                Literal["both", "audio", "visual"],
                Field("both", description="the modality that is used; the other one is blanked"),
            ),
            "weights": (
                str | None,
                Field(None, description="to start from: of `cpsp-dist import-checkpoint`, or a checkpoint's"),
            ),
        },
        *(network.Settings for network in MODELS.values()),
    )
