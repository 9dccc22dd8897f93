"""What MLflow itself shows of two runs: by the REST answers of its server, and by its pages in a real Chromium."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpsp_dist.data.manifest import Manifest
from cpsp_dist.tracking.runs import experiment_page
from tests.support.browser import Browser
from tests.support.environment import environment, free_port
from tests.support.runs import plain_arguments

pytestmark = pytest.mark.long
NAMES = ("a-seed1", "a-seed2")


@dataclass(frozen=True)
class Served:
    """A server over the store of two runs. ids: of the runs, as `NAMES`."""

    url: str
    experiment: str
    ids: list[str]

    def ask(self, path: str, **content: Any) -> dict[str, Any]:
        """The answer to a POST with `content`, or to a GET where there is none."""
        data = json.dumps(content).encode() if content else None
        request = urllib.request.Request(
            f"{self.url}/api/2.0/mlflow/{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
            return found


@pytest.fixture(scope="module")
def served(prefork: Any, keypad_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    for seed, name in enumerate(NAMES, 1):
        more = ["train.steps=4", "train.epochs=9", "tracking.every_steps=2", f"train.seed={seed}", "engine.kind=ddp"]
        more += [f"tracking.run_name={name}", "evaluation.every_epochs=1", "tracking.flush_timeout=100"]
        more += ["tracking.report=true", "tracking.register=keypad-model"] if seed == 1 else []
        prefork.start(plain_arguments(keypad_shards, folder / name, *more), 1).finish(300)
    port, store = free_port(), f"sqlite:///{folder / 'mlflow.db'}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment(), cwd=folder, stdout=log, stderr=log)
    try:
        found = Served(f"http://127.0.0.1:{port}", "", [])
        deadline = time.monotonic() + 180
        while not found.experiment:
            assert server.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline, (folder / "server.log").read_text()
            with contextlib.suppress(OSError):
                experiment = found.ask("experiments/get-by-name?experiment_name=cpsp")["experiment"]["experiment_id"]
                runs = found.ask("runs/search", experiment_ids=[experiment], order_by=["start_time ASC"])["runs"]
                found = Served(found.url, experiment, [run["info"]["run_id"] for run in runs])
        yield found
    finally:
        server.terminate()
        server.wait(60)


def test_rest(served: Served) -> None:
    runs = served.ask("runs/search", experiment_ids=[served.experiment], order_by=["start_time ASC"])["runs"]
    assert [run["info"]["run_name"] for run in runs] == [*NAMES]
    for run in runs:
        tags = {each["key"]: each["value"] for each in run["data"]["tags"]}
        wanted = {"mlflow.user", "mlflow.source.name", "mlflow.source.type", "mlflow.note.content", "host", "launcher"}
        assert wanted | {"ranks", "device", "restarts"} <= tags.keys()
        assert "To repeat it" in tags["mlflow.note.content"]
        metrics = {each["key"] for each in run["data"]["metrics"]}
        assert {f"{m}/val" for m in ("accuracy", "event_accuracy", "boundary_f1")} <= metrics
        assert {"accuracy/test", "accuracy/best_val", "system/cpu_utilization_percentage"} <= metrics
        sets = [each["dataset"] for each in run["inputs"]["dataset_inputs"]]
        assert [json.loads(each["profile"])["num_rows"] for each in sets] == [48, 16, 16]
        assert all("mlflow_tensorspec" in json.loads(each["schema"]) for each in sets)
        assert run["info"]["status"] == "FINISHED"
    files = served.ask(f"artifacts/list?run_id={served.ids[0]}")["files"]
    wanted = {"config.json", "report.html", "figures"}
    wanted |= {f"{n}_{s}" for n in ("evaluation", "predictions") for s in ("val.", "test.")}
    assert {name for name in wanted if not any(file["path"].startswith(name) for file in files)} == set()
    history = served.ask(f"metrics/get-history?run_id={served.ids[0]}&metric_key=loss/total")["metrics"]
    assert [point["step"] for point in history] == [2, 4]
    models = served.ask("logged-models/search", experiment_ids=[served.experiment])["models"]
    assert {model["info"]["status"] for model in models} == {"LOGGED_MODEL_READY"}
    assert {model["info"]["source_run_id"] for model in models} == {*served.ids}
    versions = served.ask("registered-models/get?name=keypad-model")["registered_model"]["latest_versions"]
    assert [version["run_id"] for version in versions] == served.ids[:1]


def pages(served: Served) -> dict[str, tuple[str, list[str]]]:
    """{what: (what follows the address of the server, what the page has to show)}"""
    first, both = served.ids[0], json.dumps(served.ids).replace(" ", "")
    run = f"/#/experiments/{served.experiment}/runs/{first}"
    (model,) = (
        each["info"]["model_id"]
        for each in served.ask("logged-models/search", experiment_ids=[served.experiment])["models"]
        if each["info"]["source_run_id"] == first
    )
    about = ["full supervision", "Logged models (1)", "train.seed", "keypad-model", "host", "restarts", "shards train"]
    return {
        "runs": (f"/#/experiments/{served.experiment}/runs", [*NAMES, "Trainings of CPSP-dist", "shards train"]),
        "run": (run, [NAMES[0], *about]),
        "metrics": (f"{run}/model-metrics", [f"{NAMES[0]} ({name}/val)" for name in ("accuracy", "event_accuracy")]),
        "system metrics": (f"{run}/system-metrics", [f"{NAMES[0]} (system/cpu_utilization_percentage)"]),
        "artifacts": (f"{run}/artifacts", ["report.html", "figures", "evaluation_test.json", "predictions_test.npz"]),
        "compare": (
            f"/#/compare-runs?runs={both}&experiments=%5B%22{served.experiment}%22%5D",
            ["Comparing 2 Runs", *NAMES, "accuracy/test", "train.seed"],
        ),
        "model": (f"/#/experiments/{served.experiment}/models/{model}", ["Ready", NAMES[0], "keypad-model"]),
    }


#: Opens the drawer of the run page's first data set.
OPEN_DATA = """(() => {
  const names = [...document.querySelectorAll('*')].filter(e => !e.children.length && e.textContent.includes('TEXT'));
  (names[0].closest('button, a, [role=button]') ?? names[0]).click();
})()""".replace("TEXT", "shards train")


def test_pages(served: Served, browser: Browser, keypad_shards: Path) -> None:
    for what, (place, texts) in pages(served).items():
        browser.visit(served.url + place)
        assert browser.lacking(texts) == [], what
        if what == "run":
            browser.run(OPEN_DATA)
            assert browser.lacking(drawer(keypad_shards)) == [], "the data set's profile and schema"


def drawer(shards: Path) -> list[str]:
    """What MLflow shows of train: of its profile, and name and type of each array."""
    manifest = Manifest.load(shards)
    types = [f"{np.dtype(field.dtype).name} {[*field.shape]}" for field in manifest.fields.values()]
    rows = manifest.rows("train")
    events = int(manifest.samples[rows.start : rows.stop]["events"].sum())
    return ["num rows: 48", "segments: 480", f"event segments: {events}", *manifest.fields, *types]


def test_the_printed_address_opens_the_charts_of_all_runs(
    served: Served, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpsp_dist.tracking.runs.UI", served.url)
    browser.visit(experiment_page(served.url, "cpsp"))
    assert browser.lacking([f"{name} (accuracy/val)" for name in NAMES]) == []
