"""The trainer from end to end, in real processes: one process against many, killed against uninterrupted, errors."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cpsp_dist.cli import main
from cpsp_dist.config import load_config
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.distributed import process_group
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.tracking.known_runs import recorded_run
from cpsp_dist.tracking.runs import find_runs
from cpsp_dist.training import gc_control
from cpsp_dist.training.checkpoint import Checkpoints
from cpsp_dist.training.evaluate import evaluate_run
from cpsp_dist.training.setup import initial_model
from cpsp_dist.training.trainer import train
from tests.support.environment import REPO, environment
from tests.support.runs import KEYPAD, loss_history, newest_weights, overrides
from tests.support.runs import plain_arguments as arguments


def train_each(shards: Path, folder: Path, kinds: dict[str, list[str]]) -> None:
    """Train every kind, one after the other, in the group that is there."""
    here = process_group.discover()
    ranks = Ranks(here.rank, here.world, here.local_rank, torch.device("cpu"))
    for name, settings in kinds.items():
        train(load_config(KEYPAD, overrides(shards, folder / name, "tracking.enabled=false", *settings)), ranks)


SGD = ["train.optimizer=sgd", "train.learning_rate=0.01", "tracking.every_steps=1"]
#: Clipping would hide a gradient of a wrong uniform scale. The rate is one that SGD bears unclipped: at 0.01 the first
#: steps overshoot, and float32's rounding grows to 3e-4 of a weight, where float64's stays at 2e-16.
UNCLIPPED = [*SGD, "train.learning_rate=1e-3", "train.grad_clip_norm=null", "evaluation.global_batch=7"]
ENGINES = {
    "ddp-fp64": [*UNCLIPPED, "engine.kind=ddp", "train.precision=fp64"],
    **{f"zero{stage}": [*UNCLIPPED, f"engine.zero={stage}"] for stage in range(4)},
}


def gradient_norms(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["grad_norm"] for line in lines if "grad_norm" in line]


def evaluations(output: Path) -> dict[str, Any]:
    return {split: evaluate_run(str(output), split) for split in ("val", "test")}


@pytest.mark.parametrize(
    ("engines", "steps"),
    [(["ddp-fp64", "zero2"], 8), pytest.param(list(ENGINES), 20, marks=pytest.mark.long)],
    ids=["DDP and ZeRO-2", "all"],
)
def test_two_ranks_equal_one(ranks, keypad_shards, tmp_path, engines, steps):
    """Half batches on two ranks, the complete batch on one: the same losses, gradient norms and parameters after some
    SGD steps, and the same evaluation; of one model also on three ranks, which neither its 16 videos nor a batch of 7
    (a last one of 2) divides by."""
    for world in (1, 2):
        ranks(
            train_each,
            world,
            keypad_shards,
            tmp_path / f"world{world}",
            {name: [*ENGINES[name], f"train.steps={steps}"] for name in engines},
            timeout=400,
        )
    config = load_config(KEYPAD, overrides(keypad_shards, tmp_path))
    initial = initial_model(config, Manifest.load(keypad_shards)).state_dict()
    for name in engines:
        tolerance = 1e-9 if name == "ddp-fp64" else 1e-5
        one, two = tmp_path / "world1" / name, tmp_path / "world2" / name
        history = [loss_history(one), loss_history(two)]
        assert len(history[0]) == steps
        assert {"loss/event", "loss/category", "loss/avps", "loss/psa_s", "loss/psa_v"} < set(history[0][0])
        for at_one, at_two in zip(*history, strict=True):
            assert at_two == pytest.approx(at_one, rel=tolerance, abs=tolerance), name
        assert gradient_norms(two) == pytest.approx(gradient_norms(one), rel=tolerance), name
        weights = newest_weights(one), newest_weights(two)
        assert weights[0]["propagation.v_fc.weight"].dtype == (torch.float64 if name == "ddp-fp64" else torch.float32)
        for key in weights[0]:
            torch.testing.assert_close(weights[1][key], weights[0][key], rtol=tolerance, atol=tolerance)
        moved, apart = ({key: a[key].double() - b[key] for key in a} for a, b in ((weights[0], initial), weights))
        assert total(moved) > 0.2  # with clip 0.1 at a rate of 0.01 it was 0.014
        assert total(apart) < tolerance * total(moved)
        # Of each parameter alone: some move by 2e-4 in all, and float32's rounding leaves them 2e-8 apart.
        for key, movement in moved.items():
            assert apart[key].norm() < (1e-9 if name == "ddp-fp64" else 1e-3) * movement.norm(), (name, key)

    one, two = tmp_path / "world1" / "ddp-fp64", tmp_path / "world2" / "ddp-fp64"
    expected = {split: json.loads((one / f"evaluation_{split}.json").read_text()) for split in ("val", "test")}
    for split, found in expected.items():
        assert json.loads((two / f"evaluation_{split}.json").read_text()) == found
        assert found["videos"] == 16
    for found in ranks(evaluations, 3, one):
        assert found == {split: known | {"step": steps} for split, known in expected.items()}


def total(tensors: dict[str, torch.Tensor]) -> float:
    """L2 norm of all together."""
    return torch.stack([tensor.norm() for tensor in tensors.values()]).norm().item()


@pytest.mark.parametrize("stages", [(2,), pytest.param((0, 1, 2, 3), marks=pytest.mark.long)], ids=["2", "all"])
def test_bf16_trains_and_every_zero_stage_agrees(ranks, keypad_shards, tmp_path, stages):
    kinds = {f"bf16-zero{z}": ["train.precision=bf16", f"engine.zero={z}", "train.steps=12"] for z in stages}
    ranks(train_each, 2, keypad_shards, tmp_path, kinds, timeout=300)
    first, *others = (loss_history(tmp_path / name) for name in kinds)
    assert first[-1]["loss/total"] < first[0]["loss/total"]
    for other in others:
        assert other[-1]["loss/total"] == pytest.approx(first[-1]["loss/total"], rel=0.05)


@pytest.mark.long
def test_killed_run_is_one_run_in_mlflow(prefork, keypad_shards, tmp_path):
    """SIGKILL three times, before the first checkpoint and later, started again each time: one run with every step
    once, that lasts from the first start to the end of the last."""
    began = time.time()
    more = ["tracking.every_steps=1", "checkpoint.every_steps=6"]
    run = arguments(keypad_shards, tmp_path / "killed", *more)
    for step in (2, 8, 14):
        # They wait there, so that MLflow has the time it takes to make a new store and a run.
        launch = prefork.start(run, 2, hold=[step])
        assert launch.until_step(step), launch.outputs()
        assert launch.until(lambda: recorded_run(tmp_path / "killed") is not None)
        launch.kill()
        launch.wait()
    assert "resuming from" in prefork.start(run, 2).finish()
    runs = find_runs(f"sqlite:///{tmp_path / 'mlflow.db'}", ["cpsp"])
    assert [(run.status, run.tags["restarts"]) for run in runs] == [("FINISHED", "3")]
    first = json.loads((tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()[0])["time"]
    assert began < runs[0].start < first
    last = (tmp_path / "killed" / "predictions_test.npz").stat().st_mtime
    assert last < runs[0].end < time.time()
    assert logged_steps(tmp_path / "mlflow.db") == list(range(1, 21))
    # Once finished, it says so and trains no more.
    again = prefork.start(run, 2).finish()
    assert "(finished)" in again
    assert "step 20/20" not in again


def logged_steps(store: Path) -> list[int]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{store}")
    run = client.search_runs([client.get_experiment_by_name("cpsp").experiment_id])[0]
    return sorted(point.step for point in client.get_metric_history(run.info.run_id, "loss/total"))


@pytest.mark.parametrize(
    ("before", "after", "steps", "tolerance"),
    [
        pytest.param(["engine.kind=ddp", "train.precision=fp64"], [], (12, 20), 1e-9, marks=pytest.mark.long),
        (["engine.zero=2", *SGD], ["engine.zero=3"], (4, 8), 1e-6),
    ],
    ids=["adam fp64", "sgd zero 2 to 3"],
)
def test_another_world_size_and_engine_resumes(prefork, keypad_shards, tmp_path, before, after, steps, tolerance):
    """Some steps on one rank, the rest on two: as on one rank throughout.

    Adam in float64, for in float32 a rounding that turns one ReLU over is a thousandth of a weight some steps later,
    on any number of ranks (measured); losing the moments would show at once.
    """
    more = ["tracking.enabled=false", "tracking.every_steps=1", "checkpoint.every_steps=4", *before]
    more += [f"train.steps={steps[1]}"]
    prefork.start(arguments(keypad_shards, tmp_path / "one", *more), 1).finish()
    launch = prefork.start(arguments(keypad_shards, tmp_path / "moved", *more), 1, hold=[steps[0] + 2])
    assert launch.until_step(steps[0] + 1)
    launch.kill()
    launch.wait()
    assert "resuming from" in prefork.start(arguments(keypad_shards, tmp_path / "moved", *more, *after), 2).finish()
    expected, found = newest_weights(tmp_path / "one"), newest_weights(tmp_path / "moved")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=tolerance)


def user_error(prefork: Any, arguments: list[str], world: int = 1, **more: Any) -> str:
    """The one line that all ranks of a mistaken call print between them; checks that each exits with code 2."""
    launch = prefork.start(arguments, world, **more)
    assert launch.wait() == [2] * world, launch.outputs()
    (line,) = [line for rank in launch.ranks for line in rank.output.strip().splitlines()]
    return line


def print_gc_thresholds(rank: int) -> None:
    from cpsp_dist.distributed import process_group
    from cpsp_dist.training.lr_schedule import TrainingSchedule

    for owner, name in ((process_group, "discover"), (TrainingSchedule, "learning_rate")):
        original = getattr(owner, name)

        def printed(*args, name=name, original=original, **named):
            print(name, gc.get_threshold()[0], gc.get_freeze_count(), flush=True)
            return original(*args, **named)

        setattr(owner, name, printed)


def test_garbage_is_collected_seldom_during_the_start_and_as_usual_after(prefork, keypad_shards, tmp_path):
    run = ["--config", str(KEYPAD), *overrides(keypad_shards, tmp_path / "run", "train.steps=2")]
    run += ["tracking.enabled=false", "engine.kind=ddp"]
    output = prefork.start(run, 1, patch="tests.integration.test_training:print_gc_thresholds").finish()
    calls = [line.split() for line in output.splitlines() if line.startswith(("discover ", "learning_rate "))]
    starts, trains, _ = [(name, int(every)) for name, every, _ in calls]
    assert starts == ("discover", gc_control.REDUCED_THRESHOLD)
    assert trains == ("learning_rate", gc.get_threshold()[0])
    frozen = [int(count) for _, _, count in calls]
    assert frozen[1] > frozen[0], "what the start made"


def test_garbage_of_a_training_inside_a_program_is_collected():
    before = gc.get_freeze_count(), gc.get_threshold()
    gc_control.restore_gc()
    with gc_control.reduced_gc():
        assert gc.get_threshold()[0] == gc_control.REDUCED_THRESHOLD
    assert (gc.get_freeze_count(), gc.get_threshold()) == before


def test_a_mistake_under_plain_python(tmp_path):
    """Without the prefork, and without a launcher: stderr has the line alone."""
    command = [sys.executable, "-m", "cpsp_dist.train", "--config", "none.yaml"]
    done = subprocess.run(command, env=environment(), cwd=REPO, text=True, capture_output=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "error: none.yaml: cannot read this config file: No such file or directory\n"


def test_mistakes_are_one_line_with_exit_code_2(prefork, keypad_shards, tmp_path):
    out = tmp_path / "run"
    config = ["--config", str(KEYPAD), f"output={out}"]
    assert "none.yaml: cannot read" in user_error(prefork, ["--config", "none.yaml"])
    assert "did you mean 'train.epochs'" in user_error(prefork, [*config, "train.epoch=1"])
    assert f"{tmp_path}/nothing: no such folder" in user_error(prefork, [*config, f"data.shards={tmp_path}/nothing"])
    shards = [*config, f"data.shards={keypad_shards}"]
    message = user_error(prefork, [*shards, "train.global_batch=64"])
    assert "48" in message
    assert "64" in message
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "half.json").write_text('{"zero_optimization": ')
    for setting in (
        f"engine.deepspeed={tmp_path}/none.json",
        f"engine.deepspeed={tmp_path}/half.json",
        f"model.weights={tmp_path}/none.safetensors",
        f"model.weights={tmp_path}/empty.safetensors",
    ):
        assert setting.partition("=")[2] in user_error(prefork, [*shards, "train.global_batch=8", setting])
    assert not out.exists(), "a refused run leaves nothing behind"
    assert not (tmp_path / "mlflow.db").exists()


def damaged(shards: Path, folder: Path, name: str, size: int) -> Path:
    """A copy of `shards` whose file `name` has only its first `size` bytes."""
    shutil.copytree(shards, folder)
    os.truncate(folder / name, size)
    return folder


def test_damaged_data_is_reported_once_by_all_ranks_together(prefork, keypad_shards, tmp_path):
    """What every rank meets as what one rank meets alone: one line that names the file, and every rank ends."""
    shard = next(keypad_shards.glob("train-*.tar")).name
    places = {
        "nothing": tmp_path / "nothing",
        "index.json": damaged(keypad_shards, tmp_path / "index", "index.json", 200),
        "samples.npy": damaged(keypad_shards, tmp_path / "samples", "samples.npy", 200),
        shard: damaged(keypad_shards, tmp_path / "shard", shard, 100_000),
    }
    for name, place in places.items():
        message = user_error(prefork, arguments(place, tmp_path / "run"), 2)
        assert message.startswith("error: ")
        assert f"{place}" in message, message
        assert name in message, message
    message = user_error(prefork, arguments(keypad_shards, tmp_path / "run", "train.global_batch=64"), 2)
    assert "64" in message
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "mlflow.db").exists()


def test_changed_settings_are_refused_with_the_difference(prefork, keypad_shards, tmp_path):
    base = arguments(keypad_shards, tmp_path / "run", "train.steps=2", "tracking.enabled=false")
    prefork.start(base, 1).finish()
    message = user_error(prefork, [*base, "objectives.psa_v=0.5"])
    assert "objectives.psa_v 1.0 -> 0.5" in message
    assert "engine.compile 'none' -> 'inductor'" in user_error(prefork, [*base, "engine.compile=inductor"])
    assert "remove it, or set another output" in user_error(prefork, [*base, "--fresh"])
    other = tmp_path / "other-shards"
    assert main(["shards", "subset", str(keypad_shards), "--fraction", "0.9", "--out", str(other)]) == 0
    message = user_error(prefork, [*base, f"data.shards={other}"])
    assert f"the shards at {other} are not the ones it was trained on" in message
    assert "it is of step 2, train.epochs and train.steps now ask for 1" in user_error(
        prefork, [*base, "train.steps=1"]
    )
    assert "(finished)" in prefork.start(base, 1).finish()
    assert Checkpoints(tmp_path / "run").steps()[-1] == 2, "a finished run stays finished"
    prefork.start([*base, "train.steps=3"], 1).finish()
    assert Checkpoints(tmp_path / "run").steps()[-1] == 3, "until it is to be longer"


@pytest.mark.long
def test_a_finished_run_trains_more_epochs(prefork, keypad_shards, tmp_path):
    """Asked for more, it continues after its last step."""
    output = tmp_path / "run"
    settings = arguments(keypad_shards, output, "engine.kind=ddp", "train.steps=null", "train.milestones=[]")
    prefork.start([*settings, "train.epochs=1"], 1).finish()
    assert Checkpoints(output).newest_valid()[0] == 6
    prefork.start([*settings, "train.epochs=3", "--allow-config-change"], 1).finish()
    assert Checkpoints(output).newest_valid()[0] == 18


@pytest.mark.long  # test_pool_over_parts.py has the short form
def test_a_pool_over_parts_trains_as_one_part(ranks: Any, keypad_shards: Path, tmp_path: Path) -> None:
    """Two ranks, a global batch in four parts, a bank, an epoch's padded end, and a resume halfway: losses and weights
    of one rank with one part."""
    pool = ["engine.kind=ddp", "engine.zero=0", "train.precision=fp64", "pool.bank=6", "data.epoch_end=pad"]
    pool += ["train.global_batch=20", "train.optimizer=sgd", "objectives.sspsp=0.1", "tracking.every_steps=1"]
    parts = [*pool, "pool.over=parts", "train.accumulation=4"]
    ranks(train_each, 1, keypad_shards, tmp_path / "one", {"run": [*pool, "train.steps=6"]}, timeout=400)
    for steps in (3, 6):
        ranks(train_each, 2, keypad_shards, tmp_path / "two", {"run": [*parts, f"train.steps={steps}"]}, timeout=400)
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    assert len(loss_history(one)) == 6
    for at_one, at_two in zip(loss_history(one), loss_history(two), strict=True):
        assert at_two == pytest.approx(at_one, rel=1e-9, abs=1e-9)
    weights = newest_weights(one), newest_weights(two)
    for key in weights[0]:
        torch.testing.assert_close(weights[1][key], weights[0][key], rtol=1e-9, atol=1e-9)
