"""Which version of this program's sources a run was started from."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git_state() -> dict[str, str]:
    """Commit of this program's checkout and whether it has changes; nothing where there is no git."""
    try:
        top = Path(__file__).resolve().parents[2]
        run = {"capture_output": True, "text": True, "timeout": 10, "check": True, "cwd": top}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()  # type: ignore[call-overload]
        changed = subprocess.run(["git", "status", "--porcelain"], **run).stdout.strip()  # type: ignore[call-overload]
        return {"git.commit": commit, "git.changed": str(bool(changed)).lower()}
    except (OSError, subprocess.SubprocessError):
        return {}
