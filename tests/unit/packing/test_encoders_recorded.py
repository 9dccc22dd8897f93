"""The manifest records which encoders made the features, and what is made of shards keeps it or refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cpsp_dist.cli import main
from cpsp_dist.data.encoders import UNKNOWN, Encoders, compare_records, named
from cpsp_dist.data.manifest import Manifest
from tests.support.packing_sources import write_npy

VISUAL = {"name": "net", "weights_sha256": "a" * 64, "preprocessing": {"size": [224, 224], "frames": 16}}
AUDIO = {"name": "mel", "weights_sha256": None, "preprocessing": {"bands": 64}}
RECORD = {"visual": VISUAL, "audio": AUDIO}


@pytest.fixture
def features(tmp_path: Path) -> Path:
    """As an extraction leaves them."""
    write_npy(tmp_path / "features", 6)
    (tmp_path / "features" / "encoders.json").write_text(json.dumps(RECORD))
    return tmp_path / "features"


def pack(source: Path, out: Path, *more: str) -> int:
    return main(["shards", "pack", "--layout", "npy", "--source", str(source), "--out", str(out), *more])


def index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "index.json").read_text())


def test_they_go_from_the_features_into_the_manifest(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fingerprint covers them; without them it is that of format 1."""
    assert pack(features, tmp_path / "known") == 0
    assert index(tmp_path / "known")["encoders"] == RECORD
    assert f"encoders: visual net (weights {'a' * 12}), audio mel" in capsys.readouterr().out
    (features / "encoders.json").unlink()
    assert pack(features, tmp_path / "unknown") == 0
    assert index(tmp_path / "unknown")["encoders"] == {"visual": None, "audio": None}
    known, unknown = (Manifest.load(tmp_path / name) for name in ("known", "unknown"))
    assert known.shards == unknown.shards
    assert known.fingerprint != unknown.fingerprint
    assert (known.encoders, unknown.encoders) == (Encoders(VISUAL, AUDIO), UNKNOWN)
    old = index(tmp_path / "unknown") | {"cpsp_version": 1}
    del old["encoders"]
    (tmp_path / "unknown" / "index.json").write_text(json.dumps(old))
    assert Manifest.load(tmp_path / "unknown").fingerprint == unknown.fingerprint == old["fingerprint"]

    changed = json.dumps(index(tmp_path / "known")).replace("net", "other")
    (tmp_path / "known" / "index.json").write_text(changed)
    assert main(["shards", "info", str(tmp_path / "known")]) == 2
    assert "fingerprint differs" in capsys.readouterr().err


def test_flags_name_what_nothing_records(features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(features, tmp_path / "other", "--visual-encoder", "other") == 2
    assert "--visual-encoder other: " in (line := capsys.readouterr().err)
    assert "records that net (weights aaaaaaaaaaaa) made its visual features; leave the flag out" in line
    assert pack(features, tmp_path / "same", "--visual-encoder", "net") == 0
    (features / "encoders.json").unlink()
    assert pack(features, tmp_path / "named", "--visual-encoder", "net") == 0
    assert index(tmp_path / "named")["encoders"] == {"visual": named("net"), "audio": None}
    assert main(["shards", "index", str(tmp_path / "named"), "--audio-encoder", "mel"]) == 0
    assert index(tmp_path / "named")["encoders"] == {"visual": named("net"), "audio": named("mel")}
    for flags in (["--visual", "visual"], ["--visual", "video"]):
        (features / "encoders.json").write_text(json.dumps(RECORD))
        shutil.rmtree(tmp_path / "apart", ignore_errors=True)
        code = pack(features, tmp_path / "apart", "--visual", str(features / flags[1]))
        assert code == (2 if flags[1] == "visual" else 0), "the record is beside the folder, too"
    assert index(tmp_path / "apart")["encoders"] == RECORD


def test_what_is_made_of_shards_keeps_them(features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(features, tmp_path / "all") == 0
    assert main(["shards", "split", str(tmp_path / "all"), "--part", "a=1", "--part", "b=1", "--out"] + [
        str(tmp_path / "parts")]) == 0  # fmt: skip
    parts = [str(tmp_path / "parts" / name) for name in "ab"]
    assert main(["shards", "merge", *parts, "--out", str(tmp_path / "merged")]) == 0
    assert main(["shards", "index", str(tmp_path / "merged")]) == 0
    for folder in (*map(Path, parts), tmp_path / "merged"):
        assert index(folder)["encoders"] == RECORD


@pytest.mark.parametrize(
    ("other", "expected_text"),
    [
        (RECORD | {"visual": VISUAL | {"name": "other"}}, "its visual encoder is other, that of"),
        (
            RECORD | {"visual": VISUAL | {"weights_sha256": "b" * 64}},
            "its visual encoder is net (weights bbbbbbbbbbbb)",
        ),
        (RECORD | {"audio": AUDIO | {"preprocessing": {"bands": 32}}}, "its audio encoder is mel with bands=32, that"),
        (RECORD | {"segment_seconds": 0.5}, "its segments last 0.5 s, those of"),
        (RECORD | {"audio": None}, "merged/b --audio-encoder NAME`"),
        (None, "merged/b --visual-encoder NAME`"),
    ],
    ids=["name", "weights", "preprocessing", "segments", "half unknown", "unknown"],
)
def test_merge_refuses_other_encoders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: dict[str, Any] | None, expected_text: str
) -> None:
    folder = tmp_path / "merged"
    for name, record in (("a", RECORD), ("b", other)):
        write_npy(tmp_path / name, 4)
        (tmp_path / name / "encoders.json").write_text(json.dumps(record))
        assert pack(tmp_path / name, folder / name) == 0
    capsys.readouterr()
    assert main(["shards", "merge", str(folder / "a"), str(folder / "b"), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {folder / 'b'}: ")
    assert expected_text in line
    assert not (tmp_path / "out").exists()


def test_what_is_not_known_differs_from_nothing() -> None:
    half = VISUAL | {"preprocessing": VISUAL["preprocessing"] | {"precision": "float16"}}
    for record in (None, VISUAL, named("net"), half, VISUAL | {"weights_sha256": None}):
        assert compare_records(VISUAL, record) is None
    assert compare_records(VISUAL, named("mel")) == ("net", "mel")
    assert compare_records(VISUAL, VISUAL | {"preprocessing": {"frames": 16}}) == (
        "net with size=[224, 224]",
        "net with no size",
    )


@pytest.mark.parametrize(
    ("record", "expected_text"),
    [
        ("{", "line 1: no JSON"),
        ('{"visual": "net", "audio": null}', "visual encoder: needs name, preprocessing, weights_sha256"),
        (json.dumps({"visual": VISUAL | {"weights_sha256": "abc"}}), "visual encoder net: weights_sha256 is no sha256"),
        (json.dumps({"audio": AUDIO | {"name": "a\x1bb"}}), "audio encoder: no name"),
        (json.dumps(RECORD | {"segment_seconds": 0}), "segment_seconds is no number of seconds"),
        (json.dumps({"video": VISUAL}), "needs an object with visual, audio and segment_seconds"),
    ],
)
def test_a_damaged_record_is_one_line(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], record: str, expected_text: str
) -> None:
    (features / "encoders.json").write_text(record)
    assert pack(features, tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {features / 'encoders.json'}: not the record of an extraction (")
    assert expected_text in line
