"""What is done with checkpoints that somebody or some disk has damaged, and with a disk that takes no more."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from cpsp_dist.data.manifest import Manifest
from cpsp_dist.tracking.known_runs import recorded_run
from cpsp_dist.tracking.store import RUN_FILE
from cpsp_dist.training.checkpoint import (
    COMMIT,
    FORMAT_VERSION,
    LATEST,
    OPTIMIZER,
    PROGRESS,
    WEIGHTS,
    Checkpoints,
    TrainingProgress,
)
from cpsp_dist.training.engine import TrainingState
from cpsp_dist.training.setup import load_run
from cpsp_dist.utils.errors import EXIT_REQUEUE, EXIT_USER_ERROR, UserError
from tests.support.prefork import Rank
from tests.support.runs import arguments, newest_state


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def lengthen(file: Path) -> None:
    """With a hole, by what takes an hour to read."""
    os.truncate(file, 1 << 40)


@pytest.fixture(scope="module")
def two_checkpoints(prefork: Any, keypad_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run of 4 steps with checkpoints after 2 and 4."""
    output = tmp_path_factory.mktemp("damaged") / "run"
    prefork.start(arguments(keypad_shards, output, "train.steps=4", "checkpoint.every_steps=2"), 1).finish()
    assert Checkpoints(output).steps() == [2, 4]
    return output


