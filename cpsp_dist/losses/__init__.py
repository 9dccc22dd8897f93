"""The objectives of the paper, and the pool of videos that the video-level objective compares with.

Functions of model outputs and labels belong here; nothing here knows of engines or files.

To add an objective: write a file with an `objective.Objective`, and name it in the table. Its weight becomes the key
`objectives.NAME` of the configuration, and its settings keys beside that; 0 turns it off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpsp_dist.utils.registry import Registry

if TYPE_CHECKING:
    from cpsp_dist.losses.objective import Objective

#: In the order in which they are computed and added up.
OBJECTIVES: Registry[type[Objective]] = Registry(
    "cpsp_dist.losses",
    {
        "event": ("event:Event", "whether each segment is an event"),
        "category": ("category:Category", "which event it is"),
        "presence": ("presence:Presence", "whether a video has an event, found in single segments (weak supervision)"),
        "avps": ("avps:AVPS", "audio-visual pair similarity (pair level)"),
        "psa_s": ("psa_s:PSAS", "event against background segments of a video (segment level)"),
        "psa_v": ("psa_v:PSAV", "a class's videos against the others (video level)"),
        "sspsp": (
            "sspsp:SSPSP",
            "self-supervised: an audio segment against all visual segments of the pool; they are gathered only where "
            "this is more than 0 (T times the bytes of embeddings), and with pool.scope=gather",
        ),
        "gate": ("gate:Gate", "CMBS, CACE: whether both modalities take a segment for an event"),
        "modality": ("modality:Modality", "CMBS, CACE: the category as each modality finds it by itself"),
        "contrast": ("contrast:Contrast", "CACE: event segments of a video, and their noisy copies, against the rest"),
    },
)
