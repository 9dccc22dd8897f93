"""Small shards, and servers of shards."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cpsp_dist.data import fetch as fetch_module
from cpsp_dist.data.cache import Cache
from cpsp_dist.data.manifest import Manifest
from tests.support.remote import PIECE
from tests.support.servers import AiohttpServer, Nginx, Site, nginx_binary
from tests.support.tiny_shards import Written, write_shards


@pytest.fixture(scope="session")
def www(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all servers serve."""
    return tmp_path_factory.mktemp("www")


@pytest.fixture(scope="session")
def served(www: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Eight shards of nine samples (about 45 kB each) for training and three for val, served at /tiny."""
    written = write_shards(tmp_path_factory.mktemp("tiny") / "shards", {"train": [9] * 8, "val": [5, 6, 7]})
    shutil.copytree(written.folder, www / "tiny")
    return written


@pytest.fixture(scope="session", params=["aiohttp", "nginx"])
def site(request: pytest.FixtureRequest, www: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Each server in turn: what is read must not depend on whose it is."""
    server: Site
    if request.param == "nginx":
        server = Nginx(nginx_binary(), www, tmp_path_factory.mktemp("nginx") / "work")
    else:
        server = AiohttpServer(www)
    yield server
    server.stop()


@pytest.fixture
def front(www: Path, served: Written, quick: None) -> Iterator[AiohttpServer]:
    """A server that fails on request."""
    server = AiohttpServer(www)
    yield server
    server.stop()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quick retries and small pieces, so that a shard takes a few requests."""
    monkeypatch.setattr(fetch_module, "PIECE", PIECE)
    monkeypatch.setattr(fetch_module, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(fetch_module, "LONGEST_WAIT", 0.01)


@pytest.fixture
def remote(front: AiohttpServer, tmp_path: Path) -> Manifest:
    return Manifest.load(f"{front.url}/tiny", Cache(tmp_path / "cache"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Written]:
    """Shards by their sizes, written once: `folders(train=[5, 7], val=[3])`."""
    made: dict[str, Written] = {}

    def get(**splits: list[int]) -> Written:
        name = "-".join([split + "_".join(map(str, sizes)) for split, sizes in splits.items()])
        if name not in made:
            made[name] = write_shards(tmp_path_factory.mktemp("shards") / name, splits)
        return made[name]

    return get


@pytest.fixture
def written(folders: Callable[..., Written]) -> Written:
    """22 samples for training, in four shards."""
    return folders(train=[5, 7, 1, 9], val=[3, 4])


@pytest.fixture
def copied(written: Written, tmp_path: Path) -> Written:
    """The same in a folder of its own, to be damaged."""
    shutil.copytree(written.folder, tmp_path / "shards")
    return replace(written, folder=tmp_path / "shards")
