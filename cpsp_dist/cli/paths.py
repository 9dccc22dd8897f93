"""Paths on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpsp_dist.utils import urls


def local_path(text: str) -> Path:
    """The `type` of each flag that takes a file or folder of this machine, and no URL."""
    try:
        return urls.local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
