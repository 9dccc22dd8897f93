"""Which encoders made the features of a source: as its flags, the extraction's record or the packed shards have it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpsp_dist.data.encoders import ENCODERS_NAME, MODALITIES, UNKNOWN, Encoders, encoder_text, named
from cpsp_dist.data.manifest import INDEX_NAME
from cpsp_dist.data.shard_index import MAX_INDEX_BYTES, Index
from cpsp_dist.packing.source import SourceOptions
from cpsp_dist.utils.errors import DataError, UserError
from cpsp_dist.utils.input_files import read_input
from cpsp_dist.utils.strict_json import load_json

logger = logging.getLogger(__name__)

MAX_BYTES = 1 << 20


def encoders_of(options: SourceOptions) -> Encoders:
    """What is known of the encoders of a source.

    `encoders.json` lies beside the features: in `options.source`, or in the folder that `options.visual` or
    `options.audio` is in. Shards have it in their manifest.

    Raises:
        DataError: a damaged record.
        UserError: a flag names another encoder than the record.
    """
    if options.layout == "packed" and options.source is not None:
        path = options.source / INDEX_NAME
        found = Index.parse(read_input(path, MAX_INDEX_BYTES), str(path)).encoders
    else:
        visual, audio = (_recorded(options, name) for name in MODALITIES)
        found = Encoders(visual.visual, audio.audio, visual.segment_seconds)
    return with_names(found, options.visual_encoder, options.audio_encoder, str(options.source or options.visual))


def with_names(found: Encoders, visual: str | None, audio: str | None, place: str) -> Encoders:
    """`found`, and these names where nothing was known. Raises UserError where another one was."""
    records: dict[str, Any] = {}
    for modality, name in (("visual", visual), ("audio", audio)):
        record = found[modality]
        if name is not None and record is not None and record["name"] != name:
            raise UserError(
                f"--{modality}-encoder {name}: {place} records that {encoder_text(record)} made its {modality} "
                "features; leave the flag out"
            )
        records[modality] = named(name) if record is None and name is not None else record
    return replace(found, **records)


def read_record(path: Path) -> Encoders:
    """Of the file that an extraction leaves beside its features. Raises DataError."""
    try:
        return Encoders.parse(load_json(read_input(path, MAX_BYTES), str(path)))
    except ValueError as error:
        text = str(error).removeprefix(f"{path}: ")
        raise DataError(f"{path}: not the record of an extraction ({text}); extract the features again") from None


def kept_encoders(folder: Path) -> Encoders:
    """What the manifest of a folder of shards records, which may be damaged otherwise, or not be there."""
    path = folder / INDEX_NAME
    if not path.is_file():
        return UNKNOWN
    try:
        return Encoders.parse(load_json(read_input(path, MAX_INDEX_BYTES)).get("encoders"))
    except (ValueError, AttributeError, DataError):
        logger.warning("%s: damaged: which encoders made the features is lost; name them by flags", path)
        return UNKNOWN


def _recorded(options: SourceOptions, modality: str) -> Encoders:
    given: Path | None = getattr(options, modality)
    folder = options.source if given is None else given.parent
    if folder is None or not (path := folder / ENCODERS_NAME).is_file():
        return UNKNOWN
    return read_record(path)
