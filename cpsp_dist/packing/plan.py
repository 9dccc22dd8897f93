"""Which video goes into which shard: decided before anything is written.

The plan follows from the list of videos, the seed and the options alone, so each shard is a job of its own, and its
bytes do not depend on which process writes it, or when.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from dataclasses import astuple, dataclass

import numpy as np

from cpsp_dist.data.manifest import FORMAT_VERSION, Field
from cpsp_dist.data.shard_index import is_visual_shape
from cpsp_dist.packing.encoders import encoders_of
from cpsp_dist.packing.index import split_order
from cpsp_dist.packing.source import Entry, Source
from cpsp_dist.packing.tar import BLOCK
from cpsp_dist.utils.errors import DataError, UserError
from cpsp_dist.utils.hashing import text_sha256

JSON_BYTES = 512  # room for a sample's json
PROBES = 5  # videos that vote for the schema


@dataclass(frozen=True)
class PackOptions:
    visual_dtype: str = "float16"
    shard_mb: float = 130.0  # a megabyte is 10^6 bytes
    seed: int = 0
    on_error: str = "raise"  # or "skip": leave out what cannot be packed

    def __post_init__(self) -> None:
        """Raises UserError for a size that none can have."""
        if not 0 < self.shard_mb < math.inf:
            raise UserError(f"--shard-mb {self.shard_mb:g}: has to be more than 0, and finite")


@dataclass(frozen=True)
class ShardPlan:
    name: str
    split: str
    entries: list[Entry]


def plan_shards(entries: list[Entry], fields: dict[str, Field], options: PackOptions) -> list[ShardPlan]:
    """Splits in their usual order, a split's samples shuffled once and cut into shards of equal count (within one)."""
    plans = []
    per_shard = max(1, int(options.shard_mb * 1e6 // sample_bytes(fields)))
    for split in sorted({e.split for e in entries}, key=split_order):
        members = sorted((e for e in entries if e.split == split), key=lambda e: keyed_hash(options.seed, split, e.row))
        count = math.ceil(len(members) / per_shard)
        cuts = [len(members) * i // count for i in range(count + 1)]
        for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
            plans.append(ShardPlan(f"{split}-{number:06d}.tar", split, members[start:stop]))
    return plans


def keyed_hash(seed: int, *what: object) -> bytes:
    """Sorts in an order as good as random; a hash, not a random generator, so that it outlives library upgrades."""
    return hashlib.blake2b("/".join(map(str, (seed, *what))).encode(), digest_size=16).digest()


def plan_key(source: Source, plans: list[ShardPlan], fields: dict[str, Field], options: PackOptions) -> str:
    """Differs if anything does that the shards' bytes depend on, but for the features themselves."""
    content = [
        FORMAT_VERSION,
        np.__version__,  # writes the .npy headers
        astuple(options),
        source.categories,
        encoders_of(source.options).as_json(),
        {name: [f.dtype, f.shape] for name, f in fields.items()},
        [[p.name, [astuple(e) for e in p.entries]] for p in plans],
    ]
    return text_sha256(json.dumps(content))


def schema(source: Source, visual_dtype: str) -> dict[str, Field]:
    """Type and shape of every field: what most of a few videos, spread over the source, have.

    Raises:
        DataError: none of them can be read, or their arrays do not fit together.
    """
    problems = []
    votes: Counter[tuple[tuple[int, ...], ...]] = Counter()
    for i in range(min(PROBES, len(source.entries))):
        entry = source.entries[i * (len(source.entries) - 1) // max(1, PROBES - 1)]
        try:
            features = source.read(entry)
            votes[features.visual.shape, features.audio.shape, features.label.shape] += 1
        except DataError as error:
            problems.append(f"{entry.name}: {error}")
    if not votes:
        others = f" ({len(problems)} videos were tried, and none can be read)" if len(problems) > 1 else ""
        raise DataError(problems[0] + others)
    visual, audio, label = votes.most_common(1)[0][0]
    if len(audio) != 2 or not visual[0] == audio[0] == label[0]:
        raise DataError(
            f"visual {list(visual)}, audio {list(audio)} and label {list(label)} do not fit together; "
            "expected [T, H, W, C] or [T, C], [T, A] and [T]"
        )
    return fields_of(visual, audio, visual_dtype)


def fields_of(visual: tuple[int, ...], audio: tuple[int, ...], visual_dtype: str) -> dict[str, Field]:
    """Of samples with visual [T, H, W, C] or [T, C], and audio [T, A].

    Raises:
        DataError: maps that shards do not hold, for readers would take them for [T, C, H, W].
    """
    if not is_visual_shape(visual):
        raise DataError(
            f"visual {list(visual)}, channels last: as many channels as one side of a grid of unequal sides would be "
            "read as channels first; shards do not hold it: pack vectors [T, C], or another grid"
        )
    return {
        "visual": Field(np.dtype(visual_dtype).str, visual),
        "audio": Field("<f4", audio),
        "label": Field("|u1", visual[:1]),
    }


def sample_bytes(fields: dict[str, Field]) -> int:
    """Bytes a sample takes in a tar, about: payloads, .npy headers, tar headers, padding."""
    arrays = sum(math.ceil((f.nbytes + 128) / BLOCK) * BLOCK + BLOCK for f in fields.values())
    return arrays + BLOCK + JSON_BYTES
