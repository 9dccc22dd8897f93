"""Open sets: each is one table of names, and a new member is one new file and one line of the table.

The models, objectives, metrics and feature layouts are such sets. A table names where a thing is defined, so that
listing the names (for command line choices and settings) imports nothing. The thing brings its own settings: a frozen
dataclass of `setting` fields, from which the sections of the configuration are made.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

T = TypeVar("T")
S = TypeVar("S")


class Registry(Mapping[str, T]):
    """name -> thing, imported when it is first asked for, in the order of the table.

    Args:
        package: that the modules are in, e.g. 'cpsp_dist.models'.
        table: name -> ('module:Attribute', one line that describes it).
    """

    def __init__(self, package: str, table: Mapping[str, tuple[str, str]]) -> None:
        self._package, self._table = package, dict(table)

    def __getitem__(self, name: str) -> T:
        module, _, attribute = self._table[name][0].partition(":")
        thing: T = getattr(importlib.import_module(f"{self._package}.{module}"), attribute)
        return thing

    def __contains__(self, name: object) -> bool:
        return name in self._table  # without importing it

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def description(self, name: str) -> str:
        """What the table says about `name`; imports nothing."""
        return self._table[name][1]


@dataclass(frozen=True)
class NoSettings:
    """Of a thing that has none."""


def setting(default: Any, description: str, **bounds: float) -> Any:
    """A field of a settings dataclass. bounds: any of ge, gt, le, lt, as pydantic's `Field` takes them."""
    return field(default=default, metadata={"description": description, **bounds})


def settings_from(kind: type[S], section: Any) -> S:
    """The settings of `kind` (a dataclass) among the attributes of `section`, which may hold those of others too."""
    return kind(**{f.name: getattr(section, f.name) for f in fields(kind)})  # type: ignore[arg-type]
