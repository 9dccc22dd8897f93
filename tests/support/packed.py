"""Shards of a source in one of the layouts."""

from __future__ import annotations

from pathlib import Path

from cpsp_dist.data.manifest import Manifest
from cpsp_dist.packing.pack import pack
from cpsp_dist.packing.plan import PackOptions
from cpsp_dist.packing.source import SourceOptions, open_source


def packed(out: Path, layout: str, source: Path, options: PackOptions | None = None, **files: object) -> Manifest:
    opened = open_source(SourceOptions(layout, source=source, **files))  # type: ignore[arg-type]
    return pack(opened, out, options or PackOptions())
