"""Weights: fetched once and checked, read as data, and refused in one line."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cpsp_dist.data import fetch
from cpsp_dist.extraction.encoders import ENCODERS, build_encoder
from cpsp_dist.extraction.tensors import load_into, read_tensors
from cpsp_dist.extraction.weights import PublishedWeights
from cpsp_dist.utils.errors import UserError
from tests.support.environment import free_port
from tests.support.servers import AiohttpServer

CONTENT = os.urandom(50_000)
SHA256, MD5 = hashlib.sha256(CONTENT).hexdigest(), hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AiohttpServer]:
    monkeypatch.setenv("CPSP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(fetch, "PIECE", 16384)
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "net.pth").write_bytes(CONTENT)
    server = AiohttpServer(tmp_path / "www")
    yield server
    server.stop()


@pytest.mark.parametrize("hashes", [{"sha256": SHA256}, {"sha256": SHA256[:8]}, {"md5": MD5}, {}])
def test_fetched_once_to_the_cache(site: AiohttpServer, tmp_path: Path, hashes: dict[str, str]) -> None:
    published = PublishedWeights(f"{site.url}/net.pth", **hashes)
    path, sha256 = published.obtain()
    assert (path, sha256) == (tmp_path / "cache" / "weights" / "net.pth", SHA256)
    assert path.read_bytes() == CONTENT
    assert [each.name for each in path.parent.iterdir()] == ["net.pth"]
    seen = len(site.requests)
    assert published.obtain() == (path, sha256)
    assert len(site.requests) == seen


def test_an_interrupted_fetch_continues(site: AiohttpServer) -> None:
    published = PublishedWeights(f"{site.url}/net.pth", sha256=SHA256)
    published.path().parent.mkdir(parents=True)
    (published.path().parent / ".net.pth.part").write_bytes(CONTENT[:20_000])
    assert published.obtain()[0].read_bytes() == CONTENT
    assert min(first for first, end in site.ranges("net.pth") if end > 0) == 20_000


def test_other_content_is_refused(site: AiohttpServer) -> None:
    """Where it is fetched, and where it lies in the cache already."""
    published = PublishedWeights(f"{site.url}/net.pth", sha256="0" * 8)
    with pytest.raises(UserError, match=r"net\.pth: not the published file \(0\.1 MB, its hash differs\)"):
        published.obtain()
    assert not published.path().exists()
    published.path().write_bytes(CONTENT)
    with pytest.raises(UserError, match=r"net\.pth: not the file at http.* delete it and start again"):
        published.obtain()


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line names the file's URL and where to put it."""
    monkeypatch.setenv("CPSP_CACHE", str(tmp_path))
    monkeypatch.setattr(fetch, "FIRST_WAIT", 0.001)
    url = f"http://127.0.0.1:{free_port()}/vgg19.pth"
    with pytest.raises(UserError) as caught:
        PublishedWeights(url).obtain()
    assert str(caught.value).startswith(f"{url}: ClientConnectorError (Cannot connect to host 127.0.0.1")
    assert "2 times in a row" in str(caught.value), "soon: there may be no network at all"
    place = f"{tmp_path}/weights/vgg19.pth (or give it with --visual-weights, --audio-weights)"
    assert str(caught.value).endswith(f"; or fetch it elsewhere and put it there: {place}")
    (tmp_path / "file").touch()
    monkeypatch.setenv("CPSP_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"vgg19\.pth: cannot be written \(.*\); set CPSP_CACHE to another folder"):
        PublishedWeights(url).obtain()


@pytest.mark.parametrize(("name", "flag"), [("clip", "--visual-weights"), ("clap", "--audio-weights")])
def test_folders_of_weights_that_are_missing(name: str, flag: str) -> None:
    """The line names the files, where they are, and the flag."""
    with pytest.raises(UserError) as caught:
        build_encoder(name)
    assert str(caught.value).startswith(f"the encoder {name} needs a folder of weights: put config.json and model.safe")
    assert str(caught.value).endswith(f" into one, and give it with {flag}")


def test_published_files_are_checked() -> None:
    """By complete hashes, or by the first digits that torch writes into the name."""
    for name in ("vgg19", "resnet", "vggish"):
        published: PublishedWeights = ENCODERS[name].published  # type: ignore[attr-defined]
        assert published.url.startswith("https://")
        assert published.sha256 or published.md5
        if not published.md5:
            assert published.name.removesuffix(".pth").endswith(published.sha256[:8])


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch run-as-code",)


def write(kind: str, path: Path) -> None:
    """A file that is no weights of VGG-19."""
    good = {"features.0.weight": torch.zeros(64, 3, 3, 3), "features.0.bias": torch.zeros(64)}
    if kind == "code":
        torch.save({"features.0.weight": Malice()}, path)
    elif kind == "old code":
        torch.save(Malice(), path, _use_new_zipfile_serialization=False)
    elif kind == "text":
        path.write_text("<html>not found</html>")
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "another network":
        torch.save({"conv1.weight": torch.ones(2)}, path)
    elif kind == "a list":
        torch.save([torch.ones(2)], path)
    elif kind == "another shape":
        save_file(good | {"features.0.weight": torch.zeros(64, 1, 3, 3)}, path)
    elif kind == "not finite":
        save_file(good | {"features.0.weight": torch.full((64, 3, 3, 3), float("nan"))}, path)
    elif kind == "link":
        with h5py.File(path, "w") as file:
            file.create_group("block1_conv1")["kernel"] = h5py.ExternalLink("/etc/passwd", "/x")
    elif kind.startswith("cut "):
        if kind == "cut h5":
            with h5py.File(path, "w") as file:
                file["block1_conv1/kernel"] = np.zeros((3, 3, 3, 64))
        elif kind == "cut safetensors":
            save_file(good, path)
        else:
            torch.save(good, path, _use_new_zipfile_serialization=kind == "cut zip")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("code", "not readable as PyTorch weights (it holds more than tensors)"),
        ("old code", "not readable as PyTorch weights (it holds more than tensors)"),
        ("text", "not a file of weights (PyTorch's .pth, Keras' .h5 or .safetensors)"),
        ("empty", "not a file of weights"),
        ("folder", "is a folder, not a file"),
        ("missing", "cannot be read (No such file or directory)"),
        ("another network", "not weights of VGG-19: no 'features.0.weight' in it; there are 'conv1.weight', …"),
        ("a list", "holds list, not named tensors"),
        ("another shape", "not weights of VGG-19: 'features.0.weight' has shape [64, 1, 3, 3], not [64, 3, 3, 3]"),
        ("not finite", "'features.0.weight' holds a value that is not finite"),
        ("link", "not weights of VGG-19: no 'features.0.weight' in it; there are nothing"),
        ("cut h5", "not a readable HDF5 file, or cut short"),
        ("cut safetensors", "a damaged .safetensors file"),
        ("cut zip", "not readable as PyTorch weights"),
        ("cut pickle", "not readable as PyTorch weights"),
    ],
)
def test_other_files_are_one_line(kind: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.file"
    write(kind, path)
    with pytest.raises(UserError) as caught:
        build_encoder("vgg19", path)
    assert str(caught.value).startswith(f"{path}: ")
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run-as-code").exists()


def test_forms_of_a_state_dict(tmp_path: Path) -> None:
    """As trainers save it: inside a checkpoint, with DDP's prefix, beside other things; and as safetensors."""
    network = nn.Linear(2, 3)
    wanted = {name: value.clone() for name, value in network.state_dict().items()}
    prefixed = {f"module.{name}": value for name, value in wanted.items()}
    torch.save({"state_dict": prefixed, "epoch": 3}, tmp_path / "a")
    save_file(wanted | {"classifier": torch.ones(1)}, tmp_path / "b")
    for name in ("a", "b"):
        other = nn.Linear(2, 3)
        load_into(other, read_tensors(tmp_path / name), tmp_path / name, "it")
        assert all(torch.equal(value, wanted[key]) for key, value in other.state_dict().items())
