"""A decoding process that fails: imports nothing heavy, for it is started several times."""

from __future__ import annotations

import os
import threading


def serve_badly(connection, form):
    """Instead of a decoder's: ends, or does not answer, by the file's name."""
    while True:
        try:
            path, _ = connection.recv()
        except (EOFError, OSError):
            return
        if path.stem == "always":
            os._exit(3)
        if path.stem == "forever":
            threading.Event().wait()
        if path.stem == "once":
            mark = path.with_suffix(".mark")
            if not mark.exists():
                mark.touch()
                os._exit(4)
            connection.send((None, "second time", 0.0))
        else:
            connection.send((None, "well", 0.0))
