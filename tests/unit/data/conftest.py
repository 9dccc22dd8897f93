"""Servers of shards, and what they serve."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
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
