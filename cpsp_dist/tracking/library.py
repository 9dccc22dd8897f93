"""The import of MLflow, which takes seconds, and a client of it for SQLite."""

from __future__ import annotations

import contextlib
from typing import Any


def import_mlflow(uri: str) -> None:
    """Import the library and what it needs for the store at `uri`; it holds up all other threads meanwhile."""
    with contextlib.suppress(Exception):  # the first use reports it
        import mlflow

        if uri.startswith("sqlite"):
            import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


def new_sqlite_client(uri: str, artifacts: str) -> Any:
    """A client of the SQLite file at `uri`, whose artifacts lie at the `file:` URI `artifacts` where mlflow's default
    experiment is still to be made.

    mlflow alone takes the working directory and writes its path into SQL as Python's repr: quotes of both kinds, or
    `:name` behind a space, make that statement invalid, and a backslash is doubled. A URI has none of these characters.
    """
    import mlflow
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with contextlib.suppress(mlflow.MlflowException):  # the client, which does the same, reports it
        SqlAlchemyStore(uri, artifacts)
    return mlflow.MlflowClient(tracking_uri=uri)
