"""A run's own folder, damaged in every way: ignored with a warning or named in one line, and never other data."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from cpsp_dist.cli import main
from cpsp_dist.inference.model import CARD, load_model
from cpsp_dist.launch.jobs import LAUNCH_FILE, Job, Logs, State, describe_jobs, load_jobs, save_jobs, states
from cpsp_dist.models import build_model
from cpsp_dist.report.collect import read_history
from cpsp_dist.report.page import script_json
from cpsp_dist.report.run_page import curves, logged
from cpsp_dist.tracking.history import read_histories
from cpsp_dist.tracking.runs import TrackedRun
from cpsp_dist.tracking.store import RUN_FILE, AskedStore
from cpsp_dist.training.checkpoint import COMMIT, LATEST, OPTIMIZER, PROGRESS, WEIGHTS, Checkpoints, TrainingProgress
from cpsp_dist.training.engine import TrainingState
from cpsp_dist.utils.errors import DataError, UserError
from cpsp_dist.utils.json_lines import JsonLines, parse_line, read_bytes, truncate_after_step
from tests.support.limits import within_limits
from tests.support.mutations import damaged, replaced
from tests.support.runs import arguments, newest_state

T = TypeVar("T")


def saved(output: Path, *steps: int, best: int | None = None) -> Checkpoints:
    checkpoints = Checkpoints(output)
    for step in steps:
        state = TrainingState({"w": torch.full((64,), float(step))}, {"exp_avg": {"w": torch.ones(64)}}, step)
        checkpoints.save(state, TrainingProgress(step=step, best_step=best), keep=9)
    return checkpoints


def outcome(call: Callable[[], T]) -> tuple[T | None, str]:
    """What it returns, or None and the one line of a user error."""
    try:
        return call(), ""
    except UserError as error:
        line = str(error)
    assert line
    assert "\n" not in line
    return None, line


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, PROGRESS, COMMIT])
def test_every_damage_to_a_checkpoint_is_found_or_harmless(tmp_path: Path, name: str) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    file = checkpoints.path(2) / name
    undamaged = file.read_bytes()
    expected = {step: checkpoints.load(step)[0] for step in (1, 2)}
    for seed, content in enumerate(damaged(undamaged, 3, 150)):
        file.write_bytes(content)
        with within_limits(seed):
            newest, mistake = outcome(checkpoints.newest_valid)
        if newest is None:
            assert "checkpoint of format" in mistake, seed
            continue
        step, passed_over = newest
        assert step in (1, 2), seed
        assert len(passed_over) == 2 - step, seed
        with within_limits(seed):
            found = checkpoints.load(step)
        assert found[1].step == step
        assert torch.equal(found[0].weights["w"], expected[step].weights["w"]), seed
    file.unlink()
    for what in replaced(file):
        assert checkpoints.newest_valid()[0] == 1, what
        with pytest.raises(DataError, match="not a complete checkpoint"):
            checkpoints.load(2)


def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 3)
    (checkpoints.folder / "step-abc").mkdir()
    (checkpoints.folder / "step-00000007.bak").mkdir()
    (checkpoints.folder / "step-00000008").touch()
    os.mkdir(os.fsencode(checkpoints.folder) + b"/step-\xff0000001")
    (checkpoints.folder / LATEST).unlink()
    (checkpoints.folder / LATEST / "x").mkdir(parents=True)
    (checkpoints.folder / ".step-00000008.part").symlink_to(tmp_path)
    assert checkpoints.steps() == [3]
    shutil.copytree(checkpoints.path(3), checkpoints.path(9))
    assert checkpoints.newest_valid() == (
        3,
        [f"{checkpoints.path(9)}: passed over: this is a copy of the checkpoint of step 3"],
    )
    shutil.rmtree(checkpoints.path(9))
    saved(tmp_path, 8)  # where a file of that name was
    assert checkpoints.newest_valid() == (8, [])
    assert tmp_path.is_dir()


def test_the_best_weights_are_checked_and_replaced_only_where_they_were_removed(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2, best=1)
    progress = checkpoints.load(2)[1]
    assert checkpoints.load_best(progress)[1:] == (1, "")
    file = checkpoints.path(1) / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(
        DataError, match=rf"step-00000001: not a complete checkpoint \({WEIGHTS} is damaged\); remove it"
    ):
        checkpoints.load_best(progress)
    shutil.rmtree(checkpoints.path(1))
    _, step, warning = checkpoints.load_best(progress)
    assert step == 2
    assert "is not there; those of step 2 are used" in warning


def test_files_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = saved(tmp_path, 1).path(1)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == dict.fromkeys(
        (WEIGHTS, OPTIMIZER, PROGRESS, COMMIT), 0o640
    )


def test_every_damage_to_metrics_costs_damaged_lines_alone(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss/total": step / 7}).encode() + b"\n" for step in range(1, 9)]
    undamaged = b"".join(lines)
    for content in damaged(undamaged, 5, 400):
        file.write_bytes(content)
        left = content.splitlines(keepends=True)
        with within_limits(content):
            warning = truncate_after_step(file, 6)
        kept = file.read_bytes().splitlines(keepends=True)
        assert all((parse_line(line) or {"step": 9})["step"] <= 6 for line in kept)
        assert kept == sorted(kept, key=left.index), "in their order, none twice"
        assert {line for line in lines[:6] if line in left} <= {*kept}
        assert truncate_after_step(file, 6) == ""
        if warning:
            assert "damaged" in warning
            assert "\n" not in warning
    file.write_bytes(undamaged + undamaged)
    truncate_after_step(file, 99)
    assert file.read_bytes() == undamaged


def test_every_damage_to_metrics_is_left_out_of_pages(tmp_path: Path) -> None:
    """Of `report` and `compare --html`, with numbers that are no time or that no float holds."""
    names = ("loss/total", "grad_norm", "pool/rows", "time")
    (tmp_path / RUN_FILE).write_text('{"run_id": "a"}')
    run = TrackedRun("a", "run", "FINISHED", metrics=dict.fromkeys(names, 1.0), tags={"output": str(tmp_path)})
    lines = [json.dumps({"step": step} | {name: step / 7 for name in names}) for step in range(1, 5)]
    undamaged = "".join(f"{line}\n" for line in lines)
    numbers = [undamaged.replace(str(2 / 7), text) for text in ("9" * 400, "1e300", "1e999", "-1", "NaN", "true")]
    for content in [*(text.encode() for text in numbers), *damaged(undamaged.encode(), 6, 100)]:
        (tmp_path / "metrics.jsonl").write_bytes(content)
        with within_limits(content):
            history = read_history(tmp_path)
            script_json([figure.option for figure in curves(history)])
            logged(history)
            found = read_histories(AskedStore("unused"), [run], names)["a"]
        assert all(isinstance(value, float) for points in found.values() for _, value in points)


def test_a_file_of_a_terabyte_is_named_and_not_read(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n')
    os.truncate(file, 1 << 40)  # with a hole
    for call in (lambda: read_bytes(file), lambda: truncate_after_step(file, 1)):
        with pytest.raises(OSError, match=r"File too large.*metrics\.jsonl"):
            call()
    assert len(read_bytes(file, (1 << 40) - 10)) == 10


def test_lines_wait_where_something_else_stands_in_place_of_the_file(tmp_path: Path) -> None:
    file, warnings = tmp_path / "metrics.jsonl", list[str]()
    points = JsonLines(file, warnings.append)
    for what in replaced(file):
        if what in ("a folder", "a pipe", "a device"):
            with pytest.raises(OSError, match=r"director|regular"):
                truncate_after_step(file, 1)
            points.append({"step": 1})
            assert points.waiting, what
    assert len(warnings) == 3
    points.write()
    assert file.read_text() == '{"step": 1}\n' * 3


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `cpsp-dist export` writes it, of an untrained network."""
    from cpsp_dist.inference import model as export
    from cpsp_dist.models.weights import save_tensors

    folder = tmp_path_factory.mktemp("exported")
    model = {"name": "avel", "visual_channels": 4, "audio_channels": 3, "categories": 2}
    save_tensors(build_model(**model).state_dict(), folder / export.WEIGHTS)
    (folder / export.CATEGORIES).write_text("bark\nbell\n")
    settings: dict[str, Any] = {"format": export.FORMAT_VERSION, "model": model, "inputs": {}, "step": 3}
    digests = {name: export.file_sha256(folder / name) for name in (export.WEIGHTS, export.CATEGORIES)}
    settings["sha256"] = digests | {export.SETTINGS: export.digest_of(settings)}
    (folder / export.SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "categories.txt"])
