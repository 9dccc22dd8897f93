"""Each worker of pytest rewrites the assertions of a share of the test files before all of them import every file.

What pytest makes of a file it keeps beside it. In a fresh clone every worker would make it of every file, for 5 CPU
seconds, because all of them begin together.
"""

from __future__ import annotations

import sys

import pytest
from _pytest.assertion import rewrite

from tests.support.environment import REPO


def rewrite_share(config: pytest.Config, number: int, workers: int) -> None:
    """Of worker `number`; as `AssertionRewritingHook.exec_module` does it, without running the file."""
    if sys.dont_write_bytecode:
        return
    for path in sorted((REPO / "tests").rglob("test_*.py"))[number::workers]:
        folder = rewrite.get_cache_dir(path)
        kept = folder / f"{path.stem}{rewrite.PYC_TAIL}"
        if rewrite._read_pyc(path, kept) is None and rewrite.try_makedirs(folder):
            source, code = rewrite._rewrite_test(path, config)
            rewrite._write_pyc(config.stash[rewrite.assertstate_key], code, source, kept)
