"""Reading a configuration: YAML with `extends:` and dotted overrides, and messages for all mistakes at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from cpsp_dist.config.schema import Config
from cpsp_dist.errors import ConfigError
from cpsp_dist.utils.redact import learn
from cpsp_dist.utils.shipped import find_config, suggestion
from cpsp_dist.utils.text import one_line


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file (`find_config` finds it), its `extends:` chain below it and `overrides`
    (`key.key=value`) on top.

    Raises:
        ConfigError: with every mistake, a line each.
    """
    config, mistakes = check_config(path, overrides)
    if config is None or mistakes:
        raise ConfigError(f"{path}: " + ("\n  " if len(mistakes) > 1 else "") + "\n  ".join(mistakes))
    return config


def check_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config | None, list[str]]:
    """As `load_config`, with the mistakes returned.

    Raises:
        ConfigError: a file of the chain that cannot be read, or is no YAML mapping.
    """
    mistakes: list[str] = []
    merged = _read_chain(find_config(path), ())
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            mistakes.append(f"override '{text}': write it as section.key=value")
            continue
        try:
            _merge(merged, _nested(key.split("."), yaml.load(value, Loader=_Loader)))
        except yaml.YAMLError:
            mistakes.append(f"override '{text}': '{value}' is not a YAML value")
    config, found = _validate(merged)
    return config, mistakes + found


def _validate(content: dict[str, Any]) -> tuple[Config | None, list[str]]:
    """The configuration, or its mistakes. Checks between keys run only where the keys themselves are right, so once
    more without the wrong ones."""
    try:
        return Config.model_validate(content), []
    except ValidationError as error:
        errors = [dict(e) for e in error.errors()]
    wrong: list[Any] = [e["loc"] for e in errors if e["type"] not in ("missing", "value_error")]
    rest = _without(content, wrong)
    more = _validate(rest)[1] if rest != content else []
    mistakes = [_explain(e) for e in errors]
    return None, mistakes + [mistake for mistake in more if mistake not in mistakes]


def _without(content: Any, paths: list[tuple[Any, ...]]) -> Any:
    """`content` less what stands at the end of each path (a path into a list drops the list)."""
    if not isinstance(content, dict):
        return content
    dropped = {p[0] for p in paths if len(p) == 1 or not isinstance(content.get(p[0]), dict)}
    return {k: _without(v, [p[1:] for p in paths if p[0] == k]) for k, v in content.items() if k not in dropped}


def _nearest(key: str) -> str | None:
    """The key that an unknown one may be a typo of: of its section first, then of all, then one that ends alike."""
    known = keys(Config)
    section, _, leaf = key.rpartition(".")
    in_section = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    near = [in_section[name] for name in in_section if leaf in name.split("_")]
    near += [in_section[name] for name in difflib.get_close_matches(leaf, in_section, n=1, cutoff=0.5)]
    near += difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    near += [k for k in known if k.rpartition(".")[2] == leaf]
    return near[0] if near else None


def _explain(error: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = _nearest(key)
        return f"unknown key '{key}'" + (f"; did you mean '{near}'?" if near else "")
    if error["type"] == "missing":
        return f"'{key}' is missing; set it in the file or as {key}=…"
    if error["type"] == "value_error":
        return (f"{key}: " if key else "") + str(error["ctx"]["error"])
    return f"{key}={error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, info in section.model_fields.items():
        found.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            found += keys(info.annotation, f"{prefix}{name}.")
    return found


def _read_chain(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The mapping in `path`, merged over what it extends (relative to the file that names it, or a shipped one)."""
    if path.resolve() in above:
        raise ConfigError(f"{path}: extends itself, by way of {', '.join(str(p) for p in above)}")
    try:
        text = path.read_text(encoding="utf-8")
        learn([text])
        content = yaml.load(text, Loader=_Loader) or {}
    except OSError as error:
        by = f" (extended by {above[-1]})" if above else ""
        raise ConfigError(f"{path}: cannot read this config file{by}: {error.strerror}{suggestion(path)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a config file holds sections (key: value), not {type(content).__name__}")
    base = content.pop("extends", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends: takes one file name, not {base!r}")
    return _merge(_read_chain(find_config(base, path.parent), (*above, path.resolve())), content)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            _merge(below[key], value)
        else:
            below[key] = value
    return below


def _nested(keys: list[str], value: Any) -> dict[str, Any]:
    *above, last = keys
    nested: dict[str, Any] = {last: value}
    for key in reversed(above):
        nested = {key: nested}
    return nested


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """Safe YAML with two traps removed: `1e-3` is a number, and a key given twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping

    # YAML lists become tuples, so that frozen settings hold nothing mutable.
    def construct_tuple(self, node: yaml.SequenceNode) -> tuple[Any, ...]:
        return tuple(self.construct_sequence(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:seq", _Loader.construct_tuple)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)
