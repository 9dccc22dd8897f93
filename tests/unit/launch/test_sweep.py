"""The runs of a sweep: what `--sweep` makes of its values, what it refuses, and the MLflow run above them."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import pytest

from cpsp_dist.cli import main
from cpsp_dist.config import load_config, loading
from cpsp_dist.config.yaml_text import read_yaml
from cpsp_dist.launch import files
from cpsp_dist.launch.jobs import Job, State
from cpsp_dist.launch.sweep import plan_runs, with_parent
from cpsp_dist.tracking.runs import find_runs
from cpsp_dist.tracking.sweeps import close_sweep, open_sweep
from cpsp_dist.utils.errors import ConfigError
from tests.support.launching import QUICK
from tests.support.limits import SECONDS
from tests.support.runs import KEYPAD, overrides
from tests.support.runs import sweep_parents as parents


def test_a_sweep_has_a_run_for_each_combination():
    sweeps = ["train.seed=1,2", "objectives.psa_v=0,0.5", "train.milestones=[6,9],[4]"]
    output, runs = plan_runs(KEYPAD, ["output=runs/s", "tracking.run_name=all"], sweeps)
    assert output == "runs/s"
    assert len({run.name for run in runs}) == 8
    assert [run.name for run in runs[:3]] == [
        "psa_v=0,milestones=6_9,seed=1",
        "psa_v=0,milestones=4,seed=1",
        "psa_v=0.5,milestones=6_9,seed=1",
    ]
    for run in runs:
        seed = int(run.name[-1])
        expected = load_config(
            KEYPAD,
            [
                f"output=runs/s/{run.name}",
                f"train.seed={seed}",
                f"objectives.psa_v={0.5 if 'psa_v=0.5' in run.name else 0}",
                f"train.milestones={[6, 9] if '6_9' in run.name else [4]}",
            ],
        )
        assert run.config == expected


def test_keys_with_one_last_part_are_named_in_full():
    _, runs = plan_runs(KEYPAD, [], ["checkpoint.every_steps=1", "tracking.every_steps=2"])
    assert [run.name for run in runs] == ["checkpoint.every_steps=1,tracking.every_steps=2"]
    _, (alone,) = plan_runs(KEYPAD)
    assert alone.name == ""
    assert alone.config == load_config(KEYPAD)


def test_every_mistake_of_a_sweep_is_reported_at_once():
    sweeps = [
        "train.seed=1,x",
        "train.gama=1",
        "output=a,b",
        "pool.bank=0,8",
        "data.reader_threads=1,1",
        "train.epochs",
    ]
    sweeps += ["pool.bank=1", "data.prefetch_batches=2"]
    with pytest.raises(ConfigError) as raised:
        plan_runs(KEYPAD, ["pool.scope=local", "evaluation.bach=3", "data.prefetch_batches=4"], sweeps)
    assert str(raised.value).splitlines() == [
        f"{KEYPAD}: ",
        "  --sweep output: a sweep sets it for each of its runs",
        "  --sweep 'data.reader_threads=1,1': a value stands there twice",
        "  --sweep 'train.epochs': write it as section.key=value,value,...",
        "  --sweep pool.bank: is given twice; list all values in one",
        "  --sweep data.prefetch_batches: also stands among the overrides; take it out of there",
        "  unknown key 'train.gama'; did you mean 'train.gamma'?",
        "  unknown key 'evaluation.bach'; did you mean 'evaluation.global_batch'?",
        "  gama=1,bank=8,seed=1: pool: bank=8 needs scope=gather: every rank remembers the same videos",
        "  gama=1,bank=0,seed=x: train.seed='x': input should be a valid integer",
    ]


def test_the_files_of_a_sweep_are_read_once(monkeypatch):
    """Thousands of runs would take a minute else."""
    files = []
    monkeypatch.setattr(loading, "read_yaml", lambda path: files.append(path) or read_yaml(path))
    _, runs = plan_runs("ave_full", ["data.shards=s"], [f"train.seed={','.join(map(str, range(200)))}"])
    assert [run.config.train.seed for run in runs] == [*range(200)]
    assert len(files) == len({*files})


@pytest.mark.long
def test_the_largest_sweep():
    began = time.process_time()
    _, runs = plan_runs(KEYPAD, [], ["train.seed=1,2", f"train.epochs={','.join(map(str, range(1, 2501)))}"])
    assert len({run.config.output for run in runs}) == 5000
    assert time.process_time() - began < SECONDS


def test_a_sweep_of_too_many_runs_or_mistakes_is_a_few_lines():
    many = ",".join(map(str, range(2, 302)))
    with pytest.raises(ConfigError, match=r"a sweep of 27,000,000 runs; 5,000 are the most, split it into several$"):
        plan_runs(KEYPAD, [], [f"train.{key}={many}" for key in ("seed", "epochs", "steps")])
    with pytest.raises(ConfigError) as raised:
        plan_runs(KEYPAD, [], [f"train.gamma={many}"])
    lines = str(raised.value).splitlines()
    assert lines[1] == "  gamma=2: train.gamma=2: input should be less than or equal to 1"
    assert lines[-1] == "  and 260 more mistakes"
    assert len(lines) == 42


# One MLflow run above a sweep


@pytest.mark.long
def test_a_sweep_is_one_run_with_its_runs_below(prefork, keypad_shards, tmp_path, monkeypatch, capsys):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    output = tmp_path / "tried"
    settings = overrides(keypad_shards, output, *QUICK)
    _, runs = plan_runs(KEYPAD, settings, ["train.seed=1,2"])
    parent = open_sweep(runs[0].config, str(output), len(runs))
    for number, run in enumerate(runs):
        more = [f"output={run.config.output}", f"train.seed={run.config.train.seed}", f"tracking.parent={parent}"]
        more.append(f"tracking.uri={run.config.tracking.uri}")
        prefork.start(["--config", str(KEYPAD), *settings, *more], 1).finish()
        config = load_config(KEYPAD, [*settings, *more])
        close_sweep(config)  # as each job does at its end
        status = "RUNNING" if number == 0 else "FINISHED"
        assert parents(output) == [{"id": parent, "name": "tried", "status": status}]
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    below = client.search_runs([client.get_run(parent).info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert {run.info.run_name for run in below} == {"seed=1", "seed=2"}
    rows = list(csv.DictReader(Path(client.download_artifacts(parent, "comparison.csv")).read_text().splitlines()))
    accuracies = {run.info.run_name: run.data.metrics["accuracy/test"] for run in below}
    assert {row["run"]: float(row["accuracy/test"]) for row in rows} == accuracies
    assert "seed=1" in client.get_run(parent).data.tags["mlflow.note.content"]
    # The same sweep launched again, of more runs: the same run above it. One of its jobs fails before MLflow knows of
    # it, and those that followed the jobs see it.
    assert open_sweep(runs[0].config, str(output), 3) == parent
    assert parents(output)[0]["status"] == "RUNNING"
    child = with_parent(runs[0], parent)
    close_sweep(child.config)
    assert parents(output)[0]["status"] == "RUNNING"
    files.write_snapshots(output, [child], "source")
    ended = [Job("1", child.name, child.config.output, str(output), "slurm"), Job("2", "", "", str(output), "slurm")]
    files.end_sweep(ended, {"1": State("COMPLETED"), "2": State("RUNNING")})
    assert parents(output)[0]["status"] == "RUNNING"
    files.end_sweep(ended, {"1": State("COMPLETED"), "2": State("FAILED", code=2)})
    assert parents(output)[0]["status"] == "FAILED"
    # A run beside the sweep, and the tables.
    beside = [f"output={tmp_path}/beside", "train.seed=7"]
    prefork.start(["--config", str(KEYPAD), *settings, *beside], 1).finish()
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"

    def found(parent: str | None = None) -> list[str]:
        return [run.name for run in find_runs(uri, ["cpsp"], parent=parent)]

    assert found() == ["seed=1", "seed=2", "beside"]
    assert found("tried") == found(parent) == ["seed=1", "seed=2"]
    capsys.readouterr()
    assert main(["compare", "--uri", uri, "--parent", "tired"]) == 2
    assert "no sweep 'tired' in experiment 'cpsp'" in capsys.readouterr().err
    assert main(["compare", "--uri", uri, "--parent", "tried", "--mean", "--json"]) == 0
    (mean,) = json.loads(capsys.readouterr().out)["rows"]
    assert (mean["runs"], [*mean["metrics"]["accuracy/test"]["seeds"]]) == ("all", ["1", "2"])
