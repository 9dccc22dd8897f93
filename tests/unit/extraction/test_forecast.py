"""`cpsp-dist extract --plan`: bytes as they are written, hours from a rate, and what it measures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cpsp_dist.cli import main
from cpsp_dist.extraction import forecast as module
from cpsp_dist.extraction.decoders import ClipJob, Decoded, Decoders
from cpsp_dist.extraction.video import read_clip
from tests.support.extraction import add_cells, arguments, make_folder


@pytest.fixture(autouse=True)
def cells() -> None:
    add_cells()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("plan") / "in", 4)
    (folder / "videos" / "v003.mp4").unlink()
    return folder


def planned(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    capsys.readouterr()
    assert main(arguments(folder, folder / "none", "--plan", *more)) == 0
    assert not (folder / "none").exists()
    return capsys.readouterr().out


def test_a_given_rate(videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """101,072 videos at 8 a second take 3.5 hours."""
    found = planned(videos, capsys, "--rate", "8", "--count", "101072", "--jobs", "7")
    assert "videos   4 listed, 3 with a file; planned for 101,072\n" in found
    assert "rate     8.00 videos/s of one job on cpu, as given\n" in found
    assert "time     3.5 hours on 1 job at once\ntime     0.5 hours on 7 jobs at once\n" in found


def test_bytes_are_those_that_are_written(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(videos, capsys, "--rate", "1", "--count", "3000000")
    npy, shards = (float(each) * 1e9 / 1e6 for each in re.findall(r"([\d.]+) GB as", found))
    assert main(arguments(videos, tmp_path / "out", "--on-error", "skip", "--workers", "1")) == 0
    assert npy == pytest.approx(sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.npy")), rel=0.01)
    (videos / "labels.json").write_text(json.dumps({f"v{number:03d}": [1] * 10 for number in range(4)}))
    more = ["--shards", "--labels", str(videos / "labels.json"), "--on-error", "skip", "--workers", "1"]
    assert main(arguments(videos, tmp_path / "shards", *more)) == 0
    assert shards == pytest.approx(
        sum(path.stat().st_size for path in (tmp_path / "shards").glob("*.tar")), abs=3 * 10240
    )  # tar fills up the end of each of three


def test_measured_rates(videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU a video takes the time of decoding and that of encoding, of the same cores."""
    found = planned(videos, capsys, "--clips", "2", "--workers", "1")
    decoding, encoding = (float(each) for each in re.findall(r"alone ([\d.]+) videos/s", found))
    assert "measured 2 clips: " in found
    together = float(re.findall(r"rate +([\d.]+) videos/s of one job on cpu: both on the same cores", found)[0])
    assert together == pytest.approx(1 / (1 / decoding + 1 / encoding), rel=0.02)


@pytest.mark.parametrize(
    ("workers", "expected", "rate"),
    [
        ("1", "decoding alone 2.00 videos/s (1 processes), encoding alone 0.50", "0.40"),
        ("64", "decoding alone 128.00 videos/s (measured with 2 processes, multiplied by 32 for 64), encoding", "0.50"),
    ],
)
def test_more_workers_than_clips_are_multiplied_up(
    videos: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    workers: str,
    expected: str,
    rate: str,
) -> None:
    """Two clips of half a second each, encoded in 4 s."""
    counts = []

    class Timed(Decoders):
        def decode(self, jobs: Iterable[ClipJob]) -> Iterator[Decoded]:
            counts.append(self.count)
            return (Decoded(job, read_clip(job.path, self.form), "", 0.5) for job in jobs)

    monkeypatch.setattr(module, "Decoders", Timed)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=iter((1.0, 5.0)).__next__))
    found = planned(videos, capsys, "--clips", "2", "--workers", workers)
    assert expected in found
    assert f"rate     {rate} videos/s of one job" in found
    assert counts == [min(int(workers), 2)]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--rate", "1"], "--rate is of --plan; give that, too"),
        (["--plan", "--rate", "0"], "--rate 0: has to be more than 0"),
        (
            ["--plan", "--rate", "1", "--clips", "2"],
            "--clips 2: with --rate nothing is measured; leave one of them out",
        ),
        (["--plan", "--portion", "0/2"], "--plan is about all videos; leave --portion out, and give --jobs"),
    ],
)
def test_mistakes(videos: Path, capsys: pytest.CaptureFixture[str], flags: list[str], text: str) -> None:
    assert main(arguments(videos, videos / "none", *flags)) == 2
    assert f"error: {text}\n" in capsys.readouterr().err
