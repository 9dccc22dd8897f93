"""What tests of `cpsp-dist launch` share: the command itself, commands of Slurm that are pretended, a short run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.environment import REPO, environment

QUICK = ["train.steps=3", "tracking.every_steps=1"]


def launch(*arguments: str, timeout: float = 180, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cpsp_dist", "launch", *arguments]
    return subprocess.run(
        command, env=environment(**env), cwd=REPO, capture_output=True, text=True, errors="replace", timeout=timeout
    )


def stub(folder: Path, name: str, script: str) -> None:
    """A command of that name for a PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)
