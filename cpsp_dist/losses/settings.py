"""The section `objectives` of the configuration: a weight for each objective, and the settings of all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from cpsp_dist.losses import OBJECTIVES
from cpsp_dist.losses.objective import SharedSettings
from cpsp_dist.utils.sections import Section, make_section

if TYPE_CHECKING:

    class ObjectiveSettings(Section):
        """Made below of the registered objectives."""

        def __init__(self, **values: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

else:
    ObjectiveSettings = make_section(
        "ObjectiveSettings",
        __name__,
        """Weights (0 turns an objective off) and parameters of the objectives; published fully supervised defaults.

        The published code has mistakes that change results. They are fixed here; the value `published` of the keys that
        have it restores each of them, for comparison.
        """,
        {
            name: (float, Field(objective.weight, ge=0, description=OBJECTIVES.description(name)))
            for name, objective in OBJECTIVES.items()
        },
        *(objective.Settings for objective in OBJECTIVES.values()),
        SharedSettings,
    )
