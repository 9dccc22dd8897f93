"""What the tests of `cpsp-dist shards` share: its arguments, the lines of an error, and damage to a source."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from cpsp_dist.cli import main
from tests.support.packing_sources import video_id, write_h5

V3 = f"{video_id(3)}.zip"


VISUAL, AUDIO, LABELS = "visual_feature.h5", "audio_feature.h5", "right_labels.h5"


def pack(source: Path, out: Path, layout: str, *more: object) -> list[str]:
    return ["shards", "pack", "--layout", layout, "--source", str(source), "--out", str(out), *map(str, more)]


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> list[str]:
    """The lines of the error; exit code 2 and no traceback."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    errors = [n for n, line in enumerate(lines) if line.startswith("error: ")]
    assert len(errors) == 1, captured.err
    assert captured.out == ""
    return lines[errors[0] :]


def truncate(path: Path, keep: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def edit(path: Path, change: Callable[[np.ndarray], np.ndarray | None], key: str = "avadataset") -> None:
    data = h5py.File(path)[key][...]
    changed = change(data)
    path.unlink()
    write_h5(path, data if changed is None else changed, key)


def put(index: tuple[int, ...], value: float) -> Callable[[np.ndarray], None]:
    def change(data: np.ndarray) -> None:
        data[index] = value

    return change


def assert_matches(pattern: str, line: str) -> None:
    assert re.search(pattern, line), f"'{line}' does not say '{pattern}'"
