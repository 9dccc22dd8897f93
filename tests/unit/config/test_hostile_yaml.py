"""YAML made to cost time or memory: at most 20 s and a gigabyte, a configuration or a few lines that name the file."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cpsp_dist.config import load_config
from cpsp_dist.config.loading import MOST_LISTED
from cpsp_dist.config.yaml_text import DEPTH_LIMIT, SIZE_LIMIT
from cpsp_dist.utils.errors import ConfigError
from cpsp_dist.utils.text import is_plain
from tests.support.environment import REPO
from tests.support.file_damage import BYTES, insert
from tests.support.limits import within_limits

ROOM = SIZE_LIMIT - 100
BOMB = b"a0: &a0 [x, x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 40)
)


def filled(piece: bytes, size: int = ROOM) -> bytes:
    return piece * (size // len(piece))


def lines(text: str) -> bytes:
    """One for each number, as many as a file takes."""
    made, number = bytearray(), 0
    while len(made) < ROOM:
        made += (text % number).encode()
        number += 1
    return bytes(made[:ROOM].rpartition(b"\n")[0])


#: name: content of a file.
CONTENTS = {
    "bomb": BOMB,
    "merge keys": b"a: &a {x: 1}\n" + lines("b%d: {<<: *a}\n"),
    "nested flow": filled(b"["),
    "nested mappings": filled(b"{a: "),
    "nested blocks": filled(b"- "),
    "nested keys": filled(b"? "),
    "nested by indentation": b"".join(b" " * n + b"a:\n" for n in range(350)),
    "a large integer": b"train: {steps: " + filled(b"9") + b"}",
    "a large float": b"train: {learning_rate: 1" + filled(b"0") + b".0}",
    "a large exponent": b"train: {learning_rate: 1e" + filled(b"9") + b"}",
    "many digits": b"train: {learning_rate: 0." + filled(b"3") + b"}",
    "an open text": b'output: "' + filled(b"a b\n "),
    "escapes": b'output: "' + filled(b"\\U0001F600") + b'"',
    "tabs": filled(b"\t"),
    "comments": filled(b"#\n"),
    "documents": filled(b"---\n"),
    "directives": filled(b"%TAG ! a:\n") + b"--- 1",
    "a block": b"output: |\n" + filled(b"  a\n"),
    "colons": filled(b"a: b: "),
    "dashes": filled(b"-"),
    "quotes": filled(b"''"),
    "unknown sections": lines("a%d: 1\n"),
    "unknown keys": b"train:\n" + lines("  epoch%d: 1\n"),
    "ambiguous values": b"train:\n" + lines("  a%d: 010\n"),
    "one key": b"train:\n" + filled(b"  seed: 1\n"),
    "a list": b"train: {milestones: [" + filled(b"1,", ROOM // 2) + b"1]}\ndata: {shards: s}",
    "a list of texts": b"train: {milestones: [" + filled(b"x,", ROOM // 2) + b"1]}",
    "a million elements": b"train: {milestones: [" + b"1," * 10**6 + b"1]}",
    "a hundred megabytes": b"#" * 10**8,
}
#: Over half a second of CPU time.
LONG = ("unknown sections", "unknown keys", "ambiguous values", "one key", "a list", "a list of texts")


def read(file: Path, *overrides: str) -> str:
    """What is wrong, a few printable lines; '' where it is a configuration."""
    try:
        with within_limits(file):
            load_config(file, overrides)
    except ConfigError as error:
        text = str(error)
        assert all(map(is_plain, text.split("\n")))
        assert len(text.splitlines()) <= MOST_LISTED + 2
        assert max(map(len, text.splitlines())) < 1000
        assert str(file) in text
        return text
    return ""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in CONTENTS]
)
def test_a_file(tmp_path: Path, name: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(CONTENTS[name])
    assert bool(read(file)) is (name != "a list")


@pytest.mark.long
def test_an_override(tmp_path: Path) -> None:
    """Python's own callers are not limited by a command line's length."""
    file = tmp_path / "c.yaml"
    file.write_text("data: {shards: s}\n")
    assert read(file, "train.milestones=[" + "1," * 10**6 + "1]")
    assert read(file, "train.seed=" + "9" * 10**7)
    assert read(file, "output=" + "[" * 10**6)
    assert read(file, *["train.sed=1"] * 1000)
    assert not read(file, *[f"train.seed={number}" for number in range(1000)])


def test_files_that_extend_one_another(tmp_path: Path) -> None:
    for number in range(2 * DEPTH_LIMIT):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    (tmp_path / f"{2 * DEPTH_LIMIT}.yaml").write_text("data: {shards: s}\n")
    with pytest.raises(ConfigError, match=rf"/{DEPTH_LIMIT}\.yaml: more than {DEPTH_LIMIT} files extend one another"):
        load_config(tmp_path / "0.yaml")
    assert load_config(tmp_path / f"{DEPTH_LIMIT + 1}.yaml").data.shards == "s"


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.long)])
def test_every_damage_is_read_or_named(tmp_path: Path, count: int) -> None:
    """Of the largest shipped file, complete in itself."""
    good = (REPO / "configs" / "keypad.yaml").read_bytes()
    file, taken = tmp_path / "c.yaml", 0
    for number in range(count):
        draw = random.Random(number)
        file.write_bytes(draw.choice((*BYTES, insert, insert))(good, draw))
        taken += not read(file)
    assert 0 < taken < count
