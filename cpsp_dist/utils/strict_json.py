"""JSON of others: what Python's reader takes without a word (a key twice, NaN) or fails at without a line, in one."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from typing import Any, NoReturn

#: A text, or a mark that opens, closes or separates.
_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"|[{}\[\],:]')


def load_json(data: bytes | str, where: str = "", *, allow_nan: bool = False) -> Any:
    """The content of a JSON text, in UTF-8 with or without a byte order mark.

    Raises:
        ValueError: `where` and the line of what is no JSON, of a key that is there twice, or, unless `allow_nan`, of
            NaN, Infinity and what no float can hold.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data.removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1 if isinstance(data, bytes) else 1
        raise ValueError(_at(where, line, "not UTF-8")) from None
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=integer,
            parse_float=float if allow_nan else _finite,
            parse_constant=float if allow_nan else _no_number,
        )
    except json.JSONDecodeError as error:
        raise ValueError(_at(where, error.lineno, f"no JSON ({error.msg}, column {error.colno})")) from None
    except _Repeated as repeated:
        line, key = _second(text, repeated.key), repeated.key[:60]
        raise ValueError(_at(where, line, f"the key {json.dumps(key)} is there twice")) from None
    except RecursionError:
        raise ValueError(_at(where, 1, "nested too deeply")) from None
    except ValueError as error:  # NaN; a number of thousands of digits
        line = next((n for n, part in enumerate(text.split("\n"), 1) if str(error) in part), 1)
        raise ValueError(_at(where, line, f"not a finite number ({str(error)[:60]})")) from None


def integer(text: str) -> int:
    """Of JSON, where it may become a float: `parse_int` of Python's reader. Raises ValueError where none holds it."""
    if len(text) > 400 or abs(int(text)) > sys.float_info.max:
        raise ValueError(text)
    return int(text)


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(text)
    return number


class _Repeated(Exception):
    def __init__(self, key: str):
        super().__init__(key)
        self.key = key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Repeated(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)


def _at(where: str, line: int, text: str) -> str:
    return f"{where}: line {line}: {text}" if where else f"line {line}: {text}"


def _second(text: str, key: str) -> int:
    """The line where an object has `key` for the second time."""
    keys: list[set[str]] = []
    name: str | None = None
    for token in _TOKEN.finditer(text):
        match token[0]:
            case "{" | "[":
                keys.append(set())
            case "}" | "]":
                keys.pop()
            case ":" if name is not None and keys:
                if name in keys[-1] and name == key:
                    return text.count("\n", 0, token.start()) + 1
                keys[-1].add(name)
        name = json.loads(token[0]) if token[1] is not None else None
    return 1
