"""`cpsp-dist compare` over runs made by hand: rows, intervals, differences, warnings, formats."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy  # imports its parts when first used

from cpsp_dist.config import load_config
from cpsp_dist.launch.sweep import plan_runs
from cpsp_dist.metrics import statistics
from cpsp_dist.metrics.predictions import Predictions
from cpsp_dist.report.comparison_page import ComparedRuns, comparison_page
from cpsp_dist.tracking import runs as runs_module
from cpsp_dist.tracking.compare import Comparison, Question, compare_runs
from cpsp_dist.tracking.compare_formats import as_csv, as_json, as_latex, as_text
from cpsp_dist.tracking.runs import DEFAULT_STORE, TrackedRun, compare_command, find_runs
from cpsp_dist.tracking.store import tracking_uri
from cpsp_dist.utils import console
from cpsp_dist.utils.errors import UserError
from tests.support.runs import KEYPAD

PSP, CPSP = [70.0, 72.0, 71.0], [73.0, 74.0, 74.5]


def run(name: str, test: float | None = None, *, seed: int = 1, status: str = "FINISHED", **more: Any) -> TrackedRun:
    params = {"train.seed": str(seed), "train.global_batch": "64", "objectives.psa_v": "1.0", **more.get("params", {})}
    metrics = {"loss/total": 1.5, "best_epoch": 12.0} | ({} if test is None else {"accuracy/test": test})
    tags = {"data.fingerprint": "f" * 64, **more.get("tags", {})}
    return TrackedRun(f"id-{name}", name, status, "cpsp", params=params, metrics=metrics, tags=tags)


def two_kinds() -> list[TrackedRun]:
    runs = [run(f"psp-seed{n}", x, seed=n, params={"objectives.psa_v": "0.0"}) for n, x in enumerate(PSP, 1)]
    return runs + [run(f"cpsp,seed={n}", x, seed=n) for n, x in enumerate(CPSP, 1)]


def rows_of(found: Comparison) -> dict[str, Any]:
    return {row.get("run") or row["runs"]: row for row in json.loads(as_json(found))["rows"]}


def test_seeds_share_a_row_and_are_paired_with_the_baseline() -> None:
    found = compare_runs(two_kinds(), Question(mean=True, baseline="psp"))
    rows = rows_of(found)
    assert [*rows] == ["cpsp", "psp"]
    entry = rows["cpsp"]["metrics"]["accuracy/test"]
    assert entry["seeds"] == {"1": 73.0, "2": 74.0, "3": 74.5}
    assert entry["over_seeds"] == pytest.approx(scipy.stats.t.interval(0.95, 2, np.mean(CPSP), scipy.stats.sem(CPSP)))
    oracle = scipy.stats.ttest_rel(CPSP, PSP)
    assert entry["difference"]["p"] == pytest.approx(oracle.pvalue)
    assert entry["difference"]["interval"] == pytest.approx([*oracle.confidence_interval()])
    assert "difference" not in rows["psp"]["metrics"]["accuracy/test"]
    text = as_text(found)
    half = scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem(CPSP)
    assert f"73.83 ± {half:.2f}  +2.83 ± " in text
    assert "paired t test: runs are paired by seed" in text
    assert found.warnings == ()


def test_rows_by_a_setting_name_what_they_mix() -> None:
    runs = [*two_kinds(), run("cpsp-seed3", 60.0, seed=3, params={"train.learning_rate": "0.1"})]
    found = compare_runs(runs, Question(by=("psa_v",)))
    assert [group.name for group in found.groups] == ["psp", "cpsp"]
    assert found.warnings[:2] == (
        "cpsp: several runs of seed 3; only the last of them counts",
        "cpsp: its runs also differ in learning_rate",
    )


def test_runs_that_are_left_out_of_the_means_are_named() -> None:
    odd = [run("a", 1.0, status="FAILED"), run("b", status="RUNNING"), run("c", 2.0, status="KILLED")]
    line = "left out, as only finished runs are averaged: a (failed), b (running), c (killed)"
    for question in (Question(mean=True), Question(by=("psa_v",))):
        found = compare_runs([*two_kinds(), *odd], question)
        assert found.warnings == (line,)
        assert [group.name for group in found.groups] == ["cpsp", "psp"]
    assert compare_runs(odd, Question(mean=True)).warnings == (line,)


def test_the_best_comes_first_and_any_metric_or_setting_sorts() -> None:
    runs = [run("b", 70.0, seed=10), run("c", seed=9, status="RUNNING"), run("a", 75.0, seed=2)]
    runs[1].metrics["loss/total"] = 0.5

    def order(sort: str | None) -> list[str]:
        return [group.name for group in compare_runs(runs, Question(sort=sort)).groups]

    assert order(None) == ["a", "b", "c"]
    assert order("loss/total") == ["c", "b", "a"]
    assert order("seed") == ["a", "c", "b"]
    assert order("run") == ["a", "b", "c"]
    assert order("start") == ["b", "c", "a"]


@pytest.mark.parametrize(
    ("question", "text"),
    [
        (Question(("acuracy/test",)), "--metric acuracy/test: no run has it; did you mean 'accuracy/test'?"),
        (Question(sort="los/total"), "--sort los/total: neither .* did you mean 'loss/total'?"),
        (Question(by=("global_bach",)), "'global_bach': no setting of these runs"),
        (Question(mean=True, baseline="psb"), "--baseline psb: no such row; did you mean 'psp'?"),
    ],
)
def test_a_misspelt_name_is_an_error_with_the_nearest(question: Question, text: str) -> None:
    with pytest.raises(UserError, match=text.replace("?", r"\?")):
        compare_runs(two_kinds(), question)


def test_runs_that_cannot_be_compared_are_named() -> None:
    other = {"train.global_batch": "128"}
    odd = [
        replace(run("data", 70.0), tags={"data.fingerprint": "e" * 64}, data={"test": "1"}),
        run("batch", 71.0, params=other),
        run("encoder", 71.0, tags={"data.encoders": "vgg19, vggish"}),
        replace(run("other encoder", 71.0, tags={"data.encoders": "clip, clap"}), data={"test": "2"}),
        run("no test"),
        run("going on", 50.0, status="RUNNING"),
    ]
    lines = compare_runs([*two_kinds(), *odd], Question()).warnings
    starts = ["the data differs", "the test split differs", "the encoders differs", "train.global_batch differs"]
    starts += ["not finished, with the figures of the step they reached: going on", "without accuracy/test: no test"]
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True)), lines
    assert "128: batch" in lines[3]
    asked = compare_runs([run("a", 1.0), odd[1]], Question(by=("global_batch",)))
    assert asked.warnings == ()


def answers(right: list[int], keys: list[str]) -> Predictions:
    """Ten segments each, all of an event of category 0; so many of them are found."""
    events = np.array([[1.0] * n + [0.0] * (10 - n) for n in right], np.float32)
    ones, zeros = np.ones(len(right), np.float32), np.zeros(len(right), np.int64)
    return Predictions("test", 5, ["a"], np.array(keys), zeros, np.ones((len(right), 10), bool), zeros, ones, events)


def test_one_seed_has_the_interval_over_videos() -> None:
    keys = [f"v{n}" for n in range(40)]
    random = np.random.default_rng(1)
    right = random.integers(3, 10, 40)
    stored = {"a": answers(right.tolist(), keys), "b": answers((right + 1).tolist(), keys)}
    runs = [run(name, 100 * found.parts("accuracy")[0].sum() / 400) for name, found in stored.items()]
    found = compare_runs(runs, Question(("accuracy/test",), baseline="a"), lambda each, split: stored[each.name])
    row = rows_of(found)["a"]["metrics"]["accuracy/test"]
    oracle = scipy.stats.bootstrap((right / 10,), np.mean, method="percentile", random_state=2).confidence_interval
    assert row["over_videos"] == pytest.approx([100 * oracle.low, 100 * oracle.high], abs=0.5)
    difference = rows_of(found)["b"]["metrics"]["accuracy/test"]["difference"]
    assert difference == {"mean": pytest.approx(10), "interval": pytest.approx([10, 10]), "p": None}
    assert "bootstrap interval: the videos are a random sample" in as_text(found)


def some_answers(shares: dict[str, float]) -> dict[str, Predictions]:
    """Of 30 videos by each run, by its name: so many segments right, in percent, the others by chance."""
    random, keys = np.random.default_rng(1), [f"v{n}" for n in range(30)]
    return {name: answers(random.binomial(10, share / 100, 30).tolist(), keys) for name, share in shares.items()}


def test_one_shared_seed_compares_its_two_runs_alone() -> None:
    stored = some_answers({"a-seed1": 70, "a-seed2": 40, "b-seed2": 60, "b-seed3": 20})
    share = {name: 10 * float(each.parts("accuracy")[0].mean()) for name, each in stored.items()}
    runs = [
        run(name, share[name], seed=int(name[-1]), params={"objectives.psa_v": name[0]}) for name in stored
    ]  # fmt: skip
    question = Question(("accuracy/test",), mean=True, baseline="a")
    rows = rows_of(compare_runs(runs, question, lambda each, split: stored[each.name]))
    difference = rows["b"]["metrics"]["accuracy/test"]["difference"]
    assert difference["mean"] == pytest.approx(share["b-seed2"] - share["a-seed2"])
    alone = compare_runs([runs[1], runs[2]], replace(question, mean=False, baseline="a-seed2"),
                         lambda each, split: stored[each.name])  # fmt: skip
    assert rows_of(alone)["b-seed2"]["metrics"]["accuracy/test"]["difference"] == difference


def test_of_a_repeated_seed_only_the_last_run_counts_anywhere() -> None:
    stored = some_answers({"a-seed1": 70, "again-seed1": 40})
    runs = [replace(run(name, 50.0), name="a-seed1") for name in stored]
    found = compare_runs(runs, Question(("accuracy/test",), mean=True), lambda each, split: stored[each.id[3:]])
    assert [each.id for each in found.groups[0].runs] == ["id-again-seed1"]
    assert found.warnings == ("a: several runs of seed 1; only the last of them counts",)
    expected = stored["again-seed1"].parts("accuracy")[0].mean()
    interval = found.groups[0].over_videos("accuracy/test")
    assert interval is not None
    assert interval.mean == pytest.approx(10 * expected)


def test_rows_of_one_name_get_distinct_names() -> None:
    """By experiment, then by id; for the baseline, whose name alone means none of them."""
    runs = [run("a", 70.0), replace(run("a", 71.0), id="0123456789"), replace(run("a", 72.0), experiment="other")]
    found = compare_runs(runs, Question(sort="start"))
    names = ["a (cpsp) (id-a)", "a (cpsp) (01234567)", "a (other)"]
    assert [group.name for group in found.groups] == names
    assert [row["metrics"]["accuracy/test"]["mean"] for row in rows_of(found).values()] == [70, 71, 72]
    kinds = [run("a-seed1", 70.0), replace(run("a-seed1", 60.0, params={"objectives.psa_v": "0"}), id="other")]
    found = compare_runs(kinds, Question(mean=True, baseline="a (other)"))
    assert [group.name for group in found.groups] == ["a (id-a-see)", "a (other)"]
    with pytest.raises(UserError, match=r"--baseline a: no such row; .*there are: a \(id-a-see\), a \(other\)"):
        compare_runs(kinds, Question(mean=True, baseline="a"))


def test_runs_of_several_experiments_are_in_the_order_of_their_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    started = {"one": [1000, 4000], "two": [2000, 3000]}

    def made(start: int) -> SimpleNamespace:
        info = SimpleNamespace(run_id=str(start), run_name="a", status="FINISHED", start_time=start, end_time=None)
        return SimpleNamespace(info=info, inputs=None, data=SimpleNamespace(params={}, metrics={}, tags={}))

    def experiment(name: str) -> SimpleNamespace:
        return SimpleNamespace(experiment_id=name)

    def search(ids: list[str], *rest: Any, **more: Any) -> list[SimpleNamespace]:
        return Page(made(start) for start in started[ids[0]])

    monkeypatch.setattr(runs_module, "Store", lambda uri: SimpleNamespace(
        get_experiment_by_name=experiment, search_runs=search))  # fmt: skip
    found = find_runs("http://store", ["one", "two", "one"])
    assert [each.id for each in found] == ["1000", "2000", "3000", "4000"]


class Page(list[Any]):
    token = None


def test_a_bootstrap_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tables and pages show it."""
    stored = some_answers({"a": 70, "b": 40, "c": 60})
    question = Question(("accuracy/test", "event_accuracy/test"), baseline="a")
    runs = [run(name, 50.0) for name in stored]
    for each in runs:
        each.metrics["event_accuracy/test"] = 50.0
    drawn: list[float] = []

    def resampled(parts: Any, *rest: Any) -> Any:
        drawn.append(float(np.sum(parts)))
        return bootstrap(parts, *rest)

    bootstrap = statistics._resampled
    monkeypatch.setattr(statistics, "_resampled", resampled)
    found = compare_runs(runs, question, lambda each, split: stored[each.name])
    texts = [as_text(found, 20), as_json(found), as_csv(found), as_latex(found)]
    comparison_page(ComparedRuns(found, {}, []), "All")
    assert texts == [as_text(found, 20), as_json(found), as_csv(found), as_latex(found)]
    assert len(drawn) == 3 * 2 + 2 * 2  # of each row and metric, and each difference


