"""Packing on several processes, killed, continued, and with videos left out: always the same bytes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from cpsp_dist.cli import main
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.packing.pack import pack
from cpsp_dist.packing.plan import PackOptions
from cpsp_dist.packing.source import SourceOptions, open_source
from cpsp_dist.packing.target import Interrupted, workplace
from cpsp_dist.packing.verify import verify
from cpsp_dist.utils.errors import DataError, UserError
from tests.support.environment import environment
from tests.support.folders import Content, files_under
from tests.support.packing_sources import SMALL_SHARDS as SMALL
from tests.support.packing_sources import pack_command as command
from tests.support.packing_sources import read_back, shards_under, video_id, write_ave, write_avel, write_zip
from tests.support.processes import Process, children

VIDEOS = 240


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "source"
    write_avel(folder, VIDEOS, channels=8)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(source: Path) -> dict[str, Content]:
    """The shards of a run that nothing disturbed."""
    pack(open_source(SourceOptions("avel100k-zip", source=source)), source.parent / "uninterrupted", SMALL, workers=1)
    verify(source.parent / "uninterrupted")
    return shards_under(source.parent / "uninterrupted")


def wait_for(condition: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "nothing happened within the limit"
        time.sleep(0.001)


def finished(part: Path) -> list[Path]:
    """The shards that have a note; an empty one is of a process that was killed right there."""
    notes = [note for note in (part / ".work").glob("*.done") if note.stat().st_size]
    return sorted(part / note.name.removesuffix(".done") for note in notes)


@pytest.mark.parametrize(("layout", "workers"), [("ave-h5", 2), ("avel100k-zip", 3)])
def test_any_number_of_processes_gives_the_same_bytes(tmp_path: Path, layout: str, workers: int) -> None:
    (write_ave if layout == "ave-h5" else write_avel)(tmp_path / "source", 40)
    for processes in (1, workers):
        opened = open_source(SourceOptions(layout, source=tmp_path / "source"))
        pack(opened, tmp_path / str(processes) / "out", PackOptions(shard_mb=0.04), workers=processes)
    one, several = (files_under(tmp_path / str(n)) for n in (1, workers))
    assert len(one) > 5
    assert one == several


@pytest.mark.parametrize(("workers", "kill_at"), [(1, 5), (2, 12)])
def test_killed_and_continued(source: Path, uninterrupted: dict, tmp_path: Path, workers: int, kill_at: int) -> None:
    out, part = tmp_path / "out", tmp_path / "out.part"
    process = subprocess.Popen(command(source, out, workers), env=environment(), stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(finished(part)) >= kill_at or process.poll() is not None)
        workers_alive = children(process.pid)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL, "it was too fast to be killed"
    assert not out.exists()
    wait_for(lambda: not any(worker.alive for worker in workers_alive))  # no orphan keeps writing
    kept = {path.name: path.stat().st_mtime_ns for path in finished(part)}
    done = subprocess.run(command(source, out, workers), env=environment(), timeout=120, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert shards_under(out) == uninterrupted
    assert not part.exists()
    assert kept, "nothing was finished when it was killed"
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept  # kept, not written again


def stop_after(shards: int, source: Path, out: Path) -> None:
    """A pack that stops as by Ctrl-C once `shards` are finished."""
    opened = open_source(SourceOptions("avel100k-zip", source=source))
    read = opened.read

    def interrupted(entry: object) -> object:
        if len(finished(out.with_name(out.name + ".part"))) >= shards:
            raise KeyboardInterrupt
        return read(entry)  # type: ignore[arg-type]

    opened.read = interrupted  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        pack(opened, out, SMALL, workers=1)


def resumed(source: Path, out: Path, options: PackOptions = SMALL) -> tuple[dict[str, Content], set[str]]:
    """What a second call gives, and which shards it kept from the first."""
    part = out.with_name(out.name + ".part")
    before = {path.name: path.stat().st_mtime_ns for path in part.glob("*.tar")}
    pack(open_source(SourceOptions("avel100k-zip", source=source)), out, options, workers=1)
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    return shards_under(out), {name for name in before if after.get(name) == before[name]}


def test_a_finished_shard_is_kept_only_if_it_is_complete(source: Path, uninterrupted: dict, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after(4, source, out)
    names = [path.name for path in finished(tmp_path / "out.part")]
    flipped, cut, no_note = (tmp_path / "out.part" / name for name in names[:3])
    data = bytearray(flipped.read_bytes())
    data[3000] ^= 1
    flipped.chmod(0o644)
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-1024])
    (no_note.parent / ".work" / (no_note.name + ".done")).write_text("{")
    files, kept = resumed(source, out)
    assert files == uninterrupted
    assert kept == {names[3]}


def test_changed_features_are_packed_again(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    data = write_avel(source, 40, channels=8)
    stop_after(3, source, out)
    first = finished(tmp_path / "out.part")[0].name
    with open(tmp_path / "out.part" / first, "rb") as file:
        row = int(file.read(6))
    new = data["visual"][row] + 1
    write_zip(source / "video" / f"{video_id(row)}.zip", new)
    _, kept = resumed(source, out)
    assert len(kept) == 2
    assert first not in kept
    (sample,) = (s for s in read_back(out) if s["json"]["row"] == row)
    np.testing.assert_array_equal(sample["visual.npy"], new.astype(np.float16))


def test_other_options_start_afresh(source: Path, uninterrupted: dict, tmp_path: Path) -> None:
    stop_after(3, source, tmp_path / "out")
    files, kept = resumed(source, tmp_path / "out", PackOptions(shard_mb=0.04, seed=1))
    assert not kept
    assert files.keys() == uninterrupted.keys()
    assert files["train-000000.tar"] != uninterrupted["train-000000.tar"]


def test_two_at_once_are_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = tmp_path / "out.part"
    (part / ".work").mkdir(parents=True)
    with open(part / ".work" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(command(source, tmp_path / "out", 1)[3:]) == 2
    assert "another process is writing it" in capsys.readouterr().err
    assert part.is_dir()


def test_a_killed_worker_is_reported_and_what_is_finished_is_kept(
    source: Path, uninterrupted: dict, tmp_path: Path
) -> None:
    out, part = tmp_path / "out", tmp_path / "out.part"
    process = subprocess.Popen(command(source, out, 2), env=environment(), stderr=subprocess.PIPE, text=True)

    def workers() -> list[Process]:
        return [child for child in children(process.pid) if "spawn_main" in child.command]

    try:
        wait_for(lambda: len(finished(part)) >= 2)
        workers()[0].kill()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 2
    assert "error: a packing process was killed" in errors
    assert "Traceback" not in errors
    assert f"what is finished stays in {part}" in errors
    files, kept = resumed(source, out)
    assert files == uninterrupted
    assert kept


def test_skipping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    data = write_avel(source, 40)
    bad = {1: np.full((10, 3, 7, 7), np.nan), 6: [1], 0: np.zeros((10, 4, 7, 7))}
    for row, thing in bad.items():
        write_zip(source / "video" / f"{video_id(row)}.zip", thing)
    (source / "audio" / f"{video_id(11)}.zip").unlink()
    gone = {*bad, 11}
    for workers in ("1", "2"):
        flags = ["--on-error", "skip", "--workers", workers, "--shard-mb", "0.04"]
        assert main(command(source, tmp_path / workers / "out", 1)[3:] + flags) == 0
        message = capsys.readouterr().err
        assert "note: left out 4 videos:" in message
        assert all(f"video {video_id(row)} (row {row}): " in message for row in gone)
    assert files_under(tmp_path / "1") == files_under(tmp_path / "2")
    out = tmp_path / "1" / "out"
    assert len((out / "skipped.txt").read_text().splitlines()) == 4
    verify(out)
    samples = {s["json"]["row"]: s for s in read_back(out)}
    assert samples.keys() == set(range(40)) - gone
    for row, sample in samples.items():
        np.testing.assert_array_equal(sample["audio.npy"], data["audio"][row])
    # Without the flag it is the same report as an error.
    assert main(command(source, tmp_path / "none", 1)[3:]) == 2
    assert "row 11" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_shard_of_nothing_but_bad_videos_is_left_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_avel(source, 12)
    for row in (3, 7, 11):  # all of test
        write_zip(source / "label" / f"{video_id(row)}.zip", np.full(10, 7))
    manifest = pack(
        open_source(SourceOptions("avel100k-zip", source=source)), tmp_path / "out", PackOptions(on_error="skip")
    )
    assert list(manifest.splits) == ["train", "val"]
    assert sorted(p.name for p in manifest.folder.glob("*.tar")) == ["train-000000.tar", "val-000000.tar"]
    for row in range(12):
        write_zip(source / "label" / f"{video_id(row)}.zip", np.full(10, 7))
    with pytest.raises(DataError, match="12 problems"):
        pack(open_source(SourceOptions("avel100k-zip", source=source)), tmp_path / "o", PackOptions(on_error="skip"))
    assert not (tmp_path / "o.part").exists()


def test_workplace_keeps_or_removes(tmp_path: Path) -> None:
    found: list[list[str]] = []

    def left_by(error: BaseException, key: str | None) -> bool:
        """Work that ends with `error`: whether its file stays."""
        with contextlib.suppress(type(error), UserError), workplace(tmp_path / "out", key=key) as part:
            found.append([p.name for p in part.glob("x")])
            (part / "x").write_text("x")
            raise error
        return (tmp_path / "out.part" / "x").exists()

    assert left_by(KeyboardInterrupt(), "key")
    assert left_by(SystemExit(), "key")
    assert left_by(Interrupted("a worker was killed"), "other key")
    assert found == [[], ["x"], []]  # found again with the same key only
    assert not left_by(KeyboardInterrupt(), None)
    assert not left_by(UserError("a mistake"), "key")
    assert not left_by(OSError(28, "No space left on device"), "key")
    assert not list(tmp_path.iterdir())


def test_a_mistake_leaves_no_folder_that_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_avel(tmp_path / "source", 12)
    write_zip(tmp_path / "source" / "video" / f"{video_id(1)}.zip", np.full((10, 3, 7, 7), np.nan))
    (tmp_path / "there").mkdir()
    message = f"video {video_id(1)}"
    mistakes = {"new/deeper/out": message, "there/deeper/out": message, "new/" + 251 * "x": "File name too long"}
    for out, mistake in mistakes.items():
        assert main(command(tmp_path / "source", tmp_path / out, 1)[3:]) == 2
        assert mistake in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"source", "there"}
    assert not list((tmp_path / "there").iterdir())
    # What others put there meanwhile stays.
    with contextlib.suppress(UserError), workplace(tmp_path / "new" / "deeper" / "out", key="key"):
        (tmp_path / "new" / "of another").touch()
        raise UserError("a mistake")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["of another"]


def test_a_place_that_is_closed_to_the_user_is_one_line(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)  # nothing is closed to root
    try:
        with pytest.raises(UserError, match=r"out\.part: cannot make this folder \(Permission denied\)"):
            workplace(closed / "deeper" / "out").__enter__()
    finally:
        os.seteuid(me)


def test_manifest_of_resumed_shards_loads(source: Path, tmp_path: Path) -> None:
    stop_after(5, source, tmp_path / "out")
    resumed(source, tmp_path / "out")
    assert len(Manifest.load(tmp_path / "out").samples) == VIDEOS
