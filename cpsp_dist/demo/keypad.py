"""The demo corpus "keypad": a wall of handwritten digits and a telephone's tones, in AVE's own file layout.

A video has ten seconds and one digit c. In each second the wall, a 7 x 7 grid of 8 x 8-pixel cells, shows real scans
(scikit-learn's bundled digits), pure noise or nothing in each cell, and one of the ten DTMF tones may sound in noise.
A second is an event when c is on the wall and c's tone sounds. The other seconds are of four kinds:

    other tone   c on the wall, the tone of a digit that is not
    silent       c on the wall, no tone
    unseen       c's tone, c not on the wall
    neither      c not on the wall; no tone, or the tone of a digit that is not on the wall

So a wall digit and the tone agree only in events. Two more things keep one modality from being enough: besides c, a
decoy digit is on the wall as often as c is, and (other tone + silent) is as likely as (unseen). A model that knows c
and perceives one modality perfectly is right in about 4 seconds of 5; with both modalities always.

Visual feature of a second: the 64 pixels of each cell, 0 to 1, [7, 7, 64]. Audio: log power in 128 bands of 31.25 Hz,
[128]. Scans are disjoint between the splits. These choices were made once, by this reasoning, and not by looking at
which model they favour.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cpsp_dist.data.manifest import SPLITS
from cpsp_dist.packing.target import workplace
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.extras import require

SEGMENTS, GRID, PIXELS, BANDS = 10, 7, 64, 128
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CATEGORIES = [f"digit {name}" for name in DIGITS]
SCAN_SHARE = {"train": 0.6, "val": 0.15, "test": 0.25}

RATE, FRAME = 8000, 256  # samples a second, samples a spectrum; 256 give bands of 31.25 Hz
#: Hz, (row, column) of the telephone's keys
DTMF = {
    0: (941, 1336), 1: (697, 1209), 2: (697, 1336), 3: (697, 1477), 4: (770, 1209),
    5: (770, 1336), 6: (770, 1477), 7: (852, 1209), 8: (852, 1336), 9: (852, 1477),
}  # fmt: skip

#: How likely a background second is of each kind; seen without being heard as often as heard without being seen.
KINDS = ("other tone", "silent", "unseen", "neither")
KIND_SHARE = (0.2, 0.2, 0.4, 0.2)
#: Share of videos whose events are: nowhere, in all seconds, in one run, in two runs.
MASK_SHARE = (0.05, 0.1, 0.65, 0.2)
CELLS_PER_DIGIT, NOISY_CELLS = 4, 12  # of 49; two digits are on every wall
SILENCE = -1


def generate(folder: Path, sizes: dict[str, int], seed: int = 0) -> None:
    """Write the corpus into `folder` (made here): features, labels, splits, annotations and `videos.csv`, the truth.

    `sizes` counts the videos of train, val and test. Same sizes and seed: same files.

    Raises:
        UserError: `folder` is there already, or a size is less than one.
    """
    if any(size < 1 for size in sizes.values()):
        raise UserError("keypad: --train, --val and --test each need at least one video")
    with workplace(folder) as part:
        videos = [_with_bands(video) for video in videos_of(sizes, seed)]
        # AVE's Annotations.txt can only tell a single run: those videos come first, so that its line n is row n.
        videos.sort(key=lambda v: (v["runs"] != 1, v["category"], v["id"]))
        _write(part, videos)


def videos_of(sizes: dict[str, int], seed: int, rate: int = RATE) -> Iterator[dict[str, Any]]:
    """Every video of train, val and test: what it is, the wall of its seconds `visual` [10, 7, 7, 64], 0 to 1, and the
    samples of their `sound` [10, rate]."""
    scans = _split_scans(seed)
    for number, split in enumerate(SPLITS):
        yield from _split(split, sizes[split], [seed, 2, number], scans[split], rate)


def _split_scans(seed: int) -> dict[str, list[np.ndarray]]:
    """{split: [n, 64] scans of each digit}, pixels 0 to 1; no scan in two splits."""
    require("sklearn", "demo", "the keypad corpus")
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    rng = np.random.default_rng([seed, 1])
    cuts = np.cumsum([SCAN_SHARE[split] for split in SPLITS])[:-1]
    result: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for digit in range(10):
        # unique: a scan that is there twice must not end up in two splits
        own = rng.permutation(np.unique(pixels[digits == digit], axis=0) / 16)
        for split, part in zip(SPLITS, np.split(own, (cuts * len(own)).astype(int)), strict=True):
            result[split].append(part)
    return result


def _split(split: str, count: int, seed: list[int], scans: list[np.ndarray], rate: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    for index in range(count):
        category = index % 10
        mask = _mask(rng)
        decoy, *strangers = rng.permutation([d for d in range(10) if d != category])
        kinds, tones, seen = [], [], []
        for event in mask:
            kind = "event" if event else str(rng.choice(KINDS, p=KIND_SHARE))
            on_wall = kind in ("event", "other tone", "silent")
            # The decoy comes and goes as c does; whichever is away is stood in for by a stranger.
            wall = [category if on_wall else strangers[0], decoy if rng.random() < 0.7 else strangers[1]]
            quiet = kind == "silent" or (kind == "neither" and rng.random() < 0.5)
            other = strangers[2 + rng.integers(len(strangers) - 2)]
            tones.append(SILENCE if quiet else int(category if kind in ("event", "unseen") else other))
            seen.append([int(d) for d in wall])
            kinds.append(kind)
        yield {
            "id": f"keypad-{split}-{index:05d}",
            "split": split,
            "category": category,
            "mask": mask,
            "runs": int((np.diff(mask.astype(int), prepend=0) == 1).sum()),
            "kinds": kinds,
            "tones": tones,
            "seen": seen,
            "visual": np.stack([_wall(rng, digits, scans) for digits in seen]),
            "sound": _sound(rng, tones, rate),
        }


def _mask(rng: np.random.Generator) -> np.ndarray:
    """[10] bool: the seconds with the event."""
    mask = np.zeros(SEGMENTS, bool)
    shape = rng.choice(4, p=MASK_SHARE)
    if shape == 1:
        mask[:] = True
    elif shape == 2:
        length = rng.integers(2, SEGMENTS)
        start = rng.integers(SEGMENTS - length + 1)
        mask[start : start + length] = True
    elif shape == 3:
        # four cuts among the 11 borders, at least one second apart, bound two runs
        a, b, c, d = np.sort(rng.choice(SEGMENTS + 1, 4, replace=False))
        mask[a:b] = mask[c:d] = True
    return mask


def _wall(rng: np.random.Generator, digits: list[int], scans: list[np.ndarray]) -> np.ndarray:
    """[7, 7, 64]: a second's wall. A noisy cell is a scan with its pixels shuffled: as bright as a digit, but none."""
    wall = np.zeros((GRID * GRID, PIXELS), np.float32)
    cells = rng.permutation(GRID * GRID)
    shown = np.repeat(digits, CELLS_PER_DIGIT)
    for cell, digit in zip(cells, shown, strict=False):
        wall[cell] = rng.choice(scans[digit])
    for cell in cells[len(shown) : len(shown) + NOISY_CELLS]:
        wall[cell] = rng.permutation(rng.choice(scans[rng.integers(10)]))
    return wall.reshape(GRID, GRID, PIXELS)


