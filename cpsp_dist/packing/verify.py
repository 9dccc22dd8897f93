"""Every byte of shards against their manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from crc32c import crc32c

from cpsp_dist.data.manifest import ARRAY_FIELDS, Manifest, Shard
from cpsp_dist.packing.index import index_shard
from cpsp_dist.packing.rework import same_rows
from cpsp_dist.utils.console import Progress
from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.input_files import open_input

MAX_LISTED = 20


def verify(place: str | Path) -> Manifest:
    """The manifest, if every byte is as packed; of a URL, as fetched into the cache.

    Raises:
        DataError: all damage found, a line each: which shard, which sample, which byte; or of the manifest itself.
            Values that are NaN or infinite count as damage.
    """
    manifest = Manifest.load(place)
    found: list[str] = []
    with Progress(sum(s.filesize for s in manifest.shards) // 10**6, "MB", "verifying") as shown:
        for shard in manifest.shards:
            try:
                with manifest.local_file(shard) as path:
                    found += _shard_damage(manifest, shard, path)
            except DataError as error:  # it cannot be fetched
                found.append(str(error))
            shown.update(shard.filesize // 10**6)
    if found:
        more = [f"and {len(found) - MAX_LISTED} more"] if len(found) > MAX_LISTED else []
        raise DataError("\n  ".join([f"{manifest.place}: {len(found)} damaged places", *found[:MAX_LISTED], *more]))
    return manifest


def _shard_damage(manifest: Manifest, shard: Shard, path: Path) -> list[str]:
    rows = np.array(manifest.samples[shard.first : shard.first + shard.nsamples])
    found = []
    try:
        indexed = index_shard(path)
        found += [f"{path}: {array}: values that are NaN or infinite" for array in indexed.nonfinite]
        if indexed.sha256 == shard.sha256:
            return found if same_rows(indexed.rows, rows) else [f"{path}: differs from its rows in the sample table"]
    except DataError as error:
        found.append(str(error))
    # The hash shows that a byte changed, the samples' checksums show where.
    with open_input(path) as file:
        for row in rows:
            for name in (*ARRAY_FIELDS, "json"):
                file.seek(int(row[name]))
                data = file.read(int(row["json_size"]) if name == "json" else manifest.fields[name].nbytes)
                if crc32c(data) != row[f"{name}_crc"]:
                    place = f"bytes {row[name]} to {int(row[name]) + len(data) - 1}"
                    found.append(f"{path}: {place}: {name} of sample {row['key'].decode()} is damaged")
    return found or [f"{path}: sha256 differs, yet every sample is intact: the tar headers between them changed"]
