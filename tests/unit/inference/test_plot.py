"""`--plot`: what is in the picture of a prediction, as PNG files in a folder and as one HTML page."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cpsp_dist.cli import main
from cpsp_dist.extraction.clip import ClipForm
from cpsp_dist.extraction.video import read_clip
from cpsp_dist.inference.plot import FRAME, draw, figure_of, pictures
from cpsp_dist.inference.prediction import Prediction, Span, Truth
from cpsp_dist.utils.errors import UserError
from tests.support.videos import Spec, make_video

EVENT = [0.1, 0.9, 0.2]


def prediction(given: str, video: str) -> Prediction:
    attention = np.zeros((3, 49), np.float32)
    attention[[0, 1, 2], [0, 24, 48]] = 1
    truth = Truth("dog & bell", [0, 1, 1])
    return Prediction(
        given,
        video,
        "dog & bell",
        0.9,
        1.0,
        EVENT,
        [Span(1.0, 2.0, "dog & bell", 0.9)],
        truth,
        attention.reshape(3, 7, 7),
    )


def test_rows_of_a_video(tmp_path: Path) -> None:
    path = make_video(tmp_path / "clip.mp4", Spec(fps=10, frames=30))
    clip = read_clip(path, ClipForm(3, 1.0, 1, FRAME))
    figure = figure_of(prediction(str(path), "clip"))
    rows = {axis.get_ylabel(): axis for axis in figure.axes}
    assert [*rows] == ["frame", "attention", "sound", "mel", "event"]
    np.testing.assert_array_equal(rows["frame"].images[0].get_array(), np.concatenate([*clip.frames], axis=1))
    shown = np.asarray(rows["attention"].images[0].get_array()).mean(axis=2)
    lit = shown - 0.45 * np.concatenate([*clip.frames.mean(axis=3)], axis=1) / 255  # without the grey frame below
    cells = lit.reshape(7, 16, 3, 7, 16).mean(axis=(1, 4)).transpose(1, 0, 2).reshape(3, 49)
    assert cells.argmax(axis=1).tolist() == [0, 24, 48]
    (wave,) = rows["sound"].lines
    np.testing.assert_array_equal(wave.get_ydata(), clip.waveform)
    energies = np.asarray(rows["mel"].images[0].get_array())
    assert energies.shape == (64, 3 * 96)
    loud = energies.mean(axis=0).reshape(-1, 96 // 4).max(axis=1)
    assert loud.min() > energies.mean() + 0.2, "each quarter second has bursts of tones"
    assert [bar.get_height() for bar in rows["event"].patches] == EVENT
    spans = {line.get_color(): [*line.get_xdata()] for line in rows["event"].lines if len(line.get_xdata()) == 2}
    assert (spans["tab:green"], spans["tab:blue"]) == ([1, 2], [1, 3])
    assert "predicted (green) 1-2 dog & bell   true (blue) 1-3 dog & bell" in rows["event"].get_xlabel()


def test_a_page_holds_all_of_it(tmp_path: Path) -> None:
    with pictures(tmp_path / "page.html") as draw:
        for name in ("a<b", "c"):
            draw(prediction("shards", name))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert re.findall("<h2>(.*)</h2>", page) == ["a&lt;b", "c"]
    assert "dog &amp; bell" in page
    assert "dog & bell" not in page
    images = re.findall('<img alt="[^"]+" src="data:image/png;base64,([^"]+)">', page)
    assert [base64.b64decode(each)[:4] for each in images] == [b"\x89PNG"] * 2
    assert not re.findall('(?:src|href)=(?!"data:)', page)
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]


def test_dollar_signs_are_no_formula() -> None:
    found = replace(prediction("shards", "$100 & $200_^"), category=r"a$\frac$b", spans=[Span(0, 1, "$^$ \\$", 0.9)])
    figure = figure_of(found)
    assert figure.get_suptitle() == r"$100 & $200_^: a$\frac$b (90%)"
    assert r"0-1 $^$ \$   true" in figure.axes[-1].get_xlabel()
    assert draw(found)[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("picture.png", "picture.png: give a folder, where each video has a picture, or a page NAME.html"),
        ("none/page.html", "page.html: cannot be written (no such folder)"),
        ("folder.html", "folder.html: cannot be written (a folder)"),
        ("file", "file: cannot be written (File exists)"),
    ],
)
def test_what_cannot_be_written_is_one_line(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught, pictures(tmp_path / name):
        pass
    assert str(caught.value) == f"--plot {tmp_path}/{name.rpartition('/')[0]}{'/' if '/' in name else ''}{text}"


def test_files_of_one_name_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keypad_shards: Path
) -> None:
    """There is no model, so anything that got as far as that would say so."""
    videos = [
        tmp_path / name for name in ("a/x.mp4", "b/x.mp4", "c/x.webm", "y.mp4", "d/visual/x.npy", "d/audio/x.npy")
    ]
    for path in videos:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    same, suffix, one, features = ([str(path) for path in videos[i:j]] for i, j in ((0, 2), (0, 3), (3, 4), (4, 6)))
    for inputs in (same, suffix[1:], [same[0], features[0]], [str(tmp_path / "a"), str(tmp_path / "b")]):
        for flag in ("--plot", "--overlay"):
            assert main(["predict", str(tmp_path / "model"), *inputs, flag, str(tmp_path / "out")]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert re.fullmatch(
                rf"error: {flag} .*: .*x\.\w+ and .*x\.\w+ would both be written to .*/out/x\.\w+; .*", line
            )
    link = tmp_path / "link.mp4"
    link.symlink_to("y.mp4")
    for inputs in ([*one, *one], features, [one[0], str(link), same[0]], [str(keypad_shards)] * 2):
        assert main(["predict", str(tmp_path / "model"), *inputs, "--plot", str(tmp_path / "out")]) == 2
        assert "no such folder" in capsys.readouterr().err.replace("not a model", "no such folder")
    assert main(["predict", str(tmp_path / "model"), *same, "--plot", str(tmp_path / "page.html")]) == 2
    assert "would both" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_key_with_slashes_leads_out_of_no_folder(tmp_path: Path) -> None:
    with pictures(tmp_path / "out") as draw:
        draw(prediction("shards", "../../x"))
    assert [each.name for each in (tmp_path / "out").iterdir()] == [".._.._x.png"]
