"""`cpsp-dist launch --local`: training on this machine's ranks, and what is pickled for them."""

from __future__ import annotations

import json
import os
import pickletools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cpsp_dist.cli import main
from cpsp_dist.config import load_config
from tests.support.environment import REPO, environment
from tests.support.launching import QUICK, launch
from tests.support.runs import KEYPAD, loss_history, newest_weights, overrides


class Private(SimpleHTTPRequestHandler):
    """A folder for those who send the token."""

    def do_GET(self) -> None:
        if self.headers.get("Authorization") == "Bearer t0k3n":
            super().do_GET()
        else:
            self.send_error(401)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def private_url(keypad_shards: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: Private(*args, directory=str(keypad_shards)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def settings_of(shards: Any, output: Path) -> list[str]:
    cache = f"data.cache={output.parent / 'cache'}"
    return overrides(shards, output, *QUICK, "tracking.enabled=false", cache, "data.order=interleaved")


@pytest.fixture(scope="module")
def trained(private_url: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """From a URL, with a token that the environment has."""
    output = tmp_path_factory.mktemp("launched") / "run"
    first, second, *more = settings_of(private_url, output)
    token = json.dumps({"headers": {"Authorization": "Bearer t0k3n"}})
    return output, launch(str(KEYPAD), first, second, "--local", "--ranks-per-node", "2", *more, FSSPEC_HTTP=token)


def test_local_ranks_give_the_same_loss(trained, prefork, keypad_shards, tmp_path):
    """To the last digit: two ranks of submitit, from a URL; two that another launcher started, from the folder."""
    output, done = trained
    assert done.returncode == 0, done.stdout + done.stderr
    prefork.start(["--config", str(KEYPAD), *settings_of(keypad_shards, tmp_path / "other")], 2).finish()
    assert len(loss_history(output)) == 3
    assert loss_history(output) == loss_history(tmp_path / "other")
    assert "step 3/3 " in done.stdout
    expected = newest_weights(tmp_path / "other")
    assert all(tensor.equal(expected[name]) for name, tensor in newest_weights(output).items())


def test_credentials_of_the_environment_serve_and_are_written_nowhere(trained):
    output, done = trained
    assert done.returncode == 0, done.stdout + done.stderr
    files = [path for path in output.parent.rglob("*") if path.is_file()]
    assert any(path.name.endswith("submitted.pkl") for path in files)
    assert any("cache" in path.parts for path in files), "it came from the URL"
    assert not [path for path in files if b"t0k3n" in path.read_bytes()]
    assert "t0k3n" not in done.stdout + done.stderr


def test_what_is_submitted_is_two_paths(trained, private_url, capsys):
    """The pickle names one function and two strings; the snapshot is the resolved configuration."""
    output, _ = trained
    (pickled,) = output.glob("slurm/*/*_submitted.pkl")
    (snapshot,) = output.glob("slurm/*/config.yaml")
    assert load_config(snapshot) == load_config(KEYPAD, settings_of(private_url, output))
    code = list(pickletools.genops(pickled.read_bytes()))
    strings = [value for _, value, _ in code if isinstance(value, str)]
    assert {"cpsp_dist.launch.job", "run", str(snapshot), str(KEYPAD)} < set(strings)
    modules = [text for text in strings if "." in text and "/" not in text]
    assert set(modules) == {"cpsp_dist.launch.job", "submitit.core.utils"}
    assert len(pickled.read_bytes()) < 1000

    assert main(["launch", "--status", str(output)]) == 0
    header, _, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "job", "state", "step", "log"]
    name, _, state, step, log = line.split()
    assert (name, state, step) == ("run", "completed", "3/3")
    assert f"step 3/3  loss {loss_history(output)[-1]['loss/total']:.4f}" in Path(log).read_text()


@pytest.mark.long
def test_a_failing_local_run_is_reported_as_failed(tmp_path):
    done = launch(str(KEYPAD), f"output={tmp_path}/out", f"data.shards={tmp_path}/none", "--local")
    assert done.returncode == 2
    printed = f"{tmp_path}/none: no such folder of shards; pack one with `cpsp-dist shards pack`"
    assert done.stdout.splitlines()[-1] == f"out: exit code 2: error: {printed}"
    assert " failed " in done.stdout.splitlines()[-2]


@pytest.mark.long
def test_interrupted_local_ranks_save_and_end(keypad_shards, tmp_path):
    """Ctrl-C reaches every process of the terminal: the launcher, submitit's controller and the rank."""
    more = ["train.steps=2000", "train.epochs=999", "tracking.every_steps=1", "tracking.enabled=false"]
    command = [sys.executable, "-m", "cpsp_dist", "launch", str(KEYPAD), "--local"]
    command += overrides(keypad_shards, tmp_path / "out", *more)
    printed = tmp_path / "printed"
    with open(printed, "w") as file:
        process = subprocess.Popen(
            command, env=environment(), cwd=REPO, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        limit = time.monotonic() + 120
        while "\nstep 2/" not in printed.read_text():
            assert process.poll() is None, printed.read_text()
            assert time.monotonic() < limit, printed.read_text()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=120) == 75
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = printed.read_text().splitlines()
    assert "stopping: waiting up to 120 s for the ranks to save and end" in lines
    assert any(line.startswith("SIGINT: saved step ") for line in lines)
    assert len(list((tmp_path / "out").glob("checkpoints/step-*"))) >= 1
