"""Finished shards as a source: to pack a part of them, or with other options (shard size, float16)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from crc32c import crc32c

from cpsp_dist.data.manifest import Manifest
from cpsp_dist.packing.source import Entry, Features, SourceOptions
from cpsp_dist.utils.errors import DataError, UserError


class Packed:
    """A `Source` over the folder of shards `options.source`.

    Rows keep the numbers of the source they were packed from; where merged shards repeat these, it is their places.
    """

    def __init__(self, options: SourceOptions):
        if options.source is None:
            raise UserError("the packed layout needs --source, a folder of shards")
        self.options = options
        self.manifest = manifest = Manifest.load(options.source)
        self.categories = manifest.categories
        self.problems: list[str] = []
        self.notes: list[str] = []
        infos = [json.loads(read_field(manifest, place, "json")) for place in range(len(manifest.samples))]
        numbers = [info.get("row", place) for place, info in enumerate(infos)]
        self._place = dict(zip(numbers, range(len(numbers)), strict=True))
        if len(self._place) < len(numbers):
            self._place = {place: place for place in range(len(numbers))}
        split_of = {place: split for split, rows in manifest.splits.items() for place in rows}
        self.entries = [
            Entry(row, infos[place].get("video_id", sample["key"].decode()), split_of[place], int(sample["category"]))
            for (row, place), sample in zip(self._place.items(), manifest.samples, strict=True)
        ]

    def read(self, entry: Entry) -> Features:
        place = self._place[entry.row]
        arrays = {
            name: np.frombuffer(read_field(self.manifest, place, name), field.dtype).reshape(field.shape)
            for name, field in self.manifest.fields.items()
        }
        return Features(arrays["visual"], arrays["audio"], arrays["label"])

    def files(self, entry: Entry) -> list[Path]:
        sample = self.manifest.samples[self._place[entry.row]]
        return [self.manifest.path(self.manifest.shards[sample["shard"]])]


def read_field(manifest: Manifest, row: int, name: str) -> bytes:
    """The bytes of one field (an array's data, or the json text) of a row of the sample table.

    Raises:
        DataError: they are not what was packed.
    """
    sample = manifest.samples[row]
    shard = manifest.shards[sample["shard"]]
    size = int(sample["json_size"]) if name == "json" else manifest.fields[name].nbytes
    with manifest.local_file(shard) as path, open(path, "rb") as file:
        file.seek(int(sample[name]))
        data = file.read(size)
    if crc32c(data) != sample[f"{name}_crc"]:
        raise DataError(f"{path}: byte {sample[name]}: {name} of sample {sample['key'].decode()} is damaged")
    return data
