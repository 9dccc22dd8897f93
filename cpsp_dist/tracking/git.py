"""Which version of this program's sources a run was started from."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

from cpsp_dist.utils.redact import url_without_secrets


def git_state() -> dict[str, str]:
    """Commit of this program's checkout and whether it has changes; nothing where there is no git."""
    try:
        commit, changed = _git("rev-parse", "HEAD"), bool(_git("status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):  # no git, no checkout: an installed package
        return {}
    return {"git.commit": commit, "git.changed": str(changed).lower()}


def git_source() -> dict[str, str]:
    """The same as MLflow's own tags have it, with branch and origin where there are any."""
    found = {}
    for tag, arguments in {
        "mlflow.source.git.commit": ("rev-parse", "HEAD"),
        "mlflow.source.git.branch": ("symbolic-ref", "--short", "HEAD"),
        "mlflow.source.git.repoURL": ("remote", "get-url", "origin"),
    }.items():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            found[tag] = url_without_secrets(_git(*arguments))
    return found


def _git(*arguments: str) -> str:
    top = Path(__file__).resolve().parents[2]
    # Without locks: a training that is killed here would leave `index.lock`, and git refuse its user's next command.
    command = ["git", "--no-optional-locks", *arguments]
    done = subprocess.run(command, cwd=top, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
