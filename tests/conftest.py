"""Fixtures that all tests share."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.environment import LAUNCHER, SHORT, environment
from tests.support.prefork import SHARED, own_prefork, prefork_launcher
from tests.support.rewriting import rewrite_share
from tests.support.skips import pytest_make_collect_report, pytest_runtest_makereport, skip  # noqa: F401, the hooks work here

os.environ["CUDA_VISIBLE_DEVICES"] = ""
for _name in [name for name in os.environ if name.startswith(LAUNCHER)]:
    del os.environ[_name]

gc.disable()  # until all is imported: what that makes stays

#: Files that take longest, longest first: begun last, one of them would keep a worker when all the others are done.
LONG = ["slurm", "launch_slurm", "training", "crashes", "changing_ranks", "pool", "launchers", "signals", "reference"]
LONG += ["models_under_engines", "demo", "launch_local", "sweep", "avdigits", "tracking", "lost_stores", "losses"]
LONG += ["checkpoint", "engine", "python_api", "export", "installed", "corruption", "s3", "nonfinite", "dry_run"]
LONG += ["remote", "reader", "packing_resume", "doctor", "extract", "extract_shards", "run_page"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    if worker := getattr(session.config, "workerinput", None):
        rewrite_share(session.config, int(worker["workerid"].removeprefix("gw")), worker["workercount"])


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
    for item in items:
        put_into_tier(item)


def put_into_tier(item: pytest.Item) -> None:
    """Long is what is marked so, measures time or needs Slurm; all else is short."""
    long = item.get_closest_marker("timing") or "slurm" in getattr(item, "fixturenames", ())
    if item.get_closest_marker("short"):
        raise pytest.UsageError(f"{item.nodeid}: `short` is what is not marked `long`; leave the mark out")
    if not item.get_closest_marker("long"):
        item.add_marker("long" if long else "short")


def pytest_configure(config: pytest.Config) -> None:
    """Shells start background jobs with Ctrl-C ignored, which all that the tests start would inherit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("markexpr") == "short":
        os.environ[SHORT] = "1"
    if getattr(config.option, "numprocesses", 0) and not hasattr(config, "workerinput"):
        os.environ[SHARED] = str(own_prefork().folder)  # for all workers


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than cores: with a worker for each, two cores were idle for 18 % of the short tier, whose tests wait."""
    return len(os.sched_getaffinity(0)) + 1


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest's own, which ends with the reasons
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """The names of what failed, last: where a log is cut to its end, one reason may be all that is left."""
    yield
    for report in [*terminalreporter.stats.get("failed", []), *terminalreporter.stats.get("error", [])][:20]:
        terminalreporter.write_line(f"failed: {report.nodeid}")


def pytest_sessionfinish() -> None:
    for made in (prefork_launcher, own_prefork):
        if made.cache_info().currsize:
            made().close()


@pytest.fixture(scope="session")
def prefork() -> Any:
    """Starts the training command on any number of ranks in a fraction of a second: see prefork.py."""
    return prefork_launcher()


@pytest.fixture(scope="session")
def slurm(worker_id: str) -> Iterator[Any]:
    """A real Slurm cluster of 4 virtual nodes: see slurm_lab.py. Its users have this Python and this repository."""
    from tests.tools.slurm_lab import Lab, missing

    if why := missing():
        skip("Slurm", why)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    port = 17200 + 50 * int(worker_id.removeprefix("gw") if worker_id != "master" else 0)
    # Not among pytest's folders, which are closed to others: munge wants its socket to be reachable.
    with tempfile.TemporaryDirectory(prefix="cpsp-slurm-") as folder:
        lab = Lab(Path(folder) / "lab", port, environment())
        os.chmod(folder, 0o755)
        try:
            lab.up(4)
            yield lab
        finally:
            lab.down()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real Chromium, of `support/browser.py`."""
    from tests.support.browser import Browser, find_browser

    path = find_browser()
    if path is None:
        skip("Chromium", "no chromium on the PATH")
    with Browser(tmp_path_factory.mktemp("browser"), path) as opened:
        yield opened


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[..., Path]:
    """`made_once(name, make)`: a folder that all workers share, which the first that asks for it makes.

    Nobody may change what it holds.
    """
    base = tmp_path_factory.getbasetemp()
    base = base if worker_id == "master" else base.parent

    def once(name: str, make: Callable[[Path], None]) -> Path:
        with open(base / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (base / name).exists():
                make(base / name)
        return base / name

    return once


@pytest.fixture(scope="session")
def keypad_features(made_once: Callable[..., Path]) -> Path:
    """A small keypad corpus in AVE's layout: 48 train, 16 val, 16 test videos."""

    def make(out: Path) -> None:
        from cpsp_dist.demo.keypad import generate

        generate(out, {"train": 48, "val": 16, "test": 16}, seed=3)

    return made_once("keypad-features", make)


@pytest.fixture(scope="session")
def keypad_shards(keypad_features: Path, made_once: Callable[..., Path]) -> Path:
    """The same, packed by the command."""

    def make(out: Path) -> None:
        from cpsp_dist.cli import main

        arguments = ["--layout", "ave-h5", "--source", str(keypad_features), "--out", str(out)]
        assert main(["shards", "pack", *arguments]) == 0

    return made_once("keypad-shards", make)


@pytest.fixture
def ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """`ranks(function, world, *args)`: see `run_ranks`. Each call gets a folder of its own."""
    from tests.support.ranks import run_ranks  # imports torch, which pytest itself does without

    count = iter(range(1000))

    def run(function: Callable[..., Any], world: int, *args: Any, timeout: float = 120) -> list[Any]:
        folder = tmp_path / f"ranks{next(count)}"
        folder.mkdir()
        return run_ranks(function, world, folder, *args, timeout=timeout)

    return run
