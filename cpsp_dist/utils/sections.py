"""Sections of the configuration: typed, strict, frozen; also those that are made of the settings of an open set."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, create_model, model_serializer

from cpsp_dist.utils.redact import plain


class Section(BaseModel):
    """A part of the configuration. Unknown keys and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _keep_secrets(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Passwords in URLs are not written to checkpoints, launch files and tracked settings."""
        return {key: plain(value) for key, value in dump(self).items()}


def make_section(name: str, module: str, description: str, common: dict[str, tuple[Any, Any]], *kinds: type) -> Any:
    """A section with the keys of `common` (name -> type, Field), then those of each settings dataclass in `kinds`.

    Several kinds may share a key if they define it alike.

    Raises:
        TypeError: two kinds define the same key differently, or one of them a key of `common`.
    """
    keys, defined_by = dict(common), dict.fromkeys(common, "the section itself")
    definitions: dict[str, Any] = {}
    for kind in kinds:
        hints = get_type_hints(kind)
        for f in fields(kind):
            definition = (hints[f.name], f.default, dict(f.metadata))
            if f.name in keys and definitions.get(f.name) != definition:
                raise TypeError(f"{name}: {kind.__qualname__} defines '{f.name}' unlike {defined_by[f.name]}")
            definitions[f.name], defined_by[f.name] = definition, kind.__qualname__
            keys[f.name] = (hints[f.name], Field(f.default, **f.metadata))
    section = create_model(name, __base__=Section, __module__=module, **keys)  # type: ignore[call-overload]
    section.__doc__ = description
    return section
