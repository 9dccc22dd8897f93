"""Features whose libraries only an extra of the package installs."""

from __future__ import annotations

from importlib.util import find_spec

from cpsp_dist.utils.errors import UserError


def require(module: str, extra: str, feature: str) -> None:
    """Raises UserError, which names `extra`, where `module` is not installed."""
    if find_spec(module) is None:
        raise UserError(f"{feature} needs {module}, which the extra '{extra}' brings: pip install 'cpsp-dist[{extra}]'")
