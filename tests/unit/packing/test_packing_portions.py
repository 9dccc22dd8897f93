"""Packing by an array of jobs: portions made at the same time, on a common disk, then finished by one command."""

from __future__ import annotations

import fcntl
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cpsp_dist.cli import main
from cpsp_dist.packing import pack as packing
from cpsp_dist.packing.pack import pack, pack_portion
from cpsp_dist.packing.source import SourceOptions, open_source
from cpsp_dist.packing.target import LOCK_NAME, WORK_NAME
from tests.support.environment import environment
from tests.support.folders import Content
from tests.support.packing_sources import SMALL_SHARDS as SMALL
from tests.support.packing_sources import pack_command as command
from tests.support.packing_sources import shards_under, write_avel

VIDEOS, PORTIONS = 60, 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("portions") / "source"
    write_avel(folder, VIDEOS, channels=8)
    return folder


@pytest.fixture(scope="module")
def complete(source: Path) -> dict[str, Content]:
    """What one process makes of it."""
    pack(open_source(SourceOptions("avel100k-zip", source=source)), source.parent / "complete", SMALL, workers=1)
    return shards_under(source.parent / "complete")


def test_portions_at_once_give_the_same_bytes(source: Path, complete: dict[str, Content], tmp_path: Path) -> None:
    """Also where the work folder holds what an earlier call with other options left; the last command makes nothing."""
    out = tmp_path / "out"
    work = tmp_path / "out.part" / WORK_NAME
    work.mkdir(parents=True)
    (work / "key").write_text("of other options")
    (tmp_path / "out.part" / "train-000000.tar").write_bytes(b"old")
    portions = [
        subprocess.Popen(
            [*command(source, out, 1), "--portion", f"{i}/{PORTIONS}"], env=environment(), stdout=subprocess.PIPE
        )
        for i in range(PORTIONS)
    ]
    printed = [portion.communicate(timeout=120)[0].decode() for portion in portions]
    assert [portion.returncode for portion in portions] == [0] * PORTIONS
    shards = len([name for name in complete if name.endswith(".tar")])
    assert sum(int(line.split()[1]) for line in printed) == shards
    assert not out.exists(), "a portion finishes nothing"
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.part").glob("*.tar")}
    assert len(times) == shards
    subprocess.run(command(source, out, 1), env=environment(), check=True, timeout=120)
    assert shards_under(out) == complete
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")} == times


def test_a_portion_that_is_missing_is_made_by_the_last_command(
    source: Path, complete: dict[str, Content], tmp_path: Path
) -> None:
    opened, out = open_source(SourceOptions("avel100k-zip", source=source)), tmp_path / "out"
    shards = len([name for name in complete if name.endswith(".tar")])
    assert pack_portion(opened, out, SMALL, 1, PORTIONS, workers=1) == (len(range(1, shards, PORTIONS)), shards)
    assert pack_portion(opened, out, SMALL, shards, shards + 1, workers=1) == (0, shards), "more jobs than shards"
    pack(opened, out, SMALL, workers=1)
    assert shards_under(out) == complete


@pytest.mark.parametrize("portion", ["3/3", "1", "a/b", "-1/3", "1/"])
def test_a_portion_that_is_none(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], portion: str) -> None:
    arguments = ["shards", "pack", "--layout", "avel100k-zip", "--source", str(source), "--out", str(tmp_path / "out")]
    assert main([*arguments, f"--portion={portion}"]) == 2
    assert capsys.readouterr().err == f"error: --portion {portion}: write it as I/N, with I from 0 to N - 1\n"


def test_another_command_at_work_is_waited_for_and_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Portions of other options hold the folder: it is not taken from them."""
    monkeypatch.setattr("cpsp_dist.packing.target.PREPARING_SECONDS", 0.2)
    work = tmp_path / "out.part" / WORK_NAME
    work.mkdir(parents=True)
    (work / "key").write_text("of other options")
    arguments = ["shards", "pack", "--layout", "avel100k-zip", "--source", str(source), "--out", str(tmp_path / "out")]
    with open(work / LOCK_NAME, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert main([*arguments, "--portion=0/3"]) == 2
    assert "another process is writing it" in capsys.readouterr().err
    assert (work / "key").read_text() == "of other options"


def test_a_shard_made_twice_at_once_has_two_drafts(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same portion on two machines, or in two containers, whose processes may have one number."""
    drafts: list[Path] = []
    write = packing.write_shard

    def written(draft: Path, *args: Any) -> Any:
        drafts.append(draft)
        return write(draft, *args)

    monkeypatch.setattr(packing, "write_shard", written)
    for name in ("a", "b"):
        pack_portion(open_source(SourceOptions("avel100k-zip", source=source)), tmp_path / name, SMALL, 0, 2, workers=1)
    assert len({draft.name for draft in drafts}) == len(drafts) >= 2
    assert len({draft.stem for draft in drafts}) < len(drafts)