@pytest.mark.parametrize("damage", [truncate, flip, lengthen, Path.unlink])
@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, PROGRESS, COMMIT])
def test_each_damage_to_each_file_is_detected_by_name(
    two_checkpoints: Path, tmp_path: Path, name: str, damage: Any
) -> None:
    shutil.copytree(two_checkpoints, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run")
    assert {path.name for path in checkpoints.path(4).iterdir()} == {WEIGHTS, OPTIMIZER, PROGRESS, COMMIT}
    assert checkpoints.newest_valid() == (4, [])
    damage(checkpoints.path(4) / name)
    newest, (line,) = checkpoints.newest_valid()
    assert newest == 2
    assert line.startswith(f"{checkpoints.path(4)}: passed over: {name} ")
    assert checkpoints.load(newest)[1].step == 2


def test_a_run_without_a_complete_checkpoint_is_refused_with_the_reason(two_checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(two_checkpoints, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run")
    for step in (2, 4):
        flip(checkpoints.path(step) / PROGRESS)
    with pytest.raises(
        UserError, match=rf"no complete checkpoint here \(.*step-00000004: passed over: {PROGRESS} is damaged\); give"
    ):
        load_run(tmp_path / "run")


@pytest.mark.parametrize("version", [2, None])
def test_another_format_is_refused_in_one_line(
    prefork: Any, keypad_shards: Path, two_checkpoints: Path, tmp_path: Path, version: int | None
) -> None:
    """Neither passed over for an older checkpoint, nor taken for a damaged one."""
    shutil.copytree(two_checkpoints, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run")
    commit = checkpoints.path(4) / COMMIT
    commit.write_text(json.dumps(json.loads(commit.read_text()) | {"format": version}))
    line = f"error: {checkpoints.path(4)}: checkpoint of format {version}, this program reads format {FORMAT_VERSION}; "
    launch = prefork.start(arguments(keypad_shards, tmp_path / "run", "train.steps=6"), 2)
    assert launch.wait() == [EXIT_USER_ERROR] * 2, launch.outputs()
    (found,) = [line for rank in launch.ranks for line in rank.output.splitlines() if line.startswith("error: ")]
    assert found.startswith(line)
    assert "Traceback" not in launch.outputs()
    for command in (["evaluate", str(tmp_path / "run")], ["export", str(tmp_path / "run"), "--out", "out"]):
        launch = prefork.start(command, 1, command="cpsp_dist.cli")
        assert launch.wait() == [EXIT_USER_ERROR]
        assert launch.ranks[0].output.strip().splitlines()[-1].startswith(line)


def test_a_run_resumes_before_the_damage(
    prefork: Any, keypad_shards: Path, two_checkpoints: Path, tmp_path: Path
) -> None:
    """`latest` still names the damaged one; it is not trusted."""
    expected = newest_state(two_checkpoints)
    shutil.copytree(two_checkpoints, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run")
    flip(checkpoints.path(4) / OPTIMIZER)
    assert (checkpoints.folder / LATEST).read_text() == "step-00000004\n"
    run = arguments(keypad_shards, tmp_path / "run", "train.steps=4", "checkpoint.every_steps=2")
    output = prefork.start(run, 1).finish()
    assert f"{checkpoints.path(4)}: passed over: {OPTIMIZER} is damaged" in output
    assert f"resuming from {checkpoints.path(2)}" in output
    found = newest_state(tmp_path / "run")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_kept_by_count_and_by_metric(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 7):
        best = 2 if step >= 2 else 1
        state = TrainingState({"w": torch.full((3,), float(step))}, {}, step)
        checkpoints.save(state, TrainingProgress(step=step, best_step=best), keep=2)
        assert (checkpoints.folder / LATEST).read_text() == f"step-{step:08d}\n"
    assert checkpoints.steps() == [2, 5, 6]


def test_folders_are_on_disk_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new folder is an entry in the one above, which has to be synced like the checkpoint's own files."""
    synced, sync = set(), os.fsync

    def note(descriptor: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    output = tmp_path / "runs" / "one"
    Checkpoints(output).save(TrainingState({"w": torch.ones(3)}, {}, 1), TrainingProgress(step=1), keep=1)
    assert {tmp_path, output.parent, output, output / "checkpoints"} <= synced
    assert tmp_path.parent not in synced


def test_a_checkpoint_holds_what_a_run_needs(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    """The random states are none: each step seeds itself, which the bitwise tests with dropout show."""
    output = tmp_path / "run"
    more = ["train.steps=1000", "tracking.enabled=true", "pool.bank=16", "train.milestones=[1]"]
    launch = prefork.start(arguments(keypad_shards, output, *more), 2)
    assert launch.until_step(2)
    assert launch.until(lambda: recorded_run(output) is not None)
    launch.ranks[0].signal(signal.SIGTERM)
    assert launch.wait() == [EXIT_REQUEUE] * 2
    checkpoints = Checkpoints(output)
    step, _ = checkpoints.newest_valid()
    assert step is not None
    state, progress = checkpoints.load(step)
    assert progress.step == state.updates == step
    assert progress.position == 4 * step
    assert progress.world == 2
    assert progress.config["train"]["milestones"] == [1], "the schedule is a function of it and the step"
    assert progress.fingerprint == Manifest.load(keypad_shards).fingerprint
    assert progress.run_id == json.loads((output / RUN_FILE).read_text())["run_id"]
    assert set(state.moments) == {"exp_avg", "exp_avg_sq"}
    assert int(state.objectives["bank.count"]) > 0


def logged_steps(output: Path) -> list[int]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss/total" in line]


LIMIT = 1 << 20


def limit_files(rank: Rank, size: int) -> None:
    """No file that a running rank writes to becomes larger than `size` bytes."""
    resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.long
def test_full_disk_ends_a_run_only_at_a_checkpoint(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    """Full between two checkpoints: points wait in memory and nothing is lost. Full at one: the last is intact, and
    with room again the run ends with the weights of one that never had the trouble.

    To mount a small disk takes root. So the size of files is limited, for anybody may do that: it fails a write as a
    full disk does, after what there is room for. Logs stay far below it; a file of that size takes the points' place.
    """
    more = ["train.steps=24", "checkpoint.every_steps=12", "checkpoint.keep=1"]
    prefork.start(arguments(keypad_shards, tmp_path / "roomy", *more), 2).finish()
    output = tmp_path / "run"
    run = arguments(keypad_shards, output, *more)
    launch = prefork.start(run, 2, hold=[2, 6, 14])
    assert launch.until_step(2)
    points, aside, full = output / "metrics.jsonl", output / "aside", output / "full"
    full.write_bytes(bytes(LIMIT))
    os.link(points, aside)
    full.replace(points)
    limit_files(launch.ranks[0], LIMIT)
    launch.release()
    assert launch.until(lambda: "File too large; points wait in memory" in launch.ranks[0].output)
    limit_files(launch.ranks[0], resource.RLIM_INFINITY)
    aside.replace(points)
    launch.release()
    assert launch.until(lambda: (output / "checkpoints" / LATEST).exists())
    assert logged_steps(output)[:12] == list(range(1, 13))
    limit_files(launch.ranks[0], LIMIT)
    launch.release()
    assert launch.wait() == [EXIT_USER_ERROR] * 2, launch.outputs()
    last = launch.ranks[0].output.strip().splitlines()[-1]
    assert "cannot write the checkpoint of step 24" in last
    assert "File too large" in last
    assert "Traceback" not in launch.outputs()
    assert Checkpoints(output).newest_valid() == (12, [])
    prefork.start(run, 2).finish()
    expected, found = newest_state(tmp_path / "roomy"), newest_state(output)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert logged_steps(output) == list(range(1, 25))


@pytest.mark.long
def test_folder_that_becomes_unwritable(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    """A file takes its place, in which nothing can be made whoever tries; permissions do not concern root."""
    output, aside = tmp_path / "run", tmp_path / "aside"
    run = arguments(keypad_shards, output, "train.steps=12", "checkpoint.every_steps=6")
    launch = prefork.start(run, 2, hold=[7])
    assert launch.until(lambda: (output / "checkpoints" / LATEST).exists())
    output.rename(aside)
    output.touch()
    launch.release()
    assert launch.wait() == [EXIT_USER_ERROR] * 2, launch.outputs()
    printed = launch.ranks[0].output
    assert "Not a directory; points wait in memory, training continues" in printed
    last = printed.strip().splitlines()[-1]
    assert f"output={output}: this folder was removed or moved away while the run trained" in last
    output.unlink()
    aside.rename(output)
    assert Checkpoints(output).newest_valid() == (6, [])


def test_folder_that_cannot_be_made(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    launch = prefork.start(arguments(keypad_shards, tmp_path / "file" / "run"), 2)
    assert launch.wait() == [EXIT_USER_ERROR] * 2
    assert "cannot make this folder" in launch.ranks[0].output.strip().splitlines()[-1]
    assert os.listdir(tmp_path) == ["file"]
