"""The base of every page: nothing in a text ends an element, and nothing is asked of a network."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from cpsp_dist.report import charts
from cpsp_dist.report.page import Choice, Column, Facts, Figure, Page, PageSection, Table, render, write
from cpsp_dist.utils.errors import UserError

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\u2028&\"'"


def page(text: str = "text") -> Page:
    table = Table(text, [Column(text), Column("number", "number")], [[text, 1.5], [None, math.nan]])
    figure = Figure(text, text, charts.lines({text: [(0, 1.0), (1, math.inf)]}, text, text), table=table)
    parts = [figure, table, Facts(text, [(text, text)]), Choice(text, [(text, [figure])])]
    return Page(text, text, [PageSection(text, parts, text), PageSection("empty", [])], [text, text])


def data_of(html: str) -> dict[str, list[dict[str, object]]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    content: dict[str, list[dict[str, object]]] = json.loads(found[1])
    return content


def test_hostile_texts_are_only_texts() -> None:
    plain, hostile = render(page()), render(page(HOSTILE))
    for tag in ("<script", "</script>", "<img", "<h2"):
        assert hostile.count(tag) == plain.count(tag), tag
    content = data_of(hostile)
    assert content["tables"][0]["caption"] == HOSTILE
    assert content["tables"][1]["rows"] == [[HOSTILE, 1.5], [None, None]], "what is not finite is missing"


def test_the_page_holds_what_it_needs() -> None:
    html = render(page())
    assert not re.search(r"<(script|link|img|iframe)[^>]*\b(src|href)=\"(?!data:)", html.partition("<script>")[0])
    assert "default-src 'none'" in html
    assert len(data_of(html)["figures"]) == 2
    assert html.count('class="notice"') == 1, "each notice once"
    assert "empty" not in html.partition("</header>")[0], "a section without parts is left out"


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"page\.html: cannot be written"):
        write(page(), tmp_path / "file" / "page.html")


def test_thinned_lines_keep_their_ends() -> None:
    points = [(n, float(n)) for n in range(5001)]
    found = charts.thinned(points)
    assert len(found) <= charts.POINTS + 1
    assert (found[0], found[-1]) == (points[0], points[-1])
    assert charts.thinned(points[:3]) == points[:3]
    assert charts.thinned([]) == []
