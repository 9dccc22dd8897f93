"""The pages in a real Chromium: no request, every figure drawn, nothing serious found by axe-core."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpsp_dist.data.manifest import Manifest
from cpsp_dist.packing.preview import read_samples, select
from cpsp_dist.report.collect import collect
from cpsp_dist.report.comparison_page import comparison_page
from cpsp_dist.report.page import write
from cpsp_dist.report.preview_page import preview_page
from cpsp_dist.report.run_page import run_page
from tests.support.browser import Browser
from tests.support.models import untrained_run
from tests.support.pages import some_comparison, some_run

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def report(keypad_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    untrained_run(keypad_shards, folder / "run")
    line = '{"step": %d, "loss/total": %d.5, "loss/event": 1.0, "pool/size": 8.0, "accuracy/val": 50.0}\n'
    (folder / "run" / "metrics.jsonl").write_text("".join(line % (n, 5 - n) for n in (1, 2, 3)))
    write(run_page(collect(folder / "run")), folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "comparison.html"
    write(comparison_page(some_comparison(4, 3), "Comparison"), path)
    return path


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("page", ["report", "comparison"])
def test_a_page(browser: Browser, page: str, width: int, theme: str, request: pytest.FixtureRequest) -> None:
    browser.open(request.getfixturevalue(page), width=width, theme=theme)
    assert browser.axe() == []
    assert browser.draw_all() == []
    assert browser.run("document.documentElement.scrollWidth") == width, "nothing beyond the window"
    assert browser.run("document.documentElement.dataset.theme") == theme
    assert browser.requests == []
    assert browser.problems == []


def test_a_table_by_keyboard(browser: Browser, report: Path) -> None:
    """Filter, sort and turn pages with keys alone."""
    browser.open(report)
    table = "[...document.querySelectorAll('[data-table]')].find(t => t.textContent.includes('setting'))"
    browser.run(f"{table}.querySelector('input').focus()")
    browser.press(*"seed")
    assert browser.run(f"{table}.querySelector('tbody').innerText.trim()") == "train.seed\t1"
    assert browser.run(f"{table}.querySelector('[role=status]').textContent") == "1 rows"
    browser.open(report)
    browser.run(f"{table}.querySelector('th button').focus()")
    browser.press("Enter")
    first = browser.run(f"{table}.querySelector('tbody tr').innerText")
    assert browser.run(f"{table}.querySelector('th').ariaSort") == "ascending"
    browser.press("Enter")
    assert browser.run(f"{table}.querySelector('th').ariaSort") == "descending"
    assert browser.run(f"{table}.querySelector('tbody tr').innerText") != first


@pytest.mark.timing
@pytest.mark.parametrize("page", ["report of 20,216 videos", "comparison of 200 runs"])
def test_large_pages_open_at_once(browser: Browser, tmp_path: Path, page: str) -> None:
    """As of VGGSound-AVEL100k's test split, of 141 categories."""
    path = tmp_path / "page.html"
    large = run_page(some_run(20216, 141)) if "videos" in page else comparison_page(some_comparison(200, 1), "All")
    write(large, path)
    assert path.stat().st_size < 15e6
    assert min(browser.open(path) for _ in range(3)) < 3
    assert browser.run("document.querySelectorAll('tbody tr').length") > 20
    assert browser.draw_all() == []
    assert browser.requests == []


def test_the_theme_by_its_button(browser: Browser, report: Path) -> None:
    browser.open(report)
    assert browser.draw_all() == []
    colour = "getComputedStyle(document.body).backgroundColor"
    before, text = browser.run(colour), "document.querySelector('.chart svg').outerHTML"
    chart = browser.run(text)
    browser.run("document.getElementById('theme').focus()")
    browser.press("Enter")
    assert browser.run("document.documentElement.dataset.theme") == "dark"
    assert browser.run(colour) != before
    assert browser.run(text) != chart, "figures too"
    assert browser.problems == []


def test_a_preview_of_shards(browser: Browser, keypad_shards: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(keypad_shards)
    samples = [*read_samples(manifest, select(manifest, "test", 3))]
    write(preview_page(samples, manifest.place, 1.0), tmp_path / "page.html")
    browser.open(tmp_path / "page.html", width=390, theme="dark")
    assert browser.axe() == []
    assert browser.draw_all() == []
    assert browser.requests == []
    assert browser.problems == []
