"""Real clips: the features that the data set stores for them are found again, up to what the codec lost."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest

from cpsp_dist.extraction.encoders import build_encoder
from cpsp_dist.extraction.features import clip_features, clip_form
from cpsp_dist.extraction.video import read_clip
from tests.support.environment import DATA

CLIPS = DATA / "avdigits" / "clips"
#: One of 16 frames a second, square; one of 29.97, wider than high; ten more of 16, 25, 29.97 and 30.
SHORT = ("ZC7YG_ZfJw8", "_GbcKGONUj0")
LONG = ("_Ulk3vPhqD0", "-dd_6mgsO1o", "_0sUgdq3_bk", "_7d3y6XSVHQ", "aRSTGJk_KxM", "_Vd0fF8QIkQ", "-gJosJZ21MU")
LONG += ("-nnWSofXrpM", "-pDifqXtGpY", "1x068UnS6dE")


@pytest.mark.parametrize("name", [*SHORT, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
def test_stored_features(name: str) -> None:
    visual, audio = build_encoder("efficientnet-lite0"), build_encoder("logmel")
    clip = read_clip(CLIPS / f"{name}.mp4", clip_form(visual, audio))
    found, sound = clip_features(clip, visual, audio)
    assert (found.shape, sound.shape) == ((10, 7, 7, 192), (10, 512))
    expected = stored(name).astype("f4")
    cosine = (found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected)
    assert cosine > 0.88
    assert str(visual.identity()["weights_sha256"]).startswith("57934424"), "as the file's name says"


def stored(name: str) -> np.ndarray:
    names = [label["video_id"] for label in json.loads((CLIPS / "labels.json").read_text())]
    assert {*names} == {*SHORT, *LONG}
    with h5py.File(CLIPS / "visual_feature.h5") as file:
        return file["avadataset"][names.index(name)]
