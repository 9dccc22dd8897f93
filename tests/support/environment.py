"""Where the tests run: the repository, the environment of subprocesses, free ports."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path

#: The GPUs that this machine shows: for test_gpu.py. All else computes on the CPU, which any number of ranks may share.
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")


#: What a launcher around the tests would set, and a developer's own tracking server: not for tests.
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SLURM_", "MLFLOW_")

#: Set by conftest.py where `-m short` selects, before the tests are imported: see examples.py.
SHORT = "CPSP_SHORT_TIER_ALONE"

REPO = Path(__file__).resolve().parents[2]
DATA = REPO / "tests" / "data"  # see its README


#: The ports of `free_port`: below 17100, where the Slurm lab's begin, 20000, where its jobs meet, and 32768, from which
#: on Linux gives connections theirs. Each worker of pytest has a part of its own.
PORTS = range(10_000, 16_400)
PART = len(PORTS) // 8


def worker_ports(worker: int) -> range:
    first = PORTS.start + worker % 8 * PART
    return range(first, first + PART)


def _ports() -> Iterator[int]:
    """From anywhere on: a session beside this one may use the same part."""
    ports = worker_ports(int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")))
    return itertools.islice(itertools.cycle(ports), os.getpid() % len(ports), None)


_next_ports = _ports()


def free_port() -> int:
    """One that stays free until somebody listens there who was given it. Those that Linux chooses do not: the next
    connection of any process may have it for its own end."""
    for port in itertools.islice(_next_ports, PART):
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("", port))
            return port
    raise AssertionError("no port of this worker is free")


def listen_at(path: Path) -> socket.socket:
    """A Unix socket."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()
    return listening


def environment(**extra: str) -> dict[str, str]:
    """What a subprocess of a test runs in: no launcher's variables, one thread a rank, the repo importable."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER)}
    return env | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | extra