def test_it_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "80")
    keys = [
        "objectives.avps",
        "objectives.psa_s",
        "objectives.psa_v",
        "pool.scope",
        "train.learning_rate",
        "engine.zero",
    ]
    runs = [run(f"run-{n}", 70.0 + n, seed=n, params={key: str(n / 7)[:6] for key in keys}) for n in range(20)]
    lines = as_text(compare_runs(runs, Question()), 80).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["run", "settings", "test", "at", "epoch", "loss"]
    assert sum(line.startswith(" run-") or line.startswith("run-") for line in lines) == 20
    few = as_text(compare_runs(two_kinds(), Question()), 80).splitlines()
    assert few[0].split()[:3] == ["run", "psa_v", "seed"]


def test_csv_and_latex() -> None:
    runs = [*two_kinds(), run("odd_{name}~100%", params={"objectives.psa_v": "a&b"})]
    found = compare_runs(runs, Question(("accuracy/test",), mean=True))
    rows = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert [row["runs"] for row in rows] == ["cpsp", "psp", "odd_{name}~100%"]
    assert float(rows[1]["accuracy/test"]) == pytest.approx(71)
    assert float(rows[1]["accuracy/test low"]) == pytest.approx(
        scipy.stats.t.interval(0.95, 2, 71, scipy.stats.sem(PSP))[0]
    )
    assert (rows[1]["accuracy/test seeds"], rows[2]["accuracy/test"]) == ("3", "")
    latex = as_latex(found).splitlines()
    assert latex[-3] == r"odd\_\{name\}\textasciitilde{}100\% & a\&b & -- \\"
    assert r"$\pm$" in latex[5]


