"""Fixtures that all tests share."""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

#: The GPUs that this machine shows: for test_gpu.py. All else computes on the CPU, which any number of ranks may share.
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
#: What a launcher around the tests would set, and a developer's own tracking server: not for tests.
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SLURM_", "MLFLOW_")
for _name in [name for name in os.environ if name.startswith(LAUNCHER)]:
    del os.environ[_name]

gc.disable()  # until all is imported: what that makes stays

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference vectors and real features that lies beside the checkout, where there is one."""
    if not SHARED.is_dir():
        if os.environ.get("CPSP_REQUIRE_SHARED"):
            pytest.fail("CPSP_REQUIRE_SHARED is set, but there is no ../shared")
        pytest.skip("needs ../shared (reference vectors, avdigits), which this machine lacks")
    return SHARED


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(**extra: str) -> dict[str, str]:
    """What a subprocess of a test runs in: no launcher's variables, one thread a rank, the repo importable."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER)}
    return env | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | extra


def loss_history(output: Path) -> list[dict[str, float]]:
    """The logged loss terms of a run, in order: {'loss/total': …}; to the last digit, to compare equal runs."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith("loss/")} for line in lines if "loss/total" in line]


def run_ranks(function: Callable[..., Any], world: int, tmp_path: Path, *args: Any, timeout: float = 120) -> list[Any]:
    """Call `function(*args)` (of a test module's top level) in `world` real gloo processes; results by rank.

    Inside, `torch.distributed` is initialised (also for one rank). Any failure or a passed limit ends all of them and
    fails the test with the output of the rank that failed.
    """
    torch.save({"module": function.__module__, "function": function.__name__, "args": args}, tmp_path / "call.pt")
    the_nursery().call(tmp_path, world).finish(timeout)
    return [torch.load(tmp_path / f"result{rank}.pt", weights_only=False) for rank in range(world)]


@functools.cache
def the_nursery() -> Any:
    """One for all tests of a process, made when first asked for."""
    from nursery import Nursery

    return Nursery(Path(tempfile.mkdtemp(prefix="nursery-")))


#: Files that take longest, longest first: begun last, one of them would keep a worker when all the others are done.
LONG = ["slurm", "launch_slurm", "crashes", "changing_ranks", "pool", "launchers", "avdigits", "reference", "training"]
LONG += ["launch", "demo", "dry_run", "checkpoint", "remote", "signals", "nonfinite", "packing_resume", "tracking"]


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


def pytest_configure() -> None:
    """Shells start background jobs with Ctrl-C ignored, which all that the tests start would inherit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores: the two files of Slurm come first, and mostly wait."""
    return (os.cpu_count() or 1) + 1


def pytest_sessionfinish() -> None:
    if the_nursery.cache_info().currsize:
        the_nursery().close()
        shutil.rmtree(the_nursery().folder, ignore_errors=True)


@pytest.fixture(scope="session")
def nursery() -> Any:
    """Starts the training command on any number of ranks in a fraction of a second: see nursery.py."""
    return the_nursery()


@pytest.fixture(scope="session")
def slurm(worker_id: str) -> Iterator[Any]:
    """A real Slurm cluster of 4 virtual nodes: see slurm_lab.py. Its users have this Python and this repository."""
    from slurm_lab import Lab, missing

    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
    if why := missing():
        if os.environ.get("CPSP_REQUIRE_SLURM"):
            pytest.fail(f"CPSP_REQUIRE_SLURM is set, but no cluster can run here: {why}")
        pytest.skip(f"no Slurm cluster can run here: {why}; `make slurm-up` installs one")
    port = 17200 + 50 * int(worker_id.removeprefix("gw") if worker_id != "master" else 0)
    # Not among pytest's folders, which are closed to others: munge wants its socket to be reachable.
    with tempfile.TemporaryDirectory(prefix="cpsp-slurm-") as folder:
        lab = Lab(Path(folder) / "lab", port, environment())
        os.chmod(folder, 0o755)
        try:
            lab.up(4)
            yield lab
        finally:
            lab.down()


@pytest.fixture(scope="session")
def keypad_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small keypad corpus in AVE's layout: 48 train, 16 val, 16 test videos."""
    from cpsp_dist.keypad import generate

    folder = tmp_path_factory.mktemp("keypad") / "features"
    generate(folder, {"train": 48, "val": 16, "test": 16}, seed=3)
    return folder


@pytest.fixture(scope="session")
def keypad_shards(keypad_features: Path) -> Path:
    """The same, packed by the command."""
    from cpsp_dist.cli import main

    out = keypad_features.parent / "shards"
    assert main(["shards", "pack", "--layout", "ave-h5", "--source", str(keypad_features), "--out", str(out)]) == 0
    return out


@pytest.fixture
def ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """`ranks(function, world, *args)`: see `run_ranks`. Each call gets a folder of its own."""
    count = iter(range(1000))

    def run(function: Callable[..., Any], world: int, *args: Any, timeout: float = 120) -> list[Any]:
        folder = tmp_path / f"ranks{next(count)}"
        folder.mkdir()
        return run_ranks(function, world, folder, *args, timeout=timeout)

    return run