def _sound(rng: np.random.Generator, tones: list[int], rate: int) -> np.ndarray:
    """[10, rate]: seconds of noise, with each second's tone for a part of it."""
    time = np.arange(rate) / rate
    sound = rng.standard_normal((len(tones), rate)) * rng.uniform(0.5, 1.5, (len(tones), 1))
    for second, tone in enumerate(tones):
        phase, level = rng.uniform(0, 2 * np.pi, 2), rng.uniform(0.5, 1.0)
        start, length = rng.uniform(0, 0.4), rng.uniform(0.3, 0.6)
        if tone != SILENCE:
            pair = sum(np.sin(2 * np.pi * f * time + p) for f, p in zip(DTMF[tone], phase, strict=True))
            sound[second] += level * pair * ((time >= start) & (time < start + length))
    return sound


def _with_bands(video: dict[str, Any]) -> dict[str, Any]:
    """A video with the features of its sound instead of it."""
    return {name: value for name, value in video.items() if name != "sound"} | {"audio": _bands(video["sound"])}


def _bands(sound: np.ndarray) -> np.ndarray:
    """[10, 128]: log power bands of seconds [10, RATE]."""
    frames = sound[:, : RATE // FRAME * FRAME].reshape(len(sound), -1, FRAME) * np.hanning(FRAME)
    power = np.abs(np.fft.rfft(frames)[..., 1 : BANDS + 1]) ** 2  # without the constant
    bands: np.ndarray = np.log(power.mean(axis=1) / FRAME + 0.01).astype(np.float32)
    return bands


def _write(folder: Path, videos: list[dict[str, Any]]) -> None:
    event = np.stack([v["mask"] for v in videos])
    category = np.array([v["category"] for v in videos])
    background = len(CATEGORIES)
    right = np.eye(background + 1, dtype=np.float32)[np.where(event, category[:, None], background)]
    mil = np.eye(background + 1, dtype=np.float32)[np.where(event.any(axis=1), category, background)]
    _write_h5(folder / "visual_feature.h5", "avadataset", np.stack([v["visual"] for v in videos]).astype(np.float16))
    _write_h5(folder / "audio_feature.h5", "avadataset", np.stack([v["audio"] for v in videos]))
    _write_h5(folder / "right_labels.h5", "avadataset", right)
    _write_h5(folder / "mil_labels.h5", "avadataset", mil)
    for split in SPLITS:
        rows = [row for row, v in enumerate(videos) if v["split"] == split]
        _write_h5(folder / f"{split}_order.h5", "order", np.array(rows, np.int64))
    (folder / "categories.txt").write_text("\n".join(CATEGORIES) + "\n", encoding="utf-8")
    lines = ["Category&VideoID&Quality&StartTime&EndTime"]
    truth = ["row,video_id,category,split,mask,kinds,seen,heard"]
    for row, v in enumerate(videos):
        seconds = np.flatnonzero(v["mask"])
        if v["runs"] == 1:
            lines.append(f"{CATEGORIES[v['category']]}&{v['id']}&good&{seconds[0]}&{seconds[-1] + 1}")
        mask = "".join("01"[int(e)] for e in v["mask"])
        seen = " ".join("".join(map(str, pair)) for pair in v["seen"])
        heard = "".join("." if t == SILENCE else str(t) for t in v["tones"])
        kinds = "/".join(v["kinds"])
        truth.append(f"{row},{v['id']},{CATEGORIES[v['category']]},{v['split']},{mask},{kinds},{seen},{heard}")
    (folder / "Annotations.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "videos.csv").write_text("\n".join(truth) + "\n", encoding="utf-8")


def _write_h5(path: Path, key: str, data: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset(key, data=data)