def test_csv_and_latex_have_the_difference_to_the_baseline() -> None:
    found = compare_runs(two_kinds(), Question(mean=True, baseline="psp"))
    cpsp, psp = csv.DictReader(io.StringIO(as_csv(found)))
    oracle = scipy.stats.ttest_rel(CPSP, PSP)
    assert float(cpsp["accuracy/test difference"]) == pytest.approx(np.mean(CPSP) - np.mean(PSP))
    ends = [float(cpsp[f"accuracy/test difference {end}"]) for end in ("low", "high")]
    assert ends == pytest.approx([*oracle.confidence_interval()])
    assert float(cpsp["accuracy/test p"]) == pytest.approx(oracle.pvalue)
    assert float(cpsp["loss/total difference"]) == 0
    assert (cpsp["accuracy/test over"], psp["accuracy/test difference"], psp["accuracy/test p"]) == ("seeds", "", "")
    header, _, *rows = as_latex(found).splitlines()[3:]
    assert header.startswith(r"runs & psa\_v & accuracy/test & - psp & p & best\_epoch & ")
    half = (ends[1] - ends[0]) / 2
    assert rf"& +2.83 $\pm$ {half:.2f} & {oracle.pvalue:.3f} &" in rows[0]
    assert "& -- & -- &" in rows[1]
    assert as_latex(found).splitlines()[1] == r"\begin{tabular}{llrrrrr}"
    assert json.loads(as_json(found))["baseline"] == "psp"
    sure = two_kinds()
    for number, accuracy in enumerate(PSP):
        sure[3 + number].metrics["accuracy/test"] = accuracy + 9 + number / 99
    assert " & $<$0.001 " in as_latex(compare_runs(sure, Question(("accuracy/test",), mean=True, baseline="psp")))


