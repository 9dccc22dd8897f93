"""Real clips: the features that the data set stores for them are found again, up to what the codec lost."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from cpsp_dist.extraction.encoders import build_encoder
from cpsp_dist.extraction.features import clip_features, clip_form
from cpsp_dist.extraction.video import read_clip
from tests.support.environment import DATA

CLIPS = DATA / "avdigits" / "clips"


@pytest.mark.parametrize("name", ["ZC7YG_ZfJw8", "_GbcKGONUj0"])
def test_stored_features(name: str) -> None:
    """One of 16 frames a second, square; one of 29.97, wider than high."""
    visual, audio = build_encoder("efficientnet-lite0"), build_encoder("logmel")
    clip = read_clip(CLIPS / f"{name}.mp4", clip_form(visual, audio))
    found, sound = clip_features(clip, visual, audio)
    assert (found.shape, sound.shape) == ((10, 7, 7, 192), (10, 512))
    expected = stored(name).astype("f4")
    cosine = (found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected)
    assert cosine > 0.88
    assert str(visual.identity()["weights_sha256"]).startswith("57934424"), "as the file's name says"


def stored(name: str) -> np.ndarray:
    rows = (DATA / "avdigits" / "ave_h5" / "videos.csv").read_text().splitlines()
    names = [row.split(",")[rows[0].split(",").index("video_id")] for row in rows[1:]]
    with h5py.File(DATA / "avdigits" / "ave_h5" / "visual_feature.h5") as file:
        return file["avadataset"][names.index(name)]
