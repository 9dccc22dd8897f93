"""The import of MLflow, which takes seconds."""

from __future__ import annotations

import contextlib


def import_mlflow(uri: str) -> None:
    """Import the library and what it needs for the store at `uri`; it holds up all other threads meanwhile."""
    with contextlib.suppress(Exception):  # the first use reports it
        import mlflow

        if uri.startswith("sqlite"):
            import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
