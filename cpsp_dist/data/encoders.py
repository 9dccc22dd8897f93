"""Which encoders made a folder's features: what its manifest records, and whether two records name the same ones.

The record of one encoder is a JSON object `{"name", "weights_sha256", "preprocessing"}`, or None where it is not known
(published features come without). A name alone, which a user gave, has None for the other two: they are not known.
Beside them stands `segment_seconds` where a segment is not of one second.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from typing import Any

from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.text import is_plain

logger = logging.getLogger(__name__)

MODALITIES = ("visual", "audio")
KEYS = {"name", "weights_sha256", "preprocessing"}
#: The file in which an extraction leaves the record beside its features; characters of a record, at most.
ENCODERS_NAME, MAX_RECORD = "encoders.json", 10_000

Record = dict[str, Any]


@dataclass(frozen=True)
class Encoders:
    """The records of both modalities, and how long a segment is."""

    visual: Record | None = None
    audio: Record | None = None
    segment_seconds: float = 1.0

    @property
    def known(self) -> bool:
        """Whether anything is, but that segments last a second."""
        return self != UNKNOWN

    def as_json(self) -> dict[str, Any]:
        records: dict[str, Any] = {name: self[name] for name in MODALITIES}
        return records if self.segment_seconds == 1 else records | {"segment_seconds": self.segment_seconds}

    def __getitem__(self, modality: str) -> Record | None:
        record: Record | None = getattr(self, modality)
        return record

    @staticmethod
    def parse(content: Any) -> Encoders:
        """Of JSON, as `as_json` gives it; None: both are unknown. Raises ValueError."""
        if content is None:
            return Encoders()
        if not isinstance(content, dict) or content.keys() - {*MODALITIES, "segment_seconds"}:
            raise ValueError("encoders: needs an object with visual, audio and segment_seconds")
        visual, audio = (_parse_record(content.get(name), name) for name in MODALITIES)
        seconds = content.get("segment_seconds", 1.0)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0.01 <= seconds <= 3600:
            raise ValueError("encoders: segment_seconds is no number of seconds")
        return Encoders(visual, audio, float(seconds))


UNKNOWN = Encoders()


def named(name: str) -> Record:
    """The record of an encoder of which only the name is known."""
    return {"name": name, "weights_sha256": None, "preprocessing": None}


def encoder_text(record: Record | None) -> str:
    """`vgg19 (weights 0123456789ab)`; `unknown`."""
    if record is None:
        return "unknown"
    digest = record["weights_sha256"]
    return f"{record['name']} (weights {digest[:12]})" if digest else str(record["name"])


def require_same(trained: Encoders, found: Encoders, model: str, place: str, *, warn: bool = True) -> None:
    """Refuse features of other encoders than those that a model was trained on; warn where only one side is known.

    Args:
        trained, model: the model's record, and how messages call it.
        found, place: the record of the features at `place`.
        warn: about encoders that only one side records.

    Raises:
        UserError: other names, weights or preprocessing.
    """
    if trained.segment_seconds != found.segment_seconds:
        raise UserError(
            f"{place}: its segments last {found.segment_seconds:g} s, {model} was trained on those of "
            f"{trained.segment_seconds:g} s; extract the features with --segment-seconds {trained.segment_seconds:g}"
        )
    unknown = []
    for modality in MODALITIES:
        ours, theirs = trained[modality], found[modality]
        if difference := compare_records(ours, theirs):
            raise UserError(
                f"{place}: its {modality} features are of {difference[1]}, {model} was trained on those of "
                f"{difference[0]}; extract them with the same encoder"
            )
        if (ours is None) != (theirs is None):
            unknown.append(modality)
    if unknown and warn:
        one = "encoders" if len(unknown) > 1 else "encoder"
        known = ", ".join(encoder_text(trained[m] or found[m]) for m in unknown)
        side = f"{place} does not record its {' and '.join(unknown)} {one}; {model} was trained on {known}"
        if trained[unknown[0]] is None:
            side = f"{model} does not record the {' and '.join(unknown)} {one} it was trained on; {place} is of {known}"
        logger.warning("%s: they have to be the same", side)


def compare_records(ours: Record | None, theirs: Record | None) -> tuple[str, str] | None:
    """What differs between two encoders, as two texts; None where nothing that is known of both does.

    The precision they computed in (float16 or float32) is no difference: features differ by their rounding.
    """
    if ours is None or theirs is None:
        return None
    if ours["name"] != theirs["name"]:
        return str(ours["name"]), str(theirs["name"])
    weights = ours["weights_sha256"], theirs["weights_sha256"]
    if None not in weights and weights[0] != weights[1]:
        return encoder_text(ours), encoder_text(theirs)
    before, now = ours["preprocessing"], theirs["preprocessing"]
    if before is None or now is None:
        return None
    for key in sorted({*before, *now} - {"precision"}):
        if before.get(key) != now.get(key):
            name = ours["name"]
            return f"{name} with {_setting(key, before)}", f"{name} with {_setting(key, now)}"
    return None


def common_record(ours: Record | None, theirs: Record | None) -> Record | None:
    """What two records that do not differ have in common."""
    if ours is None or theirs is None:
        return None
    return {key: value if value == theirs[key] else None for key, value in ours.items()}


def _setting(key: str, preprocessing: dict[str, Any]) -> str:
    return f"{key}={json.dumps(preprocessing[key])[:60]}" if key in preprocessing else f"no {key}"


def _parse_record(content: Any, modality: str) -> Record | None:
    """Raises ValueError."""
    if content is None:
        return None
    if not isinstance(content, dict) or content.keys() != KEYS:
        raise ValueError(f"{modality} encoder: needs {', '.join(sorted(KEYS))}")
    name, digest, preprocessing = content["name"], content["weights_sha256"], content["preprocessing"]
    if not isinstance(name, str) or not 0 < len(name) <= 100 or not is_plain(name):
        raise ValueError(f"{modality} encoder: no name")
    if digest is not None and not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
        raise ValueError(f"{modality} encoder {name}: weights_sha256 is no sha256")
    if preprocessing is not None and not isinstance(preprocessing, dict):
        raise ValueError(f"{modality} encoder {name}: preprocessing is no object")
    if len(json.dumps(content)) > MAX_RECORD:
        raise ValueError(f"{modality} encoder {name}: a record of more than {MAX_RECORD:,} characters")
    return content
