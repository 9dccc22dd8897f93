"""The demo: keypad features made and packed, then PSP and CPSP, with local and gathered pools, compared."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cpsp_dist.config import load_config
from cpsp_dist.tracking.compare import Question, compare_runs
from cpsp_dist.tracking.compare_formats import as_text
from cpsp_dist.tracking.runs import experiment_page, find_runs
from cpsp_dist.utils.console import echo
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.extras import require

#: What is compared: name, settings. All at one global batch and the same seeds.
KINDS = {
    "psp": ["objectives.avps=0", "objectives.psa_s=0", "objectives.psa_v=0"],
    "cpsp-local-pool": ["pool.scope=local"],
    "cpsp-gathered-pool": ["pool.scope=gather"],
}
MARK = "cpsp-dist-demo"
RUN_LIMIT_SECONDS = 1800


def demo(config: str, output: str, *, seeds: int, ranks: int | None, overrides: Sequence[str]) -> None:
    """Run the demo in `output`, which is made anew. Its MLflow store is there too, whatever MLFLOW_TRACKING_URI says:
    what it compares are its own runs.

    Raises:
        UserError: a mistake in the configuration, `output` is somebody else's folder, or a run that failed.
    """
    load_config(config, overrides)  # mistakes are reported before anything is made
    require("sklearn", "demo", "the demo")
    with made_anew(Path(output)):
        _demo(config, Path(output), seeds, _ranks() if ranks is None else ranks, overrides)


def _demo(config: str, folder: Path, seeds: int, ranks: int, overrides: Sequence[str]) -> None:
    began = time.monotonic()
    shards = folder / "shards"
    store = f"sqlite:///{folder / 'mlflow.db'}"
    say = Steps(3 + len(KINDS) * seeds)
    say("Make the keypad corpus: digits on a wall, telephone tones, ten seconds each (AVE's h5 layout)")
    run_python(["-m", "cpsp_dist", "shards", "keypad", "--out", str(folder / "features")])
    say("Pack the features into WebDataset shards")
    run_python(["-m", "cpsp_dist", "shards", "pack", "--layout", "ave-h5", "--source", str(folder / "features")]
         + ["--out", str(shards)])  # fmt: skip
    run_python(["-m", "cpsp_dist", "shards", "preview", str(shards), "-n", "4"])
    for seed in range(1, seeds + 1):
        for name, settings in KINDS.items():
            say(f"Train {name}, seed {seed}, on {ranks} ranks")
            run = f"{name}-seed{seed}"
            run_python(
                ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "cpsp_dist.train"]
                + ["--config", config, f"data.shards={shards}", f"output={folder / run}", f"train.seed={seed}"]
                + ["tracking.experiment=demo", f"tracking.run_name={run}", *settings, *overrides],
                quiet=["[Gloo]", "torch/distributed/run.py"],
                env={"MLFLOW_TRACKING_URI": store},
            )
    say("Compare the runs (accuracy in percent, the difference to PSP on test)")
    shown = ("accuracy/test", "accuracy/best_val", "videos_per_second")
    found = compare_runs(find_runs(store, ["demo"]), Question(shown, mean=True, baseline="psp"))
    echo(as_text(found))
    echo(f"\nDone in {time.monotonic() - began:.0f} s. Each run for itself, and the MLflow page:\n")
    echo(f"  {command_of('cpsp-dist')} compare --experiment demo --uri {store}")
    echo(f"  {command_of('mlflow')} ui --backend-store-uri {store}    then open {experiment_page(store, 'demo')}\n")
    echo("The same on real videos, from mp4 files to predicted events, in a minute or two:\n")
    echo(f"  {command_of('cpsp-dist')} demo --videos\n")


def _ranks() -> int:
    """Two; but a GPU takes one rank."""
    import torch

    if torch.cuda.device_count() != 1:
        return 2
    echo("One GPU, so one rank, whose own pool is the gathered one; the difference takes two")
    return 1


def command_of(name: str) -> str:
    """How the user can call this environment's `name`: with its folder, unless that is on the PATH."""
    path = Path(sys.executable).with_name(name)
    if shutil.which(name) == str(path) or not path.exists():
        return name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


@contextmanager
def made_anew(folder: Path) -> Iterator[None]:
    """The folder, empty but for a mark, which this process and those of `run_python` keep locked until they end.

    Raises:
        UserError: it is somebody else's, or another demo's that still runs, maybe as processes that a killed one left.
    """
    mark = folder / MARK
    if folder.exists() and not mark.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output {folder}: exists and is not an earlier demo's; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(mark, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.set_inheritable(descriptor, True)
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"--output {folder}: another demo writes it, or a command that a killed one had started; wait for "
                    "its end, or choose another folder"
                ) from None
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != mark:
                path.unlink()
        yield
    finally:
        os.close(descriptor)


class Steps:
    """Numbered headings."""

    def __init__(self, total: int):
        self.total, self.done = total, 0

    def __call__(self, text: str) -> None:
        self.done += 1
        echo(f"\n[{self.done}/{self.total}] {text}")


def run_python(arguments: Sequence[str], quiet: Sequence[str] = (), env: Mapping[str, str] | None = None) -> None:
    """Run python with `arguments` and `env` on top of the environment, passing on its lines but those of launchers that
    hold a text of `quiet`."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        close_fds=False,  # the lock of `made_anew`; Python's own files are not inherited
        env={**os.environ, **(env or {})},
    )
    # Also ends a run that hangs without printing.
    limit = threading.Timer(RUN_LIMIT_SECONDS, process.kill)
    limit.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if not any(text in line for text in quiet):
                echo("    " + line, end="")
        code = process.wait()
    finally:
        limit.cancel()
        process.kill()
        process.wait()
    if code != 0:
        raise UserError(f"failed with exit code {code}: python {' '.join(arguments)}")
