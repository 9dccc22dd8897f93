"""What makes the bare run of .ci/run fail is caught: a file above the clone, a rank or a test that skips."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import only_clone
from tests.support.environment import DATA, REPO, environment
from tests.support.skips import COMMANDS, is_allowed

START = "import sys; sys.path.insert(0, {folder!r}); import only_clone; sys.path.pop(0); "
START += "only_clone.activate([{clone!r}], {record!r}); "


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that may be read; beside it lies a file that may not."""
    folder = tmp_path / "clone"
    folder.mkdir()
    (folder / "inside.txt").write_text("fine")
    (tmp_path / "above.txt").write_text("not fine")
    (folder / "link.txt").symlink_to(tmp_path / "above.txt")
    return folder


def attempt(clone: Path, code: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run `code` in a guarded process, in the clone; what it did, and the record."""
    record = clone.parent / "record"
    allowed = {"folder": str(Path(only_clone.__file__).parent), "clone": str(clone), "record": str(record)}
    # The environment's packages are allowed, as they are where it lies in the clone.
    done = subprocess.run(
        [sys.executable, "-c", START.format(**allowed) + code],
        env=environment(HOME=str(clone)),
        cwd=clone,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done, record.read_text() if record.exists() else ""


@pytest.mark.parametrize(
    "code",
    [
        "open('../above.txt')",
        "open('link.txt')",
        "import os; os.listdir('..')",
        "import pathlib; list(pathlib.Path('..').iterdir())",
        "import sqlite3; sqlite3.connect('../above.txt')",
        "import os, subprocess; subprocess.run(['cat', os.path.abspath('../above.txt')])",
        "import h5py; h5py.File('../above.txt')",
        "from safetensors.torch import load_file; load_file('../above.txt')",
        "import os; os.fork() or open('../above.txt')",
        "import contextlib\nwith contextlib.suppress(OSError): open('../above.txt')",
    ],
)
def test_what_lies_above_the_clone_is_refused_and_recorded(clone: Path, code: str) -> None:
    done, record = attempt(clone, code)
    assert f": {clone.parent}" in record, done.stderr
    if "suppress" not in code and "fork" not in code:
        assert done.returncode == 1
        assert "lies outside of the clone" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "code",
    [
        "assert open('inside.txt').read() == 'fine'",
        "import os; os.listdir('.'); os.scandir(os.open('.', 0)); open('/proc/self/status'); open(os.devnull)",
        "import sqlite3; sqlite3.connect(':memory:'); sqlite3.connect('new.db').execute('create table t (x)')",
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import json'], check=True)",
        "import h5py; h5py.File('new.h5', 'w')['x'] = 1",
        "import os; assert os.path.exists('../above.txt')",
    ],
)
def test_what_lies_in_the_clone_or_the_system_may_be_read(clone: Path, code: str) -> None:
    done, record = attempt(clone, code)
    assert (done.returncode, record) == (0, ""), done.stderr


def skips() -> None:
    pytest.skip("nothing here")


@pytest.mark.long
def test_a_rank_that_skips_fails_with_the_cause(ranks) -> None:
    with pytest.raises(AssertionError, match=r"AssertionError: rank \d raised Skipped: nothing here"):
        ranks(skips, 2)


PLANTED = """
import pytest
from tests.support.skips import skip

def test_needs_srun():
    pytest.skip("needs srun")

def test_needs_slurm():
    skip("Slurm", "no srun here")

@pytest.mark.xfail(strict=True)
def test_known():
    assert 0

@pytest.mark.skipif(True, reason="not on Fridays")
def test_marked():
    pass
"""


@pytest.mark.long
def test_only_slurm_nginx_and_a_gpu_may_be_missing(tmp_path: Path) -> None:
    """In a suite of its own with the hooks that this one has, over two workers."""
    (tmp_path / "test_planted.py").write_text(PLANTED)
    (tmp_path / "test_module.py").write_text("import pytest; pytest.importorskip('no_such_module')\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.skips", "-q", "-rfE", "-n", "2", "--rootdir", "."]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "."],
        env={k: v for k, v in environment().items() if not k.startswith("CPSP_REQUIRE_")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 skipped, 1 xfailed, 2 errors" in done.stdout, done.stdout
    assert "FAILED test_planted.py::test_needs_srun - Skipped: needs srun" in done.stdout
    assert "ERROR test_planted.py::test_marked - Skipped: not on Fridays" in done.stdout
    assert "ERROR test_module.py - Skipped: could not import 'no_such_module'" in done.stdout
    assert "Only what needs Slurm, nginx, a GPU, Chromium may skip" in done.stdout


def test_what_is_required_is_no_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.skips import skip

    for needed, name in (("Slurm", "SLURM"), ("nginx", "NGINX"), ("a GPU", "GPU")):
        monkeypatch.delenv(f"CPSP_REQUIRE_{name}", raising=False)
        with pytest.raises(pytest.skip.Exception) as skipped:
            skip(needed, "not here")
        assert is_allowed(str(skipped.value))
        assert COMMANDS[needed] in str(skipped.value)
        monkeypatch.setenv(f"CPSP_REQUIRE_{name}", "1")
        with pytest.raises(pytest.fail.Exception, match=f"CPSP_REQUIRE_{name} is set"):
            skip(needed, "not here")
    assert not is_allowed("needs srun")


def test_the_data_of_the_tests_is_small() -> None:
    """Real features in both layouts with two clips; and ten more clips with theirs, to extract these again."""
    paths = [path for path in (DATA / "avdigits").rglob("*") if path.is_file()]
    more = {p for p in paths if p.parent.name == "clips" and p.stem not in ("ZC7YG_ZfJw8", "_GbcKGONUj0", "labels")}
    assert sum(path.stat().st_size for path in {*paths} - more) <= 6_000_000
    assert sum(path.stat().st_size for path in more) <= 6_000_000
    assert (REPO / "tests/data/README.md").is_file()
