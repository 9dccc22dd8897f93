"""`cpsp-dist report`: what its page says are the figures of an evaluation, of the same weights and videos."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpsp_dist.cli import main
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.reader import EvalStream
from cpsp_dist.models import model_for
from cpsp_dist.report import collect as collect_module
from cpsp_dist.report.answers import measure
from cpsp_dist.report.collect import RunData, collect, read_tags
from cpsp_dist.report.page import Facts
from cpsp_dist.report.run_page import run_page
from cpsp_dist.tracking.known_runs import RunRecord
from cpsp_dist.tracking.store import RUN_FILE
from cpsp_dist.training.evaluate import evaluate_run
from tests.support.forked_command import hold_to_permissions, make_private
from tests.support.models import untrained_run


@pytest.fixture(scope="module")
def run(keypad_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "run"
    untrained_run(keypad_shards, folder)
    lines = [{"step": s, "time": 1.7e9 + s, "loss/total": 3.0 / s, "loss/psa_v": 0.0, "pool/size": 8.0} for s in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "damaged\n")
    return folder


@pytest.fixture(scope="module")
def data(run: Path) -> RunData:
    return collect(run)


def test_its_metrics_are_those_of_evaluate(run: Path, data: RunData) -> None:
    """Recomputed from the stored answers alone."""
    expected = evaluate_run(str(run), "test")
    assert data.results == {key: expected[key] for key in data.results}
    shown = next(part for section in run_page(data).sections for part in section.parts)
    assert [row[:2] for row in shown.rows] == [  # type: ignore[union-attr]
        ["accuracy", expected["accuracy"]],
        ["event accuracy", expected["event_accuracy"]],
        ["boundary f1", expected["boundary_f1"]],
    ]


@pytest.mark.parametrize("modality", ["audio", "visual"])
def test_one_modality_is_the_network_of_it(keypad_shards: Path, data: RunData, modality: str) -> None:
    """A network built for one modality, with the same weights."""
    manifest = Manifest.load(keypad_shards)
    settings = data.run.config.model.model_copy(update={"modality": modality})
    network = model_for(settings, manifest)
    network.load_state_dict(data.run.state.weights)
    network.eval()
    with torch.no_grad(), EvalStream(manifest, "test", batch=16) as stream:
        batch = next(iter(stream))
        output = network(batch.visual.float(), batch.audio)
    found = data.others[f"{modality} alone"].answers
    assert np.allclose(found.event_logits, output.event_logits, atol=1e-5)
    assert not np.allclose(found.event_logits, data.answers.event_logits, atol=1e-3)


def test_inside_the_model(keypad_shards: Path, data: RunData) -> None:
    errors = [int(data.answers.errors[each.row]) for each in data.examples]
    assert errors == sorted(data.answers.errors.tolist(), reverse=True)[: len(errors)]
    for example in data.examples:
        assert example.attention is not None
        assert example.attention.sum((1, 2)) == pytest.approx(np.ones(10), abs=1e-4)
        assert example.affinity.shape == (10, 10)
        assert (np.abs(example.affinity) <= 1 + 1e-9).all()
    with torch.no_grad(), EvalStream(Manifest.load(keypad_shards), "test", batch=16) as stream:
        batch = next(iter(stream))
        network = model_for(data.run.config.model, Manifest.load(keypad_shards))
        network.load_state_dict(data.run.state.weights)
        similarity = network.eval()(batch.visual.float(), batch.audio).similarity
    for example in data.examples:
        assert np.diagonal(example.affinity) == pytest.approx(similarity[example.row].numpy(), abs=1e-5)


def test_evaluate_writes_predictions_as_format_says(
    run: Path, data: RunData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the file's name ends in."""
    asked = ["evaluate", str(run), "--predictions", str(tmp_path / "answers.txt")]
    assert main([*asked, "--format", "jsonl"]) == 0
    found = [json.loads(line) for line in (tmp_path / "answers.txt").read_text(encoding="utf-8").splitlines()]
    assert [line["video"] for line in found] == sorted(data.answers.keys)
    assert main(["evaluate", str(run), "--format", "csv"]) == 2
    assert "error: --format csv is that of --predictions FILE, which is missing" in capsys.readouterr().err


