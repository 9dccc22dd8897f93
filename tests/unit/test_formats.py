"""Shards and exported models of another format are refused in one line that names both formats and what to do.

Checkpoints: `training/test_checkpoint.py::test_another_format_is_refused_in_one_line`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpsp_dist.data import manifest
from cpsp_dist.inference import model as export
from cpsp_dist.utils.errors import DataError
from tests.support.tiny_shards import write_shards


@pytest.mark.parametrize("version", [0, manifest.FORMAT_VERSION + 1, "1", None])
@pytest.mark.parametrize("place", ["folder", "url"])
def test_shards(tmp_path: Path, version: object, place: str) -> None:
    write_shards(tmp_path, {"train": [3]}, segments=2, channels=1)
    index = tmp_path / manifest.INDEX_NAME
    index.write_text(json.dumps(json.loads(index.read_text()) | {"cpsp_version": version}))
    with pytest.raises(DataError) as caught:
        manifest.Manifest.load(tmp_path if place == "folder" else f"file://{tmp_path}")
    text = str(caught.value)
    assert f"{index}: shards of format {version}, this program reads format {manifest.FORMAT_VERSION}; " in text
    assert "pack them again" in text
    assert "\n" not in text


@pytest.mark.parametrize("version", [1, export.FORMAT_VERSION + 1, None])
def test_exported_models(tmp_path: Path, version: int | None) -> None:
    """Seen before anything else of the settings, which another format may have in other places."""
    (tmp_path / export.SETTINGS).write_text(json.dumps({} if version is None else {"format": version}))
    (tmp_path / export.CATEGORIES).write_text("a\nb\n")
    with pytest.raises(DataError) as caught:
        export.load_model(tmp_path)
    expected = f"{tmp_path}: exported model of format {version}, this program reads format {export.FORMAT_VERSION}; "
    assert str(caught.value) == expected + "use the program that wrote it, or export its run again"
