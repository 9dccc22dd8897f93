"""Where the tests run: the repository, the environment of subprocesses, free ports."""

from __future__ import annotations

import os
import socket
from pathlib import Path

#: The GPUs that this machine shows: for test_gpu.py. All else computes on the CPU, which any number of ranks may share.
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")


#: What a launcher around the tests would set, and a developer's own tracking server: not for tests.
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SLURM_", "MLFLOW_")

#: Set by conftest.py where `-m short` selects, before the tests are imported: see examples.py.
SHORT = "CPSP_SHORT_TIER_ALONE"

REPO = Path(__file__).resolve().parents[2]
DATA = REPO / "tests" / "data"  # see its README


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


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
