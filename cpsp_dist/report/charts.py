"""Options of ECharts for the kinds of figure that the pages have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Number = float | int | None

#: Points of a line, at most: more than a screen has columns.
POINTS = 1000
HEAT = ["var(--heat-low)", "var(--heat-mid)", "var(--heat-high)"]
GRID = {"left": 12, "right": 24, "top": 60, "bottom": 34, "containLabel": True}


def _axis(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "nameLocation": "middle", "nameGap": 30, "axisLabel": {"hideOverlap": True}} | more


def _base(**more: Any) -> dict[str, Any]:
    return {
        "tooltip": {"trigger": "axis", "confine": True},
        "legend": {"type": "scroll", "top": 4},
        "grid": GRID,
    } | more


def thinned(points: Sequence[Any]) -> list[Any]:
    """At most `POINTS` of them, evenly chosen, the last one too."""
    step = -(-len(points) // POINTS) or 1
    return [*points[::step], *([points[-1]] if points and (len(points) - 1) % step else [])]


def lines(
    series: Mapping[str, Sequence[tuple[float, Number]]],
    x: str,
    y: str,
    *,
    log: bool = False,
    share: bool = False,
    levels: Mapping[str, float] | None = None,
    bands: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
) -> dict[str, Any]:
    """Curves over a number. series: {name: (x, y)}; log: the y axis; share: y is from 0 to 1; levels: {name: y} of
    horizontal lines; bands: {name of a series: (x, low, high)}."""
    drawn: list[dict[str, Any]] = []
    for number, (name, points) in enumerate(series.items()):
        one = {"name": name, "type": "line", "showSymbol": len(points) < 40, "data": [list(p) for p in thinned(points)]}
        one |= {"symbol": _symbol(number), "lineStyle": {"width": 2, "type": _dash(number)}}
        drawn.append(one | ({"itemStyle": {"color": _colour(number)}} if bands else {}))
        for low_high in [bands[name]] if bands and name in bands else []:
            drawn += _band(name, thinned(low_high), _colour(number))
    for name, value in (levels or {}).items():
        mark = {"silent": True, "symbol": "none", "lineStyle": {"color": "var(--quiet)", "type": "dotted", "width": 2}}
        mark |= {"data": [{"yAxis": value, "name": name}]}
        side = "Bottom" if share and value > 0.9 else "Top"  # at the top its text would lie on the axis' name
        mark["label"] = {"formatter": "{b}", "position": f"insideStart{side}", "color": "var(--text)"}
        drawn.append({"type": "line", "data": [], "markLine": mark})
    limits = {"min": 0, "max": 1} if share else {"scale": True}
    return _base(
        legend={"type": "scroll", "top": 4, "data": [*series]},
        xAxis=_axis(x, type="value", scale=True),
        yAxis={"type": "log" if log else "value", "name": y, "nameTextStyle": {"align": "left"}} | limits,
        series=drawn,
    )


def _band(name: str, points: Sequence[tuple[float, float, float]], colour: str) -> list[dict[str, Any]]:
    """The area between two lines: ECharts stacks the difference on the lower one."""
    common = {"type": "line", "stack": f"band {name}", "stackStrategy": "all", "symbol": "none", "silent": True}
    common |= {"lineStyle": {"opacity": 0}, "tooltip": {"show": False}, "itemStyle": {"color": colour}}
    low = [[x, a] for x, a, _ in points]
    difference = [[x, b - a] for x, a, b in points]
    return [
        {"name": name, **common, "data": low},
        {"name": name, **common, "data": difference, "areaStyle": {"opacity": 0.2, "color": colour}},
    ]


def _colour(number: int) -> str:
    return f"var(--c{number % 8})"


def _symbol(number: int) -> str:
    return ("circle", "rect", "triangle", "diamond", "roundRect", "emptyCircle")[number % 6]


def _dash(number: int) -> str:
    return ("solid", "dashed", "dotted")[number // 8 % 3]


def bars(
    names: Sequence[str], series: Mapping[str, Sequence[Number]], x: str, y: str, *, share: bool = False
) -> dict[str, Any]:
    """Upright bars beside each other. names: below them; series: {name: a value for each}."""
    return _base(
        xAxis=_axis(x, type="category", data=[*names]),
        yAxis={"type": "value", "name": y, "nameTextStyle": {"align": "left"}}
        | ({"min": 0, "max": 1} if share else {}),
        series=[{"name": name, "type": "bar", "data": [*values]} for name, values in series.items()],
    )


def level_bars(
    names: Sequence[str], series: Mapping[str, Sequence[Number]], x: str, *, share: bool = False
) -> dict[str, Any]:
    """Bars from left to right, the first on top: for many long names, which then scroll."""
    label = {"width": 130, "overflow": "truncate"}
    option = _base(
        grid=GRID | {"top": 36, "right": 44},
        xAxis=_axis(x, type="value", nameGap=24) | ({"min": 0, "max": 1} if share else {}),
        yAxis={"type": "category", "data": [*names], "inverse": True, "axisLabel": label},
        series=[{"type": "bar", "name": name, "data": [*values], "barMaxWidth": 18} for name, values in series.items()],
    )
    shown = 40 // max(len(series), 1)
    if len(names) > shown:
        end = 100 * shown / len(names)
        option["dataZoom"] = [{"type": "slider", "yAxisIndex": 0, "start": 0, "end": end, "right": 4, "width": 18}]
    return option


def heatmap(
    cells: Sequence[tuple[int, int, float]],
    x: tuple[str, Sequence[str]],
    y: tuple[str, Sequence[str]],
    limits: tuple[float, float],
) -> dict[str, Any]:
    """Coloured cells (column, row, value), the first row on top. x, y: the axis' name and its labels; limits: of the
    colours."""
    sides = {"type": "category", "splitArea": {"show": False}}
    long = max(map(len, x[1])) > 6
    label = {"rotate": 60, "width": 70, "overflow": "truncate"} if long else {}
    return {
        "tooltip": {"confine": True},
        "grid": GRID | {"top": 34, "bottom": 74},
        "xAxis": _axis(x[0], nameGap=78 if long else 28, data=[*x[1]], **sides, axisLabel=label),
        "yAxis": {"name": y[0], "inverse": True, "data": [*y[1]], "nameLocation": "start", **sides}
        | {"axisLabel": {"width": 110, "overflow": "truncate"}, "nameTextStyle": {"align": "left"}},
        "visualMap": {"min": limits[0], "max": limits[1], "calculable": False, "orient": "horizontal", "left": "center"}
        | {"bottom": 0, "inRange": {"color": HEAT}, "itemHeight": 120, "itemWidth": 12}
        | {"text": [f"{limits[1]:.2g}", f"{limits[0]:.2g}"]},
        "series": [{"type": "heatmap", "data": [list(cell) for cell in cells], "progressive": 0}],
    }


def scatter(series: Mapping[str, Sequence[Sequence[Any]]], x: str, y: str) -> dict[str, Any]:
    """Points (x, y, name). series: {name: points}."""
    size = 4 if sum(map(len, series.values())) > 2000 else 7
    return _base(
        tooltip={"confine": True},
        xAxis=_axis(x, type="value", scale=True, axisLabel={"show": False}, nameGap=10, axisLine={"onZero": False}),
        yAxis={
            "type": "value",
            "name": y,
            "scale": True,
            "axisLabel": {"show": False},
            "axisLine": {"onZero": False},
            "nameTextStyle": {"align": "left"},
        },
        series=[
            {"name": name, "type": "scatter", "data": [*points], "symbolSize": size, "symbol": _symbol(number)}
            | {"encode": {"x": 0, "y": 1, "tooltip": [2]}, "itemStyle": {"opacity": 0.75}}
            for number, (name, points) in enumerate(series.items())
        ],
    )


def intervals(
    names: Sequence[str],
    ends: Sequence[tuple[Number, Number, Number]],
    points: Sequence[Sequence[float]],
    x: str,
) -> dict[str, Any]:
    """A box for each name from low to high with a line at the mean, and its single points. ends: mean, low, high."""
    boxes = [[low, low, mean, high, high] for mean, low, high in ends]
    single = [[value, number] for number, values in enumerate(points) for value in values]
    return _base(
        tooltip={"confine": True},
        legend={"show": False},
        grid=GRID | {"top": 12},
        xAxis=_axis(x, type="value", scale=True),
        yAxis={
            "type": "category",
            "data": [*names],
            "inverse": True,
            "axisLabel": {"width": 160, "overflow": "truncate"},
        },
        series=[
            {
                "type": "boxplot",
                "name": x,
                "data": boxes,
                "itemStyle": {"borderWidth": 2, "borderColor": "var(--c0)", "color": "var(--heat-none)"},
            }
            | {"boxWidth": [6, 18]},
            {"type": "scatter", "name": "seeds", "data": single, "symbolSize": 7, "itemStyle": {"color": "var(--c1)"}},
        ],
    )


def parallel(axes: Sequence[tuple[str, Sequence[Any]]], names: Sequence[str], coloured: int) -> dict[str, Any]:
    """A line for each name through its value on each axis; `coloured`: the axis that the colour shows."""
    drawn: list[dict[str, Any]] = []
    columns: list[list[Any]] = []
    for number, (name, values) in enumerate(axes):
        floats = [_number(value) for value in values]
        axis: dict[str, Any] = {"dim": number, "name": name, "nameTextStyle": {"width": 100, "overflow": "truncate"}}
        if all(value is not None for value in floats) or number >= coloured:
            columns.append(floats)
            drawn.append(axis | {"type": _scale_of(floats), "scale": True})
        else:
            texts = [str(value) for value in values]
            columns.append(texts)
            kinds = sorted(set(texts))
            drawn.append(axis | {"type": "category", "data": kinds, "axisLabel": {"width": 90, "overflow": "truncate"}})
    known = [value for value in columns[coloured] if value is not None]
    low, high = (min(known), max(known)) if known else (0, 1)
    return {
        "tooltip": {"confine": True},
        "parallel": {"left": 60, "right": 90, "top": 44, "bottom": 70},
        "parallelAxis": drawn,
        "visualMap": {"min": low, "max": high if high > low else low + 1, "dimension": coloured, "bottom": 0}
        | {"orient": "horizontal", "left": "center", "inRange": {"color": ["var(--c4)", "var(--c1)", "var(--c0)"]}}
        | {"text": [f"{high:.4g}", f"{low:.4g}"], "calculable": False},
        "series": [
            {"type": "parallel", "name": "runs", "lineStyle": {"width": 2, "opacity": 0.7}}
            | {
                "data": [
                    {"name": name, "value": list(v)} for name, v in zip(names, zip(*columns, strict=True), strict=True)
                ]
            }
        ],
    }


def _scale_of(values: Sequence[float | None]) -> str:
    """A logarithmic axis for what spans more than a factor of 30, as learning rates do."""
    known = [value for value in values if value is not None]
    return "log" if known and min(known) > 0 and max(known) > 30 * min(known) else "value"


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
