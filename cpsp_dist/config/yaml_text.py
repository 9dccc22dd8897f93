"""YAML of a configuration, with one meaning for each value: what YAML 1.1 and 1.2 read differently is refused.

So `010` (8 or 10), `1_000`, `yes` and `1:30` (90, or a text) are mistakes that name what to write. Aliases, anchors
and tags are not read: a few lines of them can stand for gigabytes; `extends:` shares settings between files.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from cpsp_dist.utils.errors import ConfigError
from cpsp_dist.utils.text import is_plain, one_line, quoted

SIZE_LIMIT, DEPTH_LIMIT, DIGITS = 1 << 16, 16, 15  # bytes of a file; levels of nesting; of an integer

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FRACTION = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_OTHER_BASE = re.compile(r"[-+]?0(x[0-9a-fA-F_]+|b[01_]+|o?[0-9_]+)")
_GROUPED = re.compile(r"[-+]?[0-9][0-9_]*_[0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?")
_SIXTIES = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_DATE = re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt ].*)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    "true": True,
    "True": True,
    "TRUE": True,
    "false": False,
    "False": False,
    "FALSE": False,
}
_WORDS |= dict.fromkeys(("", "~", "null", "Null", "NULL"))
_YES_OR_NO = ("yes", "no", "on", "off")  # y and n are texts for all parsers


class Mistake(ValueError):
    """What is wrong with a text, and in which line, from 1 (0: of no line)."""

    def __init__(self, text: str, line: int = 0):
        super().__init__(text)
        self.line = line

    def __str__(self) -> str:
        return (f"line {self.line}: " if self.line else "") + super().__str__()


class YamlText:
    """The content of a YAML text, less the values that are mistakes.

    Attributes:
        content: of dicts with text keys, tuples, texts, numbers, booleans and None.
        mistakes: a line each. dropped: the dotted keys of the values that are left out for them.
    """

    def __init__(self, text: str, *, comments: bool = True):
        self.mistakes: list[str] = []
        self.dropped: set[str] = set()
        node = _parsed(text)
        self.content = None if node is None else self._value(node, "")
        if not comments and node is not None and node.end_mark.index < len(text.rstrip()):
            self._wrong("'#' begins a comment in YAML: put the value in quotes", node, "")

    def _value(self, node: yaml.Node, key: str) -> Any:
        match node:
            case yaml.MappingNode():
                return self._mapping(node, key)
            case yaml.SequenceNode():
                return tuple(self._value(item, key) for item in node.value)
        try:
            return _scalar(node)
        except ValueError as mistake:
            self._wrong(str(mistake), node, key)
            return None

    def _mapping(self, node: yaml.MappingNode, above: str) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            try:
                name = _scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
                if not isinstance(name, str) or not name:
                    raise ValueError("a key has to be a text")
            except ValueError as mistake:
                self._wrong(str(mistake), key_node, above)
                continue
            key = f"{above}.{name}" if above else name
            if name in mapping or key in self.dropped:
                self._wrong(f"key {quoted(name)} is given twice", key_node, key)
                continue
            value = self._value(value_node, key)
            if key not in self.dropped:
                mapping[name] = value
        return mapping

    def _wrong(self, text: str, node: yaml.Node, key: str) -> None:
        self.dropped.add(key)
        self.mistakes.append(str(Mistake(text, node.start_mark.line + 1)))


def read_yaml(path: Path) -> str:
    """The text of a file.

    Raises:
        OSError: it cannot be read. ConfigError: it is no file, not UTF-8, or too large.
    """
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: is not a file; give a YAML file")
    with path.open("rb") as file:
        raw = file.read(SIZE_LIMIT + 1)
    if len(raw) > SIZE_LIMIT:
        raise ConfigError(f"{path}: larger than {SIZE_LIMIT} bytes; is it the config file?")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}: line {line}: not valid YAML: not UTF-8") from None


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    """Writes each text so that it is read as that text: PyYAML itself leaves `1e5` and `0123` without quotes."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        node = yaml.ScalarNode("tag:yaml.org,2002:str", text)
        try:
            plain = _scalar(node) == text
        except ValueError:
            plain = False
        node.style = None if plain else "'"
        return node


_Dumper.add_representer(str, _Dumper.represent_text)


def write_yaml(content: Any, **style: Any) -> str:
    """The YAML of dicts, lists, texts, numbers, booleans and None, which `YamlText` reads as the same.

    style: of PyYAML's `dump`.
    """
    return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **style))


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Raises Mistake at what is not read, before anything is made of it."""

    depth = 0

    def get_event(self) -> yaml.Event:
        event = super().get_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.CollectionStartEvent):
            self.depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            self.depth -= 1
        if self.depth > DEPTH_LIMIT:
            raise Mistake(f"nested in more than {DEPTH_LIMIT} levels", line)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise Mistake("anchors and aliases (& and *) are not read: write the value, or use extends:", line)
        if getattr(event, "tag", None) not in (None, "!"):
            raise Mistake("tags (!) are not read: write the value, a text in quotes", line)
        return event


def _parsed(text: str) -> yaml.Node | None:
    """The one document of a text, or None where it is empty. Raises Mistake."""
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = one_line(error.problem or error.context or "broken")[:200]
        raise Mistake(f"not valid YAML: {_escaped(problem)}", mark.line + 1 if mark else 0) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Mistake("not valid YAML: a character that is not printable", line) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # \UFFFFFFFF in quotes; %YAML 999…
        if isinstance(error, Mistake):
            raise
        raise Mistake(f"not valid YAML: {_escaped(one_line(error)[:200])}") from None


def _scalar(node: yaml.ScalarNode) -> Any:
    """Its value. Raises ValueError with what to write instead."""
    text = node.value
    if not is_plain(text):
        raise ValueError(f"{quoted(text)} has characters that are not printable")
    if node.style is not None:  # in quotes, or a block
        return text
    if text in _WORDS:
        return _WORDS[text]
    shown = quoted(text)
    if _INTEGER.fullmatch(text):
        if len(text) > DIGITS:
            raise ValueError(f"{shown} is too large a number")
        return int(text)
    if _OTHER_BASE.fullmatch(text) or _GROUPED.fullmatch(text):
        raise ValueError(f"{shown} is ambiguous: write the number in plain decimal digits, or a text in quotes")
    if _FRACTION.fullmatch(text) or _NOT_FINITE.fullmatch(text):
        number = math.inf if _NOT_FINITE.fullmatch(text) else float(text)
        if not math.isfinite(number):
            raise ValueError(f"{shown} is not a finite number")
        return number
    if text.lower() in _YES_OR_NO:
        raise ValueError(f"{shown} is ambiguous: write true or false, or a text in quotes")
    if _SIXTIES.fullmatch(text) or _DATE.fullmatch(text):
        raise ValueError(f"{shown} is ambiguous: write a text in quotes, or a number in plain decimal digits")
    return text


def _escaped(text: str) -> str:
    return text if is_plain(text) else quoted(text)