def test_every_damage_to_an_exported_model_is_found(exported: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    expected = load_model(folder).state_dict()
    undamaged = (folder / name).read_bytes()
    for content in damaged(undamaged, 7, 30 if name == "model.safetensors" else 60):
        (folder / name).write_bytes(content)
        with within_limits(content):
            model, mistake = outcome(lambda: load_model(folder))
        if model is None:
            assert mistake.startswith(str(folder))
            continue
        assert model.categories == ["bark", "bell"]
        assert all(torch.equal(expected[key], value) for key, value in model.state_dict().items())
    (folder / name).unlink()
    for _ in replaced(folder / name):
        with pytest.raises(DataError):
            load_model(folder)


def test_every_damage_to_a_launch_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [Job(str(2**22 + 7 + n), f"seed={n}", f"runs/s/seed={n}", str(tmp_path), "local") for n in range(3)]
    save_jobs(tmp_path, jobs)
    file = tmp_path / LAUNCH_FILE
    before = file.open()
    save_jobs(tmp_path, jobs[:1])  # who reads, or is killed, in between finds the old list or the new one
    assert len(json.load(before)) == 3
    before.close()
    undamaged = file.read_bytes()
    for content in damaged(undamaged, 9, 300):
        file.write_bytes(content)
        with within_limits(content):
            found, mistake = outcome(lambda: load_jobs(tmp_path))
        if found is None:
            assert mistake.startswith(f"{file}: damaged, so the jobs of this launch are not known")
            continue
        assert {job.folder for job in found} == {str(tmp_path)}
    for name in (f"{jobs[0].id}_exit", f"{jobs[0].id}_0_log.out"):
        for _ in replaced(tmp_path / name):
            Logs(jobs[:1]).show()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("cpsp_dist.launch.jobs._of_process", lambda job: State("RUNNING"))
                assert "seed=0" in describe_jobs(jobs[:1], states(jobs[:1]))
    for code in ("999", "-1", "9" * 5000, "\x00"):
        (tmp_path / f"{jobs[0].id}_exit").write_text(code)
        assert states(jobs[:1])[jobs[0].id].code is None
    capsys.readouterr()
    file.unlink()
    for what in replaced(file):
        assert main(["launch", "--status", str(tmp_path)]) == 2, what
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.long
def test_a_run_whose_files_are_all_damaged_ends_as_if_nothing_were(
    prefork: Any, keypad_shards: Path, tmp_path: Path
) -> None:
    """Everything but its checkpoints: what it resumes to is bit for bit that of the undisturbed run."""
    more = ["data.log_samples=true", "checkpoint.every_steps=2"]
    prefork.start(arguments(keypad_shards, tmp_path / "good", *more, "train.steps=6"), 1).finish()
    output = tmp_path / "run"
    shutil.copytree(tmp_path / "good", output)
    shutil.rmtree(Checkpoints(output).path(6))  # as it was after the fourth step
    for name in ("metrics.jsonl", "audit/rank0.jsonl", "results.json", "evaluation_test.json"):
        content = (output / name).read_bytes()
        (output / name).write_bytes(b'{"step": "x"}\n\xff[[[\n' + content[: len(content) // 2])
    (output / "mlflow_run.json").write_bytes(b"[" * 100_000)
    (output / "checkpoints" / LATEST).write_bytes(b"\xff\0")
    (output / "checkpoints" / "step-00000009").mkdir()
    os.mkdir(os.fsencode(output) + b"/\xff\n")
    printed = prefork.start(arguments(keypad_shards, output, *more, "train.steps=6"), 1).finish()
    assert f"warning: {output}/metrics.jsonl: 2 lines are damaged" in printed
    assert f"warning: {output}/audit/rank0.jsonl: 2 lines are damaged" in printed
    assert "step-00000009: passed over: commit.json is missing" in printed
    (output / "checkpoints" / "step-00000009").rmdir()
    expected, found = newest_state(tmp_path / "good"), newest_state(output)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    (output / "results.json").write_bytes(b'{"accuracy": [1]}')
    launch = prefork.start(["export", str(output), "--out", str(tmp_path / "out")], 1, command="cpsp_dist.cli")
    assert "results.json: damaged" in launch.finish()
    assert "run not finished" in (tmp_path / "out" / CARD).read_text()
