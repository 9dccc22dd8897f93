"""Prints every setting as Markdown: `python -m cpsp_dist.config.reference > docs/configuration.md`."""

from __future__ import annotations

import inspect
import json
import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cpsp_dist.config.schema import Config
from cpsp_dist.utils.console import echo

HEAD = """# Configuration

All settings of a run, as written by `python -m cpsp_dist.config.reference > docs/configuration.md`. Do not edit.

A configuration is a YAML file with a key for each section below. `extends: other.yaml` takes the settings of another
file, which those of the file itself override. On the command line `section.key=value` overrides both. Unknown keys and
values of the wrong type are errors, all of which are reported at once. The published settings are the defaults.
"""
NAMES = {bool: "true or false", int: "integer", float: "number", str: "text", type(None): "null"}
BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}"}


def reference() -> str:
    """All settings: key, type, bounds or choices, default, meaning."""
    single = {n: f for n, f in Config.model_fields.items() if not _is_section(f)}
    parts = [HEAD, _table("", single)]
    for name, field in Config.model_fields.items():
        section: Any = field.annotation
        if _is_section(field):
            about = inspect.cleandoc(section.__doc__ or "")
            parts += [f"## {name}\n", f"{about}\n", _table(f"{name}.", section.model_fields)]
    return "\n".join(parts)


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _table(prefix: str, fields: dict[str, FieldInfo]) -> str:
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        cells = (f"`{prefix}{name}`", _type(field), _default(field), field.description or "")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _type(field: FieldInfo) -> str:
    bounds = [
        text.format(_number(getattr(limit, key)))
        for limit in field.metadata
        for key, text in BOUNDS.items()
        if getattr(limit, key, None) is not None
    ]
    return ", ".join([_name(field.annotation), *bounds])


def _name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return f"list of {_name(get_args(kind)[0])}s"
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_name(option) for option in get_args(kind))
    return NAMES[kind]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10_000 else f"{value:g}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return f"`{json.dumps(field.default, ensure_ascii=False)}`"


if __name__ == "__main__":
    echo(reference(), end="")
