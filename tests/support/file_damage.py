"""Damage to files, for fuzz tests: of bytes anywhere, of values of a JSON text, of headers of tars and arrays."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

#: What no value of a JSON text should be.
VALUES = (None, True, -1, 0, 2**63, 10**400, 0.5, 1e999, "", "x", "../../etc/passwd", "/dev/zero", "\x1b[2J", "\udcff")
VALUES += ([], {}, [[]], {"a": 1}, "9" * 40, "a\nb", [1] * 50, "\u202e", float("nan"))
TOKENS = (
    b"\0",
    b"\xff",
    b"\xfe\xff",
    b'"',
    b"'",
    b",",
    b"\n",
    b"\r",
    b"\x1b[2J",
    b"&",
    b"{",
    b"[" * 9999,
    b"-1",
    b"9" * 50,
)
TOKENS += (
    b"\xe2\x80\xa8",
    b"\xef\xbb\xbf",
    b"NaN",
    b"x" * 200_000,
    b"None",
    b"1e999",
    b"../",
    b"\\",
    b"0x10",
    b"9" * 5000,
)


def flip(data: bytes, rng: random.Random) -> bytes:
    """One to eight bits."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def delete(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + data[end:]


def repeat(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng)
    return data[:end] + data[start:end] + data[end:]


def fill(data: bytes, rng: random.Random) -> bytes:
    """A span of one value, as a lost block of a disk."""
    start, end = _span(data, rng)
    return data[:start] + bytes([rng.choice((0, 255, rng.randrange(256)))]) * (end - start) + data[end:]


def insert(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.choice(TOKENS) + data[place:]


def exchange(data: bytes, rng: random.Random) -> bytes:
    """Two spans of equal length in each other's place."""
    size = rng.randrange(1, max(2, len(data) // 4))
    a, b = sorted((rng.randrange(len(data)), rng.randrange(len(data))))
    size = min(size, b - a, len(data) - b)
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


BYTES: tuple[Mutation, ...] = (flip, flip, flip, cut, delete, repeat, fill, insert, exchange)


def of_head(data: bytes, rng: random.Random) -> bytes:
    """A byte of the first 2000, where formats keep what they say of the rest."""
    changed = bytearray(data)
    changed[rng.randrange(min(2000, len(data)))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    return bytes(changed)


def of_json(data: bytes, rng: random.Random) -> bytes:
    """A value replaced, removed, moved, or a key written twice."""
    content = json.loads(data)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(content)
    node, key = rng.choice(places)
    match rng.randrange(4):
        case 0:
            del node[key]
        case 1:
            other, name = rng.choice(places)
            node[key] = json.loads(json.dumps(other[name]))
        case 2 if isinstance(node[key], int):
            node[key] += rng.choice((-1, 1, 10, 2**31))
        case _:
            node[key] = rng.choice(VALUES)
    text = json.dumps(content)
    if rng.randrange(5) == 0 and isinstance(node, dict) and key in node:
        name = json.dumps(key) + ": "
        text = text.replace(name, f"{name}{json.dumps(rng.choice(VALUES))}, {name}", 1)
    return text.encode("utf-8", "surrogatepass")


def of_tar(data: bytes, rng: random.Random) -> bytes:
    """A field of a header, its checksum right: name, size, type, magic, prefix."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        start = rng.choice(tar.getmembers()).offset
    block = bytearray(data[start : start + 512])
    place, length = rng.choice(((0, 100), (124, 12), (156, 1), (257, 8), (345, 155)))
    value = rng.choice(
        (
            *(b"77777777777", b"\x80" + b"\0" * 10 + b"\x01", b"\xff" * 11 + b"\xf0", b"-0000000001", b"00000000000"),
            *(b"x", b"L", b"K", b"g", b"S", b"1", b"2", b"5", b"a/b.json", b"../a.json", b"\x1b[2J.json", b"\xff\xfe"),
        )
    )
    block[place : place + length] = value[:length].ljust(length, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return data[:start] + bytes(block) + data[start + 512 :]


def of_npy(data: bytes, rng: random.Random) -> bytes:
    """The header of the first array in the file, of the same length."""
    start = data.index(b"\x93NUMPY")
    end = data.index(b"\n", start)
    header = data[start + 10 : end]
    old = rng.choice((b"'descr'", b"False", b"(", b",", b"'<f", b"<", b"10", b"7", b"}", b"'|", b"4"))
    new = rng.choice(
        (b"'O'", b"True", b"(-1", b"((((", b"99999999999999", b">", b"0", b"'|V", b"__import__", b"", b"1.5")
    )
    header = header.replace(old, new, 1).rstrip().ljust(len(header))[: len(header)]
    return data[: start + 10] + header + data[end:]


def _span(data: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.choice((1, 2, 8, 100, 512, 5000)))
