"""The encoders: their interface, and the numbers of those that need no weights."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest

from cpsp_dist.extraction.clip import Clip
from cpsp_dist.extraction.encoders import ENCODERS, build_encoder, encoders_of
from cpsp_dist.extraction.encoders.encoder import VisualEncoder
from cpsp_dist.extraction.encoders.mel import log_mel
from cpsp_dist.extraction.features import clip_features, clip_form
from cpsp_dist.utils.errors import UserError
from tests.support import encoder_reference


def test_the_table() -> None:
    assert encoders_of("visual") + encoders_of("audio") == sorted(ENCODERS, key=lambda n: n in encoders_of("audio"))
    for name, encoder in ENCODERS.items():
        assert encoder.name == name
        assert name in encoders_of(encoder.modality)
    with pytest.raises(UserError, match="no encoder named 'vgg'; there are "):
        build_encoder("vgg")
    with pytest.raises(UserError, match="encoder logmel: float16 needs a GPU"):
        build_encoder("logmel", precision="float16")


class Sixteen(VisualEncoder):
    name = "sixteen"

    def __call__(self, frames):
        return frames.astype("f4")


class Middle(Sixteen):
    frames_per_segment = 1


@pytest.mark.parametrize("frames", [160, 250, 299, 300, 601])
def test_the_published_frame_indices(frames: int) -> None:
    n = frames // 10
    assert Sixteen(None, "cpu").frame_indices(frames, 10) == [
        [int(second * n + i / 16 * n) for i in range(16)] for second in range(10)
    ]
    middles = [int((second + Fraction(1, 2)) * Fraction(frames, 10)) for second in range(10)]
    assert Middle(None, "cpu").frame_indices(frames, 10) == [[middle] for middle in middles]
    with pytest.raises(ValueError, match="9 frames are fewer than 10 segments"):
        Middle(None, "cpu").frame_indices(9, 10)


def test_log_mel_is_that_of_the_published_code() -> None:
    expected = encoder_reference.vectors()["log_mel"]
    assert np.abs(log_mel(encoder_reference.seconds()) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_logmel_averages_eighths_of_a_second() -> None:
    encoder = build_encoder("logmel")
    seconds = encoder_reference.seconds()
    features = encoder(seconds)
    assert (features.shape, features.dtype) == ((3, 512), np.float32)
    expected = encoder_reference.vectors()["log_mel"].reshape(3, 8, 12, 64).mean(2).reshape(3, 512)
    np.testing.assert_allclose(features, expected - expected.mean(), rtol=1e-4, atol=1e-4)


def test_logmel_does_not_depend_on_the_volume() -> None:
    """But for the offset below the logarithm; in a clip that is louder in one second, that second stays louder."""
    encoder, noise = build_encoder("logmel"), np.random.default_rng(0).normal(0, 0.2, (3, 16000)).astype("f4")
    loud = noise * np.array([[1], [5], [1]], "f4")
    np.testing.assert_allclose(encoder(loud / 4), encoder(loud), atol=0.05)
    assert encoder(loud)[1].mean() > 1


def test_segments_of_other_lengths() -> None:
    """A short one gets silence, a long one is the mean of its seconds."""
    encoder = build_encoder("logmel")
    sound = encoder_reference.seconds()
    short = sound[:, :15100]  # 94 windows: what a clip of 9.96 s leaves
    padded = np.concatenate([short, np.zeros((3, 900), "f4")], 1)
    assert (encoder(short) == encoder(padded)).all()
    both = np.concatenate([sound[:1], sound[1:2]], 1)
    np.testing.assert_allclose(encoder(both), encoder(sound[:2]).mean(0, keepdims=True), rtol=1e-5, atol=1e-5)
    assert encoder.seconds(both[:, :24000]).tolist() == [[both[0, :16000].tolist(), both[0, 8000:24000].tolist()]]


def test_identities_are_json() -> None:
    identity = build_encoder("logmel").identity()
    assert identity == json.loads(json.dumps(identity))
    assert (identity["name"], identity["weights_sha256"]) == ("logmel", None)
    assert identity["preprocessing"]["mel_hz"] == [125.0, 7500.0]


@pytest.mark.parametrize("device", ["foo", "cuda", "cuda:x", "meta"])
def test_a_device_that_is_not_there_is_one_line(device: str) -> None:
    """The tests see no GPU."""
    with pytest.raises(UserError, match=f"^--device {device}: .*"):
        build_encoder("logmel", None, device)


class Complete(Middle):
    size = (8, 8)

    def __call__(self, frames):
        return frames.reshape(len(frames), -1)[:, :5].astype("f4")


def test_vectors_of_complete_pictures_stay_vectors() -> None:
    visual, audio = Complete(None, "cpu"), build_encoder("logmel")
    form = clip_form(visual, audio, segments=3)
    frames = np.arange(3 * 8 * 8 * 3).astype(np.uint8).reshape(3, 8, 8, 3)
    clip = Clip(form, frames, np.zeros(3 * audio.sample_rate, np.float32), fps=1.0, count=3)
    assert np.array_equal(clip_features(clip, visual, audio)[0], frames.reshape(3, -1)[:, :5])
