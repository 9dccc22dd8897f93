"""The demo corpus, decoded by other means than those that made it: pixels looked up, tones found by frequency."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest

from cpsp_dist.demo.keypad import generate
from cpsp_dist.packing.source import SourceOptions, open_source
from cpsp_dist.utils.errors import UserError
from tests.support.folders import files_under

SIZES = {"train": 120, "val": 30, "test": 50}
SPLITS = tuple(SIZES)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keypad") / "corpus"
    generate(folder, SIZES, seed=3)
    return folder


def digits_and_labels() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    return scans, labels


def array(folder: Path, name: str, key: str = "avadataset") -> np.ndarray:
    return h5py.File(folder / f"{name}.h5")[key][...]


@pytest.fixture(scope="module")
def seen(corpus: Path) -> list[list[Counter[int]]]:
    """For each video and second, how many cells show a scan of each digit: by looking each cell up in the data set."""
    pixels, digits = digits_and_labels()
    known = {scan.tobytes(): int(digit) for scan, digit in zip((pixels / 16).astype(np.float16), digits, strict=True)}
    visual = array(corpus, "visual_feature").reshape(-1, 10, 49, 64)
    return [[Counter(known[c.tobytes()] for c in wall if c.tobytes() in known) for wall in video] for video in visual]


@pytest.fixture(scope="module")
def heard(corpus: Path) -> np.ndarray:
    """[N, 10] digit whose tone sounds, -1 for none: the loudest row and the loudest column frequency's bands."""
    rows, columns = (697, 770, 852, 941), (1209, 1336, 1477)
    keys = {(3, 1): 0} | {(k // 3, k % 3): k + 1 for k in range(9)}
    audio = array(corpus, "audio_feature")

    def level(frequency: int) -> np.ndarray:  # above the noise of its second; band b is (b + 1) * 31.25 Hz
        below = int(frequency / 31.25) - 1
        return audio[..., below : below + 2].max(axis=-1) - np.median(audio, axis=-1)

    row, column = (np.stack([level(f) for f in group], axis=-1) for group in (rows, columns))
    tone = np.vectorize(lambda r, c: keys.get((r, c), -2))(row.argmax(-1), column.argmax(-1))
    return np.where(np.minimum(row.max(-1), column.max(-1)) > 0.6, tone, -1)


def test_ave_layout(corpus: Path) -> None:
    videos = sum(SIZES.values())
    assert array(corpus, "visual_feature").shape == (videos, 10, 7, 7, 64)
    assert array(corpus, "visual_feature").dtype == np.float16
    assert array(corpus, "audio_feature").shape == (videos, 10, 128)
    assert array(corpus, "audio_feature").dtype == np.float32
    source = open_source(SourceOptions("ave-h5", source=corpus))
    assert not source.problems
    assert Counter(e.split for e in source.entries) == SIZES
    assert len(source.categories) == 10


def test_annotations_name_the_single_runs(corpus: Path) -> None:
    masks = array(corpus, "right_labels")[..., :-1].any(axis=2)
    lines = (corpus / "Annotations.txt").read_text().splitlines()[1:]
    runs = (np.diff(masks.astype(int), axis=1, prepend=0) == 1).sum(axis=1)
    assert len(lines) == (runs == 1).sum()
    for line, mask in zip(lines, masks, strict=False):
        start, end = map(int, line.split("&")[3:])
        assert mask.nonzero()[0].tolist() == list(range(start, end))


def test_an_event_is_the_digit_seen_and_heard(corpus: Path, seen: list, heard: np.ndarray) -> None:
    labels = array(corpus, "right_labels")
    with open(corpus / "videos.csv", newline="") as file:
        truth = list(csv.DictReader(file))
    names = (corpus / "categories.txt").read_text().split("\n")
    right = 0
    for video, line in enumerate(truth):
        category = names.index(line["category"])
        for second in range(10):
            tone = int(line["heard"][second]) if line["heard"][second] != "." else -1
            right += heard[video, second] == tone
            on_wall = set(seen[video][second])
            event = category in on_wall and tone == category
            assert labels[video, second].argmax() == (category if event else 10)
            assert tone == -1 or (tone in on_wall) == event  # no other digit is ever seen and heard
    assert right / (10 * len(truth)) > 0.99  # there is noise, but the tones are clear


def test_walls_have_empty_and_noisy_cells(corpus: Path) -> None:
    """A noisy cell is as bright as a digit, and none: a scan's pixels in another order."""
    scans = (digits_and_labels()[0] / 16).astype(np.float16)
    known, shuffled = ({scan.tobytes() for scan in each} for each in (scans, np.sort(scans, axis=1)))
    for wall in array(corpus, "visual_feature").reshape(-1, 49, 64):
        others = [cell for cell in wall if cell.tobytes() not in known]
        noisy = [cell for cell in others if cell.any()]
        assert len(others) > len(noisy) > 0
        assert {np.sort(cell).tobytes() for cell in noisy} <= shuffled


def test_silent_seconds_are_noise(corpus: Path, heard: np.ndarray) -> None:
    silent = array(corpus, "audio_feature")[heard == -1]
    assert len(silent) > 100
    assert len({second.tobytes() for second in silent}) == len(silent)
    assert silent.std(axis=1).min() > 0.05  # from band to band of each second
    assert silent.std(axis=0).min() > 0.05  # from second to second in each band


def test_background_is_of_all_four_kinds(corpus: Path, seen: list, heard: np.ndarray) -> None:
    with open(corpus / "videos.csv", newline="") as file:
        truth = list(csv.DictReader(file))
    names = (corpus / "categories.txt").read_text().split("\n")
    background = array(corpus, "right_labels")[..., -1] == 1
    found: Counter[str] = Counter()
    for video, second in np.argwhere(background):
        category, tone = names.index(truth[video]["category"]), heard[video, second]
        if category in seen[video][second]:
            found["silent" if tone == -1 else "other tone"] += 1
        else:
            found["unseen" if tone == category else "neither"] += 1
    assert set(found) == {"other tone", "silent", "unseen", "neither"}
    assert min(found.values()) > 0.1 * background.sum(), found


def test_one_modality_alone_is_limited_both_together_are_not(corpus: Path, seen: list, heard: np.ndarray) -> None:
    """Readers that perfectly know what is seen, or heard, and even the video's digit, do what is right most often."""
    events = array(corpus, "right_labels")[..., :-1].any(axis=2).ravel()
    category = array(corpus, "right_labels")[..., :-1].any(axis=1).argmax(axis=1)
    labelled = (
        array(corpus, "right_labels")[..., :-1].any(axis=(1, 2)).repeat(10)
    )  # videos whose digit is known from labels
    seeing = np.array([[category[v] in wall for wall in video] for v, video in enumerate(seen)]).ravel()
    hearing = (heard == category[:, None]).ravel()

    def best(*readings: np.ndarray) -> float:
        codes = np.stack(readings)[:, labelled].T @ (1, 2)[: len(readings)]
        groups = [events[labelled][codes == code] for code in np.unique(codes)]
        return sum(max(g.sum(), (~g).sum()) for g in groups) / labelled.sum()

    majority = max(events[labelled].mean(), 1 - events[labelled].mean())
    assert majority + 0.1 < best(seeing) < 0.9
    assert majority + 0.1 < best(hearing) < 0.9
    assert best(seeing, hearing) > 0.98


def test_images_alone_do_not_even_show_which_digit(corpus: Path, seen: list) -> None:
    category = array(corpus, "mil_labels").argmax(axis=1)
    most = [sum((Counter(set(w)) for w in video), Counter()).most_common(1)[0][0] for video in seen]
    events = category < 10
    assert np.mean(np.array(most)[events] == category[events]) < 0.75


def test_scans_are_disjoint_between_splits(corpus: Path) -> None:
    pixels, _ = digits_and_labels()
    known = {scan.tobytes() for scan in (pixels / 16).astype(np.float16)}
    visual = array(corpus, "visual_feature").reshape(-1, 490, 64)
    used = {
        split: {cell.tobytes() for row in array(corpus, f"{split}_order", "order") for cell in visual[row]} & known
        for split in SPLITS
    }
    assert all(len(scans) > 100 for scans in used.values())
    assert not used["train"] & used["val"] | used["train"] & used["test"] | used["val"] & used["test"]


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    sizes = {"train": 12, "val": 2, "test": 3}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generate(tmp_path / name, sizes, seed)
    a, b, c = (files_under(tmp_path / name) for name in "abc")
    assert a == b
    assert a["visual_feature.h5"] != c["visual_feature.h5"]


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one video"):
        generate(tmp_path / "x", {"train": 1, "val": 0, "test": 1})
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match=r"is there already; choose another --out$"):
        generate(tmp_path, SIZES)