def text_of(html: str) -> str:
    return re.sub(r"<[^>]+>", " ", html.partition('<script type="application/json"')[0])


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--split", "val", "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}: open it in a browser\n"
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    text = text_of(html)
    for title in ("Loss terms", "Pool: size", "Confusion of labels", "F1 by category", "Accuracy at each second"):
        assert title in text
    assert "Audio-visual affinity" in text
    assert str(run) in text


def changed(data: RunData, **logits: Any) -> RunData:
    answers = replace(data.answers, **logits)
    return replace(data, answers=answers, results=measure(answers))


def test_a_trivial_run_is_flagged_at_the_top(data: RunData) -> None:
    everywhere = changed(data, event_logits=np.ones_like(data.answers.event_logits))
    (notice,) = run_page(everywhere).notices
    assert notice.startswith("The model never predicts background")
    assert run_page(data).notices == [f"{text[0].upper()}{text[1:]} (test)." for text in data.results["flags"]]


def test_baselines_stand_beside_confusion_and_timelines(data: RunData) -> None:
    sections = {each.title: each for each in run_page(data).sections}
    (confusion,) = (
        part for part in sections["Categories"].parts if getattr(part, "title", "") == "Confusion of labels"
    )
    for name, each in data.others.items():
        assert f"{name} {100 * each.results['accuracy']:.1f} %" in confusion.caption  # type: ignore[union-attr]
        assert f"{name} {each.answers.errors.mean():.2f}" in sections["Videos"].note


def test_the_machine_is_known_where_the_store_is_a_server(
    data: RunData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Host, launcher and restarts are in the run's folder; the server is not asked."""
    tracking = data.run.config.tracking.model_copy(update={"uri": "http://127.0.0.1:9"})
    record = RunRecord(data.run.config.model_copy(update={"output": str(tmp_path), "tracking": tracking}), "data")
    shown = {"host": "node7", "launcher": "torchrun", "device": "NVIDIA H100", "nodes": "2"}
    for step in (0, 6, 9):
        record.note_start(step, shown)
    record.write("0" * 32)
    monkeypatch.setattr(collect_module, "Store", None)
    page = run_page(replace(data, tags=read_tags(tmp_path, data.run)))
    (machine,) = (
        part
        for section in page.sections
        for part in section.parts
        if isinstance(part, Facts) and part.title == "Machine"
    )
    assert dict(machine.pairs).items() >= (shown | {"restarts": "2"}).items()


def test_mistakes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "no complete checkpoint here" in capsys.readouterr().err
    assert main(["report", str(run), "--split", "tset"]) == 2
    assert "no split 'tset'" in capsys.readouterr().err


def test_a_store_that_may_not_be_entered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The page of the run lacks what somebody else's store knows, and says so."""
    private = tmp_path / "private"
    private.mkdir()
    (private / "mlflow.db").touch()
    (tmp_path / RUN_FILE).write_text(json.dumps({"store": f"sqlite:///{private}/mlflow.db", "run_id": "a"}))
    (tmp_path / "starts.jsonl").write_text(json.dumps({"step": 0, "tags": {"host": "n1", "device": 7}}) + "\n")
    make_private(private)
    pid = os.fork()
    if not pid:
        code = 1
        try:
            hold_to_permissions()
            tags = read_tags(tmp_path, None)  # type: ignore[arg-type]
            (line,) = caplog.messages
            code = 0 if tags == {"host": "n1", "restarts": "0"} and "Permission denied" in line else 2
        finally:
            os._exit(code)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    private.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(private, 0, 0)
    assert ended == 0


def test_trivial_answers_are_a_tag(tmp_path: Path) -> None:
    from cpsp_dist.tracking.predictions import flags_of

    (tmp_path / "evaluation_test.json").write_text('{"flags": ["the model never predicts background", "another"]}')
    (tmp_path / "evaluation_val.json").write_text('{"flags": []}')
    assert flags_of(tmp_path, "test") == {"flags.test": "the model never predicts background; another"}
    assert flags_of(tmp_path, "val") == flags_of(tmp_path, "none") == {}
