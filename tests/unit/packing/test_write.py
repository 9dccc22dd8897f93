"""Shards are written without webdataset's own writer, whose import costs seconds: its bytes are the same."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import webdataset

from cpsp_dist.packing.pack import pack
from cpsp_dist.packing.source import SourceOptions, open_source
from tests.support.packing_sources import SMALL_SHARDS, write_avel


def test_the_bytes_are_those_of_webdatasets_writer(tmp_path: Path) -> None:
    write_avel(tmp_path / "source", 12)
    pack(open_source(SourceOptions("avel100k-zip", source=tmp_path / "source")), tmp_path / "out", SMALL_SHARDS)
    shards = list((tmp_path / "out").glob("*.tar"))
    assert len(shards) >= 3
    for path in shards:
        samples: dict[str, dict[str, str | bytes]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                samples.setdefault(key, {"__key__": key})[name] = tar.extractfile(member).read()  # type: ignore[union-attr]
        expected = io.BytesIO()
        pinned = {"user": "", "group": "", "mode": 0o444, "mtime": 0}
        with webdataset.TarWriter(expected, encoder=False, compress=False, **pinned) as writer:
            for sample in samples.values():
                writer.write(sample)
        assert path.read_bytes() == expected.getvalue()
