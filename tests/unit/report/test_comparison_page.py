"""`compare --html`: the page has the comparison's own figures, and what follows from stored predictions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy  # imports its parts when first used

from cpsp_dist.cli import main
from cpsp_dist.config import load_config
from cpsp_dist.report.comparison_figures import f1_by_label, mcnemar_parts
from cpsp_dist.report.comparison_page import ComparedRuns, comparison_page, runs_table
from cpsp_dist.report.page import Figure, PageSection, Table
from cpsp_dist.tracking.compare import Question, compare_runs
from cpsp_dist.tracking.history import curves_of, read_histories
from cpsp_dist.tracking.runs import TrackedRun
from cpsp_dist.tracking.store import AskedStore, Store, experiment_id
from tests.support.pages import predictions, some_answers, some_comparison
from tests.support.runs import KEYPAD


@pytest.fixture(scope="module")
def data() -> ComparedRuns:
    return some_comparison(4, 3)


def sections(data: ComparedRuns) -> dict[str, PageSection]:
    return {each.title: each for each in comparison_page(data, "Comparison").sections}


def test_intervals_are_scipys(data: ComparedRuns) -> None:
    table = runs_table(data)
    names = [column.name for column in table.columns]
    assert names[:2] == ["run", "accuracy/test"], "what 390 px show"
    for row, group in zip(table.rows, data.found.groups, strict=True):
        values = [*group.by_seed("accuracy/test").values()]
        low, high = scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
        start = names.index("accuracy/test")
        assert row[start : start + 3] == pytest.approx([np.mean(values), low, high])
    assert names[names.index("high") + 1] == "- kind0"


def test_every_part_is_there(data: ComparedRuns) -> None:
    assert all(section.parts for section in sections(data).values())
    titles = {part.title for section in sections(data).values() for part in section.parts if isinstance(part, Figure)}
    expected = {"accuracy/test with intervals", "accuracy/val", "loss/total", "Settings and results of each run"}
    expected |= {"Accuracy at each segment of test", "F1 by category, difference to kind0", "Throughput"}
    assert titles == expected


def test_curves_are_means_over_seeds_with_a_band(data: ComparedRuns) -> None:
    figure: Any = sections(data)["Learning curves"].parts[0]
    group = data.drawn[0]
    own = [dict(data.histories[run.id]["accuracy/val"]) for run in group.runs]
    drawn = [series for series in figure.option["series"] if series["name"] == group.name]
    assert drawn[0]["data"][-1] == pytest.approx([299, np.mean([run[299] for run in own])])
    low = np.array(drawn[1]["data"])[-1, 1]
    assert low == pytest.approx(
        scipy.stats.t.interval(0.95, 2, np.mean([r[299] for r in own]), scipy.stats.sem([r[299] for r in own]))[0]
    )


def test_a_band_ends_where_the_metric_does() -> None:
    """The interval of two seeds is wide; an accuracy is from 0 to 100 %."""
    made = some_comparison(1, 2)
    first, second = made.found.groups[0].runs
    histories = {first.id: {"accuracy/val": [(1, 30.0)]}, second.id: {"accuracy/val": [(1, 80.0)]}}
    curve: Any = sections(ComparedRuns(made.found, histories, ["accuracy/val"]))["Learning curves"].parts[0]
    low, difference = (series["data"] for series in curve.option["series"][1:3])
    assert (low, difference) == ([[1, 0.0]], [[1, 100.0]])


def test_rows_of_one_name_each_have_their_own_figures() -> None:
    made = some_comparison(2, 1)
    runs = [replace(group.runs[0], name="same") for group in made.found.groups]
    found = compare_runs(runs, Question(("accuracy/test",), baseline=runs[1].id), made.found.groups[0].stored)
    page = ComparedRuns(found, made.histories, made.curves)
    assert [*page.stored] == [group.name for group in found.groups]
    curve: Any = sections(page)["Learning curves"].parts[0]
    for group in found.groups:
        (line,) = [series for series in curve.option["series"] if series["name"] == group.name]
        assert line["data"][-1][1] == pytest.approx(made.histories[group.runs[0].id]["accuracy/val"][-1][1])
        assert np.array_equal(page.stored[group.name].event, group.stored(group.runs[0], "test").event)  # type: ignore[union-attr]
    assert len(sections(page)["Which run is right where"].parts) == 2


def test_a_repeated_seed_is_counted_once_and_not_drawn() -> None:
    made = some_comparison(1, 2)
    first, second = made.found.groups[0].runs
    again = replace(second, params=first.params, name=first.name)
    page = ComparedRuns(
        compare_runs([first, again], Question(("accuracy/test",), mean=True)), made.histories, made.curves
    )
    table = runs_table(page)
    assert table.rows[0][[column.name for column in table.columns].index("seeds")] == 1
    curve: Any = sections(page)["Learning curves"].parts[0]
    assert curve.option["series"][0]["data"][-1] == pytest.approx(
        [299, made.histories[second.id]["accuracy/val"][-1][1]]
    )


def test_f1_is_sklearns() -> None:
    from sklearn.metrics import f1_score

    found = predictions(some_answers(50, 4))
    expected = f1_score(found.truth.ravel(), found.label.ravel(), labels=range(5), average=None, zero_division=0)
    assert f1_by_label(found) == pytest.approx(expected)


def test_mcnemar_counts_the_same_segments(data: ComparedRuns) -> None:
    table = mcnemar_parts(data.stored, "kind0")[0]
    assert isinstance(table, Table)
    own, other = data.stored["kind0"], data.stored[table.rows[0][0]]
    a, b = (each.label == each.truth for each in (own, other))
    both, only_first, only_second, neither, p = table.rows[0][2:]
    assert (both, neither) == ((a & b).sum(), (~a & ~b).sum())
    assert p == pytest.approx(scipy.stats.binomtest(only_first, only_first + only_second).pvalue)


def test_few_things_known_are_a_page_too() -> None:
    data = some_comparison(1, 1)
    plain = ComparedRuns(data.found, {}, [])
    assert comparison_page(plain, "one").sections


@pytest.mark.long
def test_the_command_and_histories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From MLflow's store where the run's folder is gone, from the folder where it is there."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = load_config(str(KEYPAD), ["data.shards=x", f"output={tmp_path / 'run'}", f"tracking.uri={uri}"])
    store = Store(uri)
    ids = []
    for name in ("a", "b"):
        run = store.create_run(experiment_id(store, config), run_name=name, tags={"output": str(tmp_path / name)})
        ids.append(run.info.run_id)
        for step in (1, 2):
            store.log_metric(run.info.run_id, "accuracy/val", 50.0 + step, step=step)
        store.set_terminated(run.info.run_id)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mlflow_run.json").write_text(f'{{"run_id": "{ids[1]}"}}')
    (tmp_path / "b" / "metrics.jsonl").write_text(
        '{"step": 1, "accuracy/val": 51.0}\n{"step": 2, "accuracy/val": 52.0}\n'
    )
    runs = [TrackedRun(i, i, "FINISHED", metrics={"accuracy/val": 1.0}, tags={"output": str(tmp_path / n)})
            for i, n in zip(ids, "ab", strict=True)]  # fmt: skip
    assert curves_of(runs) == ["accuracy/val"]
    found = read_histories(AskedStore(uri), runs, ["accuracy/val"])
    assert found == {one: {"accuracy/val": [(1, 51.0), (2, 52.0)]} for one in ids}
    page = tmp_path / "page.html"
    assert main(["compare", "--uri", uri, "--html", str(page)]) == 0
    assert capsys.readouterr().out.endswith(f"{page}: open it in a browser\n")
    assert "Learning curves" in page.read_text(encoding="utf-8")
