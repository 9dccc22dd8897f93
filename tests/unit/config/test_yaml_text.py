"""Values of a configuration have one meaning, or are refused in a line that names file, line and what to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import strategies as st

from cpsp_dist.config import Config, load_config
from cpsp_dist.config.yaml_text import SIZE_LIMIT, Mistake, YamlText, write_yaml
from cpsp_dist.utils.errors import ConfigError
from cpsp_dist.utils.text import is_plain
from tests.support.environment import REPO
from tests.support.examples import examples
from tests.support.mutations import damaged

SHIPPED = sorted((REPO / "configs").glob("*.yaml"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10),
        ("-3", -3),
        ("0", 0),
        ("1e-3", 1e-3),
        ("1.5", 1.5),
        (".5", 0.5),
        ("1.", 1.0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("'010'", "010"),
        ('"yes"', "yes"),
        ("runs/1:30", "runs/1:30"),
        ("v1.2.3", "v1.2.3"),
        ("n", "n"),
        ("0123456789abcdef", "0123456789abcdef"),
        ("0f3", "0f3"),
        ("Y", "Y"),
        ("[1, 2]", (1, 2)),
        ("{a: {b: x}}", {"a": {"b": "x"}}),
        ("", None),
    ],
)
def test_one_meaning(text: str, value: Any) -> None:
    parsed = YamlText(text)
    assert (parsed.content, parsed.mistakes) == (value, [])
    assert type(parsed.content) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "010",
        "0x10",
        "0o10",
        "0b11",
        "1_000",
        "1_0.5",
        "+007",
        "1:30",
        "1:30:00",
        "yes",
        "No",
        "on",
        "OFF",
        "2026-11-25",
        ".inf",
        "-.inf",
        ".nan",
        "1e999",
    ]
    + ["9" * 16, "9" * 5000, '"a\\u001b[31m"', '"a\\u009b31m"', "|\n a\n b"],
)
def test_what_has_two_meanings_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config("keypad", [f"train.seed={text}"])
    assert len(str(raised.value)) < 400
    assert "\x1b" not in str(raised.value)
    file = tmp_path / "c.yaml"
    file.write_text(f"data: {{shards: s}}\n\noutput: {text}\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: line 3: "):
        load_config(file)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a: [\n", "line 2: not valid YAML"),
        (b"data: {}\ndata: {}", "line 2: key 'data' is given twice"),
        (b"data: {shards: a, shards: b}", "line 1: key 'shards' is given twice"),
        (b"output: x\n1: 2", "line 2: a key has to be a text"),
        (b"? [a]\n: 1", "a key has to be a text"),
        (b"? {a: 1}\n: 1", "a key has to be a text"),
        (b"yes: 1", "line 1: 'yes' is ambiguous"),
        (b"output: x\n\xff", "line 2: not valid YAML: not UTF-8"),
        ("a: 1".encode("utf-16"), "not UTF-8"),
        (b"output: x\nb: \x1b", "line 2: not valid YAML: a character that is not printable"),
        (b"[" * 10_000, "nested in more than 16 levels"),
        (b"a: &x 1\nb: *x", "line 1: anchors and aliases"),
        (b"a: !!python/object/apply:os.system [ls]", "tags (!) are not read"),
        (b"a: !!binary x", "tags (!) are not read"),
        (b'a: "\\UFFFFFFFF"', "not valid YAML"),
        (b"a: 1\n---\nb: 2", "not valid YAML: but found another document"),
        (b"x" * (SIZE_LIMIT + 1), f"larger than {SIZE_LIMIT} bytes"),
        (b"just text", "a config file holds sections"),
        (b"data: {shards: }", "data.shards=None"),
    ],
)
def test_broken_files_name_the_line(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"c\.yaml") as raised:
        load_config(file)
    assert expected in str(raised.value)
    assert len(str(raised.value).splitlines()) <= 4
    assert len(str(raised.value)) < 1000


def test_a_yaml_bomb_is_one_line(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="line 1: anchors and aliases") as raised:
        load_config(tmp_path / "c.yaml")
    assert len(str(raised.value)) < 300


def test_mistakes_of_yaml_and_of_settings_at_once(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("data:\n  shards: yes\n")
    (tmp_path / "c.yaml").write_text("extends: base.yaml\ntrain:\n  seed: 010\n  epochs: -1\n")
    with pytest.raises(ConfigError) as raised:
        load_config(tmp_path / "c.yaml", ["train.gama=3", "engine.zero=1_0"])
    text = str(raised.value)
    for expected in ("base.yaml: line 2: 'yes' is", "line 3: '010' is", "train.epochs=-1", "'train.gama'", "'1_0' is"):
        assert expected in text
    assert "is missing" not in text
    assert len(text.splitlines()) == 6


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("output=runs/a b #2", "'#' begins a comment"),
        ("train.steps=", "no value; write train.steps=null for none"),
        ("output=$HOME/x", "$HOME is not replaced"),
        ("data.shards=${DATA}/x", "${DATA} is not replaced"),
        ("engine.deepspeed=$D/x.json", "$D is not replaced"),
        ("data.cache=~nobody-of-this-name/x", "this home folder is not known"),
        ("output=''", "this one is empty"),
        ("train.seed" + ".a" * 1000 + "=1", "write it as section.key=value"),
        ("train.learning_rate=[" + "1," * 9000 + "1]", "train.learning_rate=(1, 1, 1"),
        ("\x1b[31m=1", "'\\u001b[31m=1': write it as"),
        ("output=a\udcff", "not printable"),
        ("engine.timeout=999999999999999", "less than or equal to 1000000"),
        ("train.seed=1e3", "train.seed=1000.0: input should be a valid integer"),
    ],
)
def test_overrides_that_would_mean_something_else(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config("keypad", [override])
    assert expected in str(raised.value)
    assert len(str(raised.value)) < 400


def test_the_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config("keypad", ["output=~/r", "data.shards=~/s", "data.cache='~/c'", "engine.deepspeed=~/d.json"])
    paths = [config.output, config.data.shards, config.data.cache, config.engine.deepspeed]
    assert paths == [f"{tmp_path}/{name}" for name in ("r", "s", "c", "d.json")]
    assert load_config("keypad", ["data.shards=s3://bucket/~a"]).data.shards == "s3://bucket/~a"


def test_numbers_that_are_not_finite_are_refused_from_python_too() -> None:
    with pytest.raises(ValueError, match="finite"):
        Config.model_validate({"data": {"shards": "s"}, "train": {"learning_rate": float("inf")}})


def loads_or_names(file: Path, overrides: list[str]) -> Config | None:
    try:
        return load_config(file, overrides)
    except ConfigError as error:
        text = str(error)
        assert all(is_plain(line) for line in text.split("\n"))
        assert len(text) < 20_000
        return None


def test_damaged_files_load_or_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for number, source in enumerate(SHIPPED[:4]):
        for content in damaged(source.read_bytes(), seed=number, count=30):
            file.write_bytes(content)
            loads_or_names(file, [])


PIECES = st.sampled_from(
    ["010", "1e5", "yes", "- ", ": ", "[", "]", "{", "}", "*a", "&a", "!t", "|\n ", "'", '"', "#", "~", "%", "\\x1b"]
    + ["null", ".nan", "\t", "\n", "9" * 400, "$A", "? ", "---", "@", "`", "\x85", "\u2028", "\ufeff", "\ud800"]
)
TEXTS = st.lists(PIECES | st.text(max_size=4) | st.integers().map(str), max_size=5).map("".join)
KEYS = st.sampled_from(["train.seed", "output", "data.shards", "train.milestones", "objectives", "train.steps", "x.y"])


@examples(50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=KEYS | TEXTS, value=TEXTS)
@example("output", "\x1b[31m")
def test_any_override_is_taken_or_refused(key: str, value: str) -> None:
    config = loads_or_names(SHIPPED[0], [f"{key}={value}"])
    if config is not None and key == "train.seed":
        assert str(config.train.seed) == value.strip().lstrip("+")


@examples(100)
@given(text=TEXTS)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        mistakes = YamlText(text).mistakes
    except Mistake as mistake:
        mistakes = [str(mistake)]
    assert all(is_plain(mistake) for mistake in mistakes)


@examples(100)
@given(text=(TEXTS | st.text("0123456789abcdef", min_size=32, max_size=32)).filter(is_plain))
@example("0123456789abcdef" * 2)  # an id of MLflow: a sweep's snapshots hold one
@example("1234567890123e45" * 2)
@example("1e5")
@example("12345678901234567890123456789012")
def test_what_is_written_is_read_as_the_same(text: str) -> None:
    values = (text, 1, 1e-5, 1e20, None, True)
    for style in ({}, {"default_flow_style": None, "width": 110}):
        parsed = YamlText(write_yaml({"tracking": {"parent": text, "more": [*values]}}, **style))
        assert parsed.mistakes == []
        assert parsed.content == {"tracking": {"parent": text, "more": values}}
