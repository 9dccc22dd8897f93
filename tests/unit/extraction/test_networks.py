"""The encoders that are networks: their numbers, from weights in the forms of their publishers' files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from cpsp_dist.extraction.encoders import build_encoder
from tests.support import encoder_reference as reference


def write_keras(path: Path, weights: dict[str, np.ndarray]) -> None:
    """As `save_weights` of Keras 1 and 2 writes an .h5 file: a group for each layer, also those without weights."""
    layers = ["input_1", *dict.fromkeys(name.split("/")[0] for name in weights), "block5_pool"]
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        for layer in layers:
            own = {name.split("/")[1]: value for name, value in weights.items() if name.split("/")[0] == layer}
            names = {"kernel": f"{layer}_W_1:0", "bias": f"{layer}_b_1:0"}
            group = file.create_group(layer)
            group.attrs["weight_names"] = [names[kind].encode() for kind in own]
            for kind, value in own.items():
                group[names[kind]] = value


def write_torchvision(path: Path, weights: dict[str, np.ndarray], *, legacy: bool = False) -> None:
    """The state dict of torchvision's vgg19, with a classifier; its own file has the form before torch 1.6."""
    state, index = {}, 0
    for block, count in enumerate((2, 2, 4, 4, 4), 1):
        for layer in range(1, count + 1):
            kernel = weights[f"block{block}_conv{layer}/kernel"]
            state[f"features.{index}.weight"] = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
            state[f"features.{index}.bias"] = torch.from_numpy(weights[f"block{block}_conv{layer}/bias"])
            index += 2
        index += 1
    state["classifier.0.weight"] = torch.ones(2, 2)
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)


@pytest.fixture(scope="module")
def vgg19_weights() -> dict[str, np.ndarray]:
    """`LAYER/kernel` (height, width, in, out) and `LAYER/bias`."""
    shapes = reference.meta()["vgg19"]["layers"]
    return {
        f"{layer}/{kind}": reference.weight(f"vgg19/{layer}/{kind}", shape)
        for layer, both in shapes.items()
        for kind, shape in zip(("kernel", "bias"), both, strict=True)
    }


def is_close(found: np.ndarray, expected: np.ndarray) -> bool:
    """To 1e-4 of each value, or, where sums cancel, of the typical value."""
    return bool((np.abs(found - expected) <= 1e-4 * np.maximum(np.abs(expected), np.abs(expected).mean())).all())


@pytest.mark.parametrize("form", ["caffe", pytest.param("torchvision", marks=pytest.mark.long)])
def test_vgg19_is_the_published_network(form: str, vgg19_weights: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Each form of file brings its normalisation. The rows do not depend on what is encoded with them."""
    path = tmp_path / "weights"
    write_keras(path, vgg19_weights) if form == "caffe" else write_torchvision(path, vgg19_weights, legacy=True)
    encoder = build_encoder("vgg19", path)
    found, expected = encoder(reference.images()), reference.vectors()[f"vgg19_{form}"]
    assert found.dtype == np.float32
    assert found.shape == expected.shape == (2, 7, 7, 512)
    assert is_close(found, expected)
    assert (encoder.frames_per_segment, encoder.size, encoder.crop) == (16, (224, 224), False)
    identity = json.loads(json.dumps(encoder.identity()))
    assert identity["weights_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert identity["preprocessing"]["bgr"] == (form == "caffe")
    assert identity["preprocessing"]["mean"] == (
        [103.939, 116.779, 123.68] if form == "caffe" else [0.485, 0.456, 0.406]
    )


@pytest.mark.long
def test_vggish_is_the_published_network(tmp_path: Path) -> None:
    shapes = reference.meta()["vggish"]
    path = tmp_path / "vggish.pth"
    torch.save({name: torch.from_numpy(reference.weight(f"vggish/{name}", shapes[name])) for name in shapes}, path)
    encoder = build_encoder("vggish", path)
    found, expected = encoder(reference.seconds()), reference.vectors()["vggish"]
    assert (found.shape, found.dtype) == ((3, 128), np.float32)
    assert is_close(found, expected)
    assert (encoder(reference.seconds()[1:2]) == found[1]).all(), "each second is computed alone"
    two = encoder(reference.seconds()[:2].reshape(1, -1))
    np.testing.assert_allclose(two[0], found[:2].mean(0), rtol=1e-5, err_msg="longer segments are averages")
