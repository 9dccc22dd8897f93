"""Reading a configuration: YAML with `extends:` and dotted overrides, and messages for all mistakes at once."""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from cpsp_dist.config.schema import Config
from cpsp_dist.config.yaml_text import DEPTH_LIMIT, SIZE_LIMIT, Mistake, YamlText, read_yaml
from cpsp_dist.utils.errors import ConfigError
from cpsp_dist.utils.redact import learn
from cpsp_dist.utils.shipped import find_config, suggestion
from cpsp_dist.utils.text import quoted

#: Mistakes of a configuration, or of a sweep, that are printed.
MOST_LISTED = 40


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file (`find_config` finds it), its `extends:` chain below it and `overrides`
    (`key.key=value`) on top.

    Raises:
        ConfigError: with every mistake, a line each.
    """
    config, mistakes = next(check_configs(path, overrides, [()]))
    if config is None or mistakes:
        raise ConfigError(listed(path, mistakes))
    return config


def check_configs(
    path: str | Path, overrides: Sequence[str], alternatives: Iterable[Sequence[str]]
) -> Iterator[tuple[Config | None, list[str]]]:
    """As `load_config`, of `overrides` with each of `alternatives` behind them, with the mistakes returned.

    The files are read once for all.

    Raises:
        ConfigError: a file of the chain that cannot be read, or is no YAML mapping.
    """
    common = _Chain(find_config(path))
    common.override(overrides)
    for more in alternatives:
        chain = copy.deepcopy(common)
        chain.override(more)
        config, found = _validate(chain.content)
        left_out = {f"'{key}' is missing" for key in chain.dropped}
        yield config, chain.mistakes + [mistake for mistake in found if mistake.partition(";")[0] not in left_out]


def listed(path: str | Path, mistakes: Sequence[str]) -> str:
    """The text of an error about a configuration: one line, or one for each of the first mistakes."""
    shown = [*mistakes[:MOST_LISTED]]
    if len(mistakes) > MOST_LISTED:
        shown.append(f"and {len(mistakes) - MOST_LISTED:,} more mistakes")
    return f"{path}: " + ("\n  " if len(shown) > 1 else "") + "\n  ".join(shown)


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
    mistakes = [_explain(e, suggest=number < MOST_LISTED) for number, e in enumerate(errors)]
    return None, [*dict.fromkeys(mistakes + more)]


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


def _explain(error: dict[str, Any], suggest: bool) -> str:
    """suggest: the nearest key, which takes a few milliseconds to find."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = _nearest(key) if suggest else None
        return f"unknown key '{key}'" + (f"; did you mean '{near}'?" if near else "")
    if error["type"] == "missing":
        return f"'{key}' is missing; set it in the file or as {key}=…"
    if error["type"] == "value_error":
        return (f"{key}: " if key else "") + str(error["ctx"]["error"])
    given = repr(error["input"])
    return f"{key}={given[:80]}{'…' * (len(given) > 80)}: {error['msg'][0].lower()}{error['msg'][1:]}"


def keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, info in section.model_fields.items():
        found.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            found += keys(info.annotation, f"{prefix}{name}.")
    return found


class _Chain:
    """A file, what it extends and the overrides, with the mistakes in their YAML, and the keys left out for these."""

    def __init__(self, path: Path) -> None:
        self.mistakes: list[str] = []
        self.dropped: set[str] = set()
        self.content = self._read(path, ())

    def _read(self, path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
        """The mapping in `path`, merged over what it extends (relative to the file that names it, or a shipped one)."""
        real = Path(os.path.realpath(path))  # Path.resolve raises of a link that leads to itself
        if real in above:
            raise ConfigError(f"{path}: extends itself, by way of {', '.join(str(p) for p in above)}")
        if len(above) >= DEPTH_LIMIT:
            raise ConfigError(f"{path}: more than {DEPTH_LIMIT} files extend one another; make it fewer")
        try:
            text = read_yaml(path)
            learn([text])
            parsed = YamlText(text)
        except OSError as error:
            by = f" (extended by {above[-1]})" if above else ""
            raise ConfigError(f"{path}: cannot read this config file{by}: {error.strerror}{suggestion(path)}") from None
        except Mistake as mistake:
            raise ConfigError(f"{path}: {mistake}") from None
        self.mistakes += [f"{path}: {mistake}" if above else mistake for mistake in parsed.mistakes]
        self.dropped |= parsed.dropped
        content = {} if parsed.content is None else parsed.content
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: a config file holds sections (key: value), not {type(content).__name__}")
        base = content.pop("extends", None)
        if base is None:
            return content
        if not isinstance(base, str):
            raise ConfigError(f"{path}: extends: takes one file name, not {quoted(str(base))}")
        return _merge(self._read(find_config(base, path.parent), (*above, real)), content)

    def override(self, overrides: Sequence[str]) -> None:
        """Merge what each `key.key=value` sets over the content."""
        for text in overrides:
            try:
                _merge(self.content, self._overriding(text))
            except Mistake as mistake:
                self.mistakes.append(f"override {quoted(text)}: {mistake}")

    def _overriding(self, text: str) -> dict[str, Any]:
        """What `key.key=value` sets. Raises Mistake."""
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key) or key.count(".") >= DEPTH_LIMIT:
            raise Mistake("write it as section.key=value")
        if not value.strip():
            raise Mistake(f"no value; write {key}=null for none")
        if len(value) > SIZE_LIMIT:
            raise Mistake(f"longer than {SIZE_LIMIT} characters")
        parsed = YamlText(value, comments=False)
        if parsed.mistakes:
            self.dropped.add(key)
            raise Mistake("; ".join(mistake.removeprefix("line 1: ") for mistake in parsed.mistakes))
        return _nested(key.split("."), parsed.content)


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
