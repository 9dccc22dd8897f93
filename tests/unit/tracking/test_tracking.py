"""What MLflow holds after a run, and what `compare` makes of it."""

from __future__ import annotations

import getpass
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import scipy  # imports its parts when first used
import torch

from cpsp_dist.cli import main
from cpsp_dist.config import flat, load_config
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.inference.model import load_model
from cpsp_dist.losses.diagnostics import POOL_METRICS
from cpsp_dist.metrics.predictions import FROM_PREDICTIONS, Predictions
from cpsp_dist.tracking import git as git_state_module
from cpsp_dist.tracking import mlflow as tracking
from cpsp_dist.utils.console import table
from tests.support.environment import REPO
from tests.support.tracking import CONFIG, arguments, points_of


def send_often_and_stay_at_step_4(rank: int) -> None:
    """Logged are steps 2 and 4, saved is step 3."""
    tracking.SEND_EVERY_SECONDS = 0.2
    log = tracking.Tracker.log

    def stay(self: tracking.Tracker, step: int, metrics: Mapping[str, float]) -> None:
        log(self, step, metrics)
        if step == 4 and self.enabled:
            time.sleep(60)

    tracking.Tracker.log = stay  # type: ignore[method-assign]


def first_point(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    return found


@pytest.fixture(scope="module")
def two_runs(prefork: Any, keypad_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracked")
    runs = {
        "gathered": ["tracking.run_name=a-seed1", "tracking.register=keypad-model", "tracking.report=true"],
        "other": ["tracking.run_name=a-seed2", "train.seed=2"],
        "local": ["objectives.psa_v=0", "train.seed=2"],
    }
    for name, settings in runs.items():
        run = arguments(keypad_shards, folder / name, "pool.bank=16", *settings)
        if name == "other":  # killed when MLflow has a point of a step that is not saved
            before = points_of(folder / "mlflow.db", 4)
            launch = prefork.start(run, 2, patch="tests.unit.tracking.test_tracking:send_often_and_stay_at_step_4")
            assert launch.until(lambda before=before: points_of(folder / "mlflow.db", 4) > before)
            launch.kill()
            launch.wait()
        printed = prefork.start(run, 2).finish()
        (folder / f"{name}.log").write_text(printed)
    return folder


def test_mlflow_holds_everything(two_runs: Path, keypad_shards: Path):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{two_runs / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("cpsp").experiment_id], order_by=["start_time ASC"])
    assert [run.info.run_name for run in runs] == ["a-seed1", "a-seed2", "local"]
    run, output = runs[0], two_runs / "gathered"
    settings = ["train.global_batch=8", "train.steps=6", "tracking.every_steps=2", "engine.kind=ddp", "pool.bank=16"]
    settings += ["checkpoint.every_steps=3"]
    settings += [f"data.shards={keypad_shards}", f"output={output}", "tracking.run_name=a-seed1"]
    settings.append("tracking.register=keypad-model")
    config = load_config(CONFIG, settings)
    assert run.data.params == {key: str(value) for key, value in flat(config).items()} | {"world_size": "2"}
    for name in ("event", "category", "avps", "psa_s", "psa_v", "total"):
        assert [p.step for p in client.get_metric_history(run.info.run_id, f"loss/{name}")] == [2, 4, 6]
    points = {
        name: [point.value for point in client.get_metric_history(run.info.run_id, name)]
        for name in ("grad_norm", "learning_rate", "videos_per_second", "data_wait_share", "accuracy/val")
    }
    assert points["learning_rate"] == [config.train.learning_rate] * 3
    assert all(norm > 0 for norm in points["grad_norm"])
    assert all(rate > 0 for rate in points["videos_per_second"])
    assert all(0 <= share <= 1 for share in points["data_wait_share"])
    # One epoch of 6 steps, whose weights are the best ones: evaluated in the run, and again at its end.
    (accuracy,) = points["accuracy/val"]
    assert accuracy == 100 * json.loads((output / "evaluation_val.json").read_text())["accuracy"]
    assert f"epoch 1/8: val accuracy {accuracy:.2f} %" in (two_runs / "gathered.log").read_text()
    results = json.loads((output / "results.json").read_text())
    assert run.data.metrics["accuracy/test"] == results["accuracy/test"]
    assert run.data.metrics["accuracy/best_val"] == results["accuracy/best_val"]
    versions = {name: version(name) for name in ("torch", "deepspeed", "numpy", "webdataset", "mlflow")}
    versions |= {"cpsp_dist": version("cpsp-dist"), "python": sys.version.split()[0]}
    tags = {name: value for name, value in run.data.tags.items() if name.startswith("version.")}
    assert tags == {f"version.{name}": number for name, number in versions.items()}
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert run.data.tags.get("git.commit", "") == head.stdout.strip()
    assert run.data.tags.get("git.changed") in (("true", "false") if head.stdout else (None,))
    manifest = Manifest.load(keypad_shards)
    assert run.data.tags["data.fingerprint"] == manifest.fingerprint
    data = {each.tags[0].value: each.dataset for each in run.inputs.dataset_inputs}
    assert [*data] == ["training", "val", "test"]
    assert len({dataset.digest for dataset in data.values()}) == 3
    for split, dataset in zip(("train", "val", "test"), data.values(), strict=True):
        profile = json.loads(dataset.profile)
        rows = manifest.samples[manifest.rows(split).start : manifest.rows(split).stop]
        assert (profile["videos"], profile["event_segments"]) == (len(rows), int(rows["events"].sum()))
        features = json.loads(json.loads(dataset.schema)["mlflow_tensorspec"]["features"])
        assert [tuple(each["tensor-spec"]["shape"]) for each in features] == [
            (-1, *manifest.fields[name].shape) for name in ("visual", "audio")
        ]
    for name in ("accuracy", "event_accuracy", "boundary_f1"):
        assert [p.step for p in client.get_metric_history(run.info.run_id, f"{name}/val")] == [6]
    tags = run.data.tags
    assert (tags["ranks"], tags["device"], tags["restarts"], tags["host"]) == ("2", "CPU", "0", socket.gethostname())
    assert (tags["mlflow.user"], tags["mlflow.source.type"]) == (getpass.getuser(), "LOCAL")
    assert tags.get("mlflow.source.git.commit", "") == head.stdout.strip()
    assert "seed 1, 2 ranks" in tags["mlflow.note.content"]
    assert run.info.start_time / 1000 < first_point(output)["time"]
    assert run.info.end_time > run.info.start_time
    experiment = client.get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert experiment.tags["mlflow.experiment.primaryMetric.name"] in run.data.metrics
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    results_of = {f"{name}_{split}" for name in ("evaluation", "predictions") for split in ("val", "test")}
    assert {Path(name).stem for name in artifacts} == results_of | {"config", "report", "figures"}
    figures = {Path(file.path).stem for file in client.list_artifacts(run.info.run_id, "figures")}
    assert figures == {"confusion", "f1_by_category", "accuracy_by_segment", "timelines"}
    assert "F1 by category" in Path(client.download_artifacts(run.info.run_id, "report.html")).read_text()
    where = client.download_artifacts(run.info.run_id, "predictions_test.npz")
    right, total = Predictions.load(Path(where)).parts("accuracy")
    assert 100 * right.sum() / total.sum() == pytest.approx(run.data.metrics["accuracy/test"], abs=1e-12)
    system = [f"system/{name}" for name in ("cpu_utilization_percentage", "system_memory_usage_megabytes")]
    for name in system:
        assert [p.step for p in client.get_metric_history(run.info.run_id, name)] == [2, 4, 6]
        assert all(p.value > 0 for p in client.get_metric_history(run.info.run_id, name))
    page = f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id} after `mlflow ui --backend-store-uri"
    assert page in (two_runs / "gathered.log").read_text()
    artifact = client.download_artifacts(run.info.run_id, "config.json")
    assert json.loads(Path(artifact).read_text()) == config.model_dump(mode="json")


def test_evaluate_gives_the_same_on_any_ranks(
    prefork: Any, two_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures of the run's own evaluation, and the same predictions, whose metrics these figures are."""
    run, expected = str(two_runs / "gathered"), json.loads((two_runs / "gathered" / "evaluation_test.json").read_text())
    stored = Predictions.load(two_runs / "gathered" / "predictions_test.npz")
    files = {1: tmp_path / "one.npz", 3: tmp_path / "three.npz"}
    assert main(["evaluate", run, "--json", "--predictions", str(files[1])]) == 0
    found = {1: json.loads(capsys.readouterr().out)}
    arguments = ["evaluate", run, "--json", "--predictions", str(files[3])]
    printed = prefork.start(arguments, 3, command="cpsp_dist.cli").finish()
    found[3] = json.loads(printed[printed.index("{") :])
    for world, file in files.items():
        assert {key: found[world][key] for key in expected} == expected
        again = Predictions.load(file)
        assert again.key.tolist() == sorted(again.key.tolist()) == stored.key.tolist()
        assert len(again) == expected["videos"]
        assert (again.label == stored.label).all()
        for metric in FROM_PREDICTIONS:
            parts, totals = again.parts(metric)
            assert parts.sum() / totals.sum() == pytest.approx(expected[metric], abs=1e-12)


def test_a_killed_run_is_one_run_with_each_point_once(two_runs: Path) -> None:
    from mlflow import MlflowClient

    assert "resuming from" in (two_runs / "other.log").read_text()
    client = MlflowClient(tracking_uri=f"sqlite:///{two_runs / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("cpsp").experiment_id], order_by=["start_time ASC"])
    (run,) = [run for run in runs if run.info.run_name == "a-seed2"]
    assert run.info.status == "FINISHED"
    for name in ("loss/total", "grad_norm", "pool/size"):
        assert [point.step for point in client.get_metric_history(run.info.run_id, name)] == [2, 4, 6], name


def test_the_model_is_loaded_by_mlflow(two_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its signature and for its example, as the exported model predicts; and as a version of a registered one."""
    import mlflow

    uri = f"sqlite:///{two_runs / 'mlflow.db'}"
    client = mlflow.MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("cpsp").experiment_id], order_by=["start_time ASC"])
    (output,) = runs[0].outputs.model_outputs
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    model = mlflow.pyfunc.load_model(f"models:/{output.model_id}")
    example = model.input_example
    found = model.predict(example)
    exported = load_model(two_runs / "gathered")
    expected = exported(*(torch.from_numpy(example[name]) for name in ("visual", "audio")))
    assert found["event_probability"] == pytest.approx(expected.event_logits.sigmoid().detach().numpy())
    assert found["category_probability"] == pytest.approx(expected.category_logits.softmax(1).detach().numpy())
    names = {each.name: each.shape for each in model.metadata.signature.inputs}
    assert [*names] == ["visual", "audio"]
    assert names["visual"][1:] == example["visual"].shape[1:]
    (version_,) = client.search_model_versions("name = 'keypad-model'")
    assert version_.run_id == runs[0].info.run_id
    with pytest.raises(mlflow.MlflowException, match="audio"):
        model.predict({"visual": example["visual"]})


def test_git_state_names_the_commit_and_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60).stdout

    monkeypatch.setattr(git_state_module, "__file__", str(tmp_path / "cpsp_dist" / "tracking" / "git.py"))
    git("init", "--quiet")
    (tmp_path / "kept").touch()
    git("add", "kept")
    git("commit", "--quiet", "--message=x")
    commit, index = git("rev-parse", "HEAD").strip(), tmp_path / ".git" / "index"
    os.utime(tmp_path / "kept", (1, 1))  # what makes git write its index again, under a lock that a kill would leave
    before = index.read_bytes()
    assert git_state_module.git_state() == {"git.commit": commit, "git.changed": "false"}
    assert index.read_bytes() == before
    (tmp_path / "new").touch()
    assert git_state_module.git_state() == {"git.commit": commit, "git.changed": "true"}


def test_health_of_the_pool_is_in_mlflow(two_runs: Path) -> None:
    """Two ranks of 4 videos and a bank: every figure at every logged step, and what is known of them is right."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{two_runs / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("cpsp").experiment_id], order_by=["start_time ASC"])
    assert {name.removeprefix("pool/") for name in runs[0].data.metrics if name.startswith("pool/")} == set(
        POOL_METRICS
    )
    history = {name: client.get_metric_history(runs[0].info.run_id, f"pool/{name}") for name in POOL_METRICS}
    found = {name: [point.value for point in points] for name, points in history.items()}
    assert [[point.step for point in points] for points in history.values()] == [[2, 4, 6]] * len(POOL_METRICS)
    assert found["gather_bytes"] == [(2 - 1) * 4 * 2 * 256 * 4] * 3  # embeddings and their gradients; labels are known
    assert all(milliseconds > 0 for milliseconds in found["gather_ms"])
    assert found["remembered"][0] <= 8 < found["remembered"][2] <= 16
    for size, remembered in zip(found["size"], found["remembered"], strict=True):
        assert 0 < size - remembered <= 8
    for name in ("anchors_with_positive", "active_hinges", "suspected_false_negatives"):
        assert all(0 <= share <= 1 for share in found[name]), name
    for name in ("anchors_with_positive", "active_hinges", "positive_distance", "negative_distance"):
        assert all(value > 0 for value in found[name]), name
    # Without PSA_V there is no pool, and nothing is gathered.
    assert {name for name in runs[2].data.metrics if name.startswith("pool/")} == {
        "pool/gather_ms",
        "pool/gather_bytes",
    }


def test_compare_shows_what_differs_and_what_came_out(two_runs: Path, capsys):
    uri = f"sqlite:///{two_runs / 'mlflow.db'}"
    assert main(["compare", "--uri", uri]) == 0
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["run", "psa_v", "seed", "test"]
    rows = {line.split()[0]: line.split() for line in lines[:3]}
    assert (rows["a-seed1"][1:3], rows["local"][1:3]) == (["1.0", "1"], ["0.0", "2"])
    results = [json.loads((two_runs / name / "results.json").read_text()) for name in ("gathered", "other")]
    first, second = (found["accuracy/test"] for found in results)
    assert rows["a-seed1"][3] == f"{first:.2f}"
    assert [float(row[3]) for row in rows.values()] == sorted([float(row[3]) for row in rows.values()], reverse=True)

    assert main(["compare", "--uri", uri, "--mean", "--json", "--sort", "run"]) == 0
    (both, alone) = json.loads(capsys.readouterr().out)["rows"]
    assert (both["runs"], alone["runs"]) == ("a", "local")
    assert both["metrics"]["accuracy/test"]["seeds"] == {"1": first, "2": second}
    low, high = scipy.stats.t.interval(0.95, 1, loc=(first + second) / 2, scale=scipy.stats.sem([first, second]))
    assert both["metrics"]["accuracy/test"]["over_seeds"] == pytest.approx([low, high])


def test_compare_finds_the_store_itself(two_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """MLFLOW_TRACKING_URI, else the store beside the run folders of `runs/`; empty is as not set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{two_runs / 'mlflow.db'}")
    assert main(["compare"]) == 0
    by_environment = capsys.readouterr().out
    assert sorted(line.split()[0] for line in by_environment.splitlines()[2:5]) == ["a-seed1", "a-seed2", "local"]
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert main(["compare"]) == 2
    assert "no MLflow store at sqlite:///runs/mlflow.db" in capsys.readouterr().err
    (tmp_path / "runs").symlink_to(two_runs)
    assert main(["compare"]) == 0
    assert capsys.readouterr().out == by_environment
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert main(["compare"]) == 0
    assert capsys.readouterr().out == by_environment


def test_compare_names_where_it_looked(two_runs: Path, tmp_path: Path, capsys):
    assert main(["compare", "--uri", f"sqlite:///{tmp_path}/none.db"]) == 2
    assert main(["compare", "--uri", f"sqlite:///{two_runs / 'mlflow.db'}", "--experiment", "cps"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "no MLflow store at" in first
    assert "no experiment 'cps'" in second
    assert "cpsp" in second


def test_tables_align():
    rows = [{"run": "a", "value": 1.0}, {"run": "longer", "value": None}]
    assert table(rows) == "run     value\n------  -----\na           1\nlonger      -"
