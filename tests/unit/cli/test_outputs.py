"""A file that is there is replaced only where it may be an earlier result of the same flag."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpsp_dist.cli import main
from cpsp_dist.cli.paths import require_replaceable


@pytest.mark.parametrize(
    ("command", "other"),
    [
        ("predict model clip.mp4 --out FILE", "other.mp4"),
        ("evaluate run --predictions FILE --format csv", "index.json"),
        ("report run --out FILE", "index.json"),
        ("compare --html FILE", "metrics.jsonl"),
        ("shards preview SHARDS --png FILE", "clip.mp4"),
        ("shards preview SHARDS --html FILE", "samples.npy"),
    ],
)
def test_a_file_of_another_kind_is_not_replaced(
    command: str, other: str, tmp_path: Path, keypad_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is no model and no run: it is refused before any work."""
    file = tmp_path / other
    file.write_text("of the user")
    given = {"FILE": str(file), "SHARDS": str(keypad_shards)}
    assert main([given.get(word, word) for word in command.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f" {file}: is there already, and no ." in line
    assert line.endswith("; choose another name, or remove it")
    assert file.read_text() == "of the user"


def test_a_file_that_is_read_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed, link = tmp_path / "videos.csv", tmp_path / "link.csv"
    listed.write_text("category,video_id,split\n")
    link.symlink_to("videos.csv")
    for out in (listed, link):
        assert main(["predict", "model", "x.mp4", "--csv", str(listed), "--out", str(out)]) == 2
        expected = f"error: --out {out}: is a file that this command reads; choose another name\n"
        assert capsys.readouterr().err == expected
    assert listed.read_text() == "category,video_id,split\n"


def test_an_earlier_result_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.CSV").touch()
    for name in ("a.CSV", "new.mp4"):
        require_replaceable("--out", tmp_path / name, (".csv",), [tmp_path / "none", None, "https://host/x.csv"])
    require_replaceable("--out", Path("/dev/null"), (".csv",))