def test_csv_of_one_seed_has_the_interval_over_videos() -> None:
    stored = some_answers({"a": 70, "b": 40})
    runs = [run(name, 10 * float(each.parts("accuracy")[0].mean())) for name, each in stored.items()]
    question = Question(("accuracy/test", "loss/total"), baseline="b")
    found = compare_runs(runs, question, lambda each, split: stored[each.name])
    row = next(csv.DictReader(io.StringIO(as_csv(found))))
    interval = found.groups[0].over_videos("accuracy/test")
    assert interval is not None
    assert (float(row["accuracy/test low"]), float(row["accuracy/test high"])) == (interval.low, interval.high)
    assert (row["accuracy/test over"], row["accuracy/test seeds"], row["accuracy/test p"]) == ("videos", "1", "")
    assert float(row["accuracy/test difference low"]) < float(row["accuracy/test difference"])
    assert (row["loss/total"], row["loss/total low"], row["loss/total over"]) == ("1.5", "", "")


def test_no_runs(tmp_path: Path) -> None:
    assert as_text(compare_runs([], Question())) == "no runs yet"
    assert as_text(compare_runs([run("a", status="RUNNING")], Question(mean=True))) == "no run has finished yet"


def test_runs_and_sweeps_share_the_store_where_compare_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    looked = f"sqlite:///{tmp_path.resolve()}/{DEFAULT_STORE.removeprefix('sqlite:///')}"
    settings = ["data.shards=shards", "output=runs/a"]
    alone = load_config(KEYPAD, settings)
    _, (swept, _) = plan_runs(KEYPAD, ["data.shards=shards", "output=runs/deep/sweep"], ["train.seed=1,2"])
    assert tracking_uri(alone) == tracking_uri(swept.config) == looked
    assert compare_command(alone) == "cpsp-dist compare"
    # Elsewhere: beside the run, and for a sweep beside the sweep.
    _, (swept, _) = plan_runs(KEYPAD, ["data.shards=shards", "output=out/sweep"], ["train.seed=1,2"])
    assert tracking_uri(swept.config) == tracking_uri(load_config(KEYPAD, [*settings, "output=out/b"]))
    assert tracking_uri(swept.config) == f"sqlite:///{tmp_path.resolve()}/out/mlflow.db"
    assert compare_command(swept.config).endswith(f" --uri sqlite:///{tmp_path.resolve()}/out/mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri(alone) == "http://127.0.0.1:5000"
    assert tracking_uri(load_config(KEYPAD, [*settings, "tracking.uri=sqlite:///x.db"])) == "sqlite:///x.db"
