"""Which version of this program's sources a run was started from."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git_state() -> dict[str, str]:
    """Commit of this program's checkout and whether it has changes; nothing where there is no git."""
    try:
        commit, changed = _git("rev-parse", "HEAD"), bool(_git("status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):  # no git, no checkout: an installed package
        return {}
    return {"git.commit": commit, "git.changed": str(changed).lower()}


def _git(*arguments: str) -> str:
    top = Path(__file__).resolve().parents[2]
    done = subprocess.run(["git", *arguments], cwd=top, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
