"""The base of every page: what a page may consist of, and its HTML, which holds all that it needs.

Figures are options of Apache ECharts, which is part of the page. A text "var(--NAME)" in an option stands for a colour
of the theme; `assets/page.css` has the names.
"""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any, Literal

from cpsp_dist import __version__
from cpsp_dist.utils import files
from cpsp_dist.utils.errors import UserError

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Column:
    """Of a table. kind: "percent" is of shares, 0 to 1; "seconds" of ([probability in %] or None, [truth, 0 or
    1]); title: what it means, shown on hover."""

    name: str
    kind: Literal["text", "number", "percent", "seconds"] = "text"
    title: str = ""


@dataclass(frozen=True)
class Table:
    """Sorted and filtered by its reader. rows: a value for each column, None where there is none; page: rows shown at
    once."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    page: int = 25


@dataclass(frozen=True)
class Figure:
    """
    Attributes:
        caption: what it shows, in words; also what a screen reader reads.
        option: of ECharts, ready for JSON.
        height: in pixels. wide: takes the width of the page; canvas: for thousands of marks.
        least_width: in pixels; a narrower window scrolls sideways.
        table: the same numbers, folded.
    """

    title: str
    caption: str
    option: dict[str, Any]
    height: int = 320
    wide: bool = False
    canvas: bool = False
    least_width: int = 0
    table: Table | None = None


@dataclass(frozen=True)
class Picture:
    """png: of the file; as wide as the page, and at least 640 pixels."""

    title: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    title: str
    pairs: Sequence[tuple[str, str]]
    wide: bool = False


@dataclass(frozen=True)
class Choice:
    """Groups of figures of which one is shown. label: of the list to choose from."""

    label: str
    groups: Sequence[tuple[str, Sequence[Figure | Picture]]]


@dataclass(frozen=True)
class PageSection:
    title: str
    parts: Sequence[Figure | Picture | Table | Facts | Choice]
    note: str = ""


@dataclass(frozen=True)
class Page:
    """lead: a sentence below the title. notices: what a reader must not miss, at the top."""

    title: str
    lead: str
    sections: Sequence[PageSection]
    notices: Sequence[str] = ()


def write(page: Page, path: Path) -> None:
    """Write the page to a file, complete or not at all.

    Raises:
        UserError: it cannot be written.
    """
    try:
        files.write_text(path, render(page))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def render(page: Page) -> str:
    """The page's HTML."""
    parts = _Renderer()
    sections = [section for section in page.sections if section.parts]
    body = "\n".join(parts.section(number, section) for number, section in enumerate(sections))
    contents = "\n".join(
        f'<li><a href="#section-{number}">{escape(each.title)}</a></li>' for number, each in enumerate(sections)
    )
    notices = "\n".join(
        f'<p class="notice"><strong>Attention:</strong> {escape(text)}</p>' for text in dict.fromkeys(page.notices)
    )
    return Template(_asset("page.html")).substitute(
        title=escape(page.title),
        lead=escape(page.lead),
        notices=notices,
        contents=contents,
        body=body,
        footer=f"Made by cpsp-dist {__version__}. Charts: Apache ECharts 6.1.0 (Apache License 2.0).",
        style=_asset("page.css"),
        data=script_json({"figures": parts.figures, "tables": parts.tables}),
        echarts=_asset("echarts.min.js"),
        script=_asset("page.js"),
    )


def script_json(content: Any) -> str:
    """JSON that may stand inside a <script>: no text in it can end the element. What is not finite becomes null."""
    text = json.dumps(_finite(content), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


@dataclass
class _Renderer:
    """Collects the data that the page's script reads, while it writes the HTML around them."""

    figures: list[dict[str, Any]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)

    def section(self, number: int, section: PageSection) -> str:
        note = f'<p class="note">{escape(section.note)}</p>' if section.note else ""
        parts = self.parts(section.parts)
        return (
            f'<section aria-labelledby="section-{number}"><h2 id="section-{number}">{escape(section.title)}</h2>'
            f'{note}<div class="figures">{parts}</div></section>'
        )

    def parts(self, parts: Iterable[Figure | Picture | Table | Facts | Choice]) -> str:
        return "\n".join(self._part(part) for part in parts)

    def _part(self, part: Figure | Picture | Table | Facts | Choice) -> str:
        if isinstance(part, Figure):
            return self._figure(part)
        if isinstance(part, Picture):
            return _picture(part)
        if isinstance(part, Table):
            return f'<div class="table wide"><h3>{escape(part.caption)}</h3>{self._table(part)}</div>'
        return _facts(part) if isinstance(part, Facts) else self._choice(part)

    def _figure(self, figure: Figure) -> str:
        self.figures.append({"option": figure.option, "canvas": figure.canvas})
        number = len(self.figures) - 1
        table = ""
        if figure.table is not None:
            table = f"<details><summary>Numbers: {escape(figure.title)}</summary>{self._table(figure.table)}</details>"
        least = f"min-width:{figure.least_width}px" if figure.least_width else ""
        label = escape(f"{figure.title}. {figure.caption}", quote=True)
        chart = (
            f'<div class="chart" data-figure="{number}" role="img" aria-label="{label}" '
            f'style="height:{figure.height}px;{least}"></div>'
        )
        if least:
            chart = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(figure.title)}">{chart}</div>'
        kind = ' class="wide"' if figure.wide else ""
        return (
            f"<figure{kind}><h3>{escape(figure.title)}</h3>{chart}"
            f"<figcaption>{escape(figure.caption)}</figcaption>{table}</figure>"
        )

    def _table(self, table: Table) -> str:
        columns = [{"name": each.name, "kind": each.kind, "title": each.title} for each in table.columns]
        self.tables.append({"caption": table.caption, "columns": columns, "rows": table.rows, "page": table.page})
        return f'<div data-table="{len(self.tables) - 1}"></div>'

    def _choice(self, choice: Choice) -> str:
        name = f"choice-{len(self.figures)}"
        options = "".join(f'<option value="{n}">{escape(label)}</option>' for n, (label, _) in enumerate(choice.groups))
        groups = "".join(
            f'<div class="figures" data-option="{n}"{" hidden" if n else ""}>{self.parts(figures)}</div>'
            for n, (_, figures) in enumerate(choice.groups)
        )
        return (
            f'<div class="choice wide"><p class="tools"><label for="{name}">{escape(choice.label)}</label> '
            f'<select id="{name}">{options}</select></p>{groups}</div>'
        )


def _picture(picture: Picture) -> str:
    title, caption = escape(picture.title, quote=True), escape(picture.caption, quote=True)
    image = f'<img alt="{title}. {caption}" src="data:image/png;base64,{b64encode(picture.png).decode()}">'
    return (
        f'<figure class="wide"><h3>{title}</h3><div class="scroll" tabindex="0" role="region" aria-label="{title}">'
        f"{image}</div><figcaption>{caption}</figcaption></figure>"
    )


def _facts(facts: Facts) -> str:
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.pairs)
    return f'<div class="facts{" wide" if facts.wide else ""}"><h3>{escape(facts.title)}</h3><dl>{pairs}</dl></div>'
