"""`cpsp-dist doctor`: what users meet, each reported in a line with its fix; every wait with a limit."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpsp_dist.cli import main
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.distributed.store import hung_threads
from cpsp_dist.doctor import finding, machine, paths, rendezvous
from tests.support.doctor import config, line_of

Run = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """`doctor(*arguments)` in this process: exit code, lines."""
    before = dict(os.environ)
    for name in [n for n in before if n.startswith(("RANK", "WORLD", "LOCAL_RANK", "MASTER_", "SLURM_", "MLFLOW_"))]:
        del os.environ[name]

    def run(*arguments: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        code = main(["doctor", "--timeout", "20", *arguments])
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        printed = capsys.readouterr()
        assert not printed.err
        return code, printed.out.splitlines()

    yield run
    os.environ.clear()
    os.environ.update(before)


def test_a_healthy_laptop(doctor: Run, keypad_shards: Path, tmp_path: Path) -> None:
    code, lines = doctor(*config(keypad_shards, tmp_path / "runs" / "run"))
    assert code == 0, lines
    checks = [line.split()[1] for line in lines[:-1]]
    wanted = ["ranks", "slurm", "python", "packages", "gpu", "config", "shards", "space", "mlflow", "threads", "output"]
    assert sorted(checks) == sorted(wanted)
    assert "48 train, 16 val, 16 test samples" in line_of(lines, "shards", "ok")
    assert lines[-1].startswith("no errors")
    assert not [*tmp_path.iterdir()], "nothing is left behind"
    code, lines = doctor("--json", *config(keypad_shards, tmp_path / "run"))
    report = json.loads("\n".join(lines))
    assert (code, report["errors"]) == (0, 0)
    assert sorted(found["check"] for found in report["findings"]) == sorted(wanted)
    assert doctor()[1][-1].startswith("no errors"), "also without a configuration"


def test_mistakes_of_a_user(doctor: Run, keypad_shards: Path, tmp_path: Path) -> None:
    shards, run = str(keypad_shards), str(tmp_path / "run")
    mistakes = {
        "config": (["train.epoch=1", "train.seed=x"], ["did you mean 'train.epochs'?", "train.seed='x'"], 1),
        "shards": ([f"data.shards={tmp_path}/none"], [f"{tmp_path}/none: no such folder of shards; pack one with"], 1),
        "compile": (["engine.compile=graphs"], ["engine.compile=graphs needs a GPU, and there is none here"], 1),
        "output": (
            ["output=/proc/none/run"],
            ["output=/proc/none/run: nothing can be written to /proc", "; fix: set"],
            2,
        ),
    }
    for check, (settings, texts, errors) in mistakes.items():
        code, lines = doctor(*config(shards, run, *settings))
        message = line_of(lines, check, "error")
        assert all(text in message for text in texts), message
        assert code == 2
        assert lines[-1].startswith(f"{errors} error"), "no room in /proc either"
    (tmp_path / "loop").symlink_to("loop")
    code, lines = doctor(*config(shards, str(tmp_path / "loop")))
    assert code == 2
    assert "Too many levels of symbolic links" in line_of(lines, "output", "error"), "as a training would say"
    os.environ["RANK"] = "0"
    code, (line,) = doctor()
    assert code == 2
    assert "RANK is set but WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not" in line
    assert main(["doctor", "train.seed=1"]) == 2
    assert main(["doctor", "--timeout", "0"]) == 2


def test_a_damaged_sample_and_a_missing_shard(doctor: Run, keypad_shards: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(keypad_shards, shards)
    manifest = Manifest.load(shards)
    sample = manifest.samples[manifest.rows("val")[0]]
    path = manifest.path(manifest.shards[sample["shard"]])
    with open(path, "r+b") as file:
        file.seek(int(sample["audio"]))
        byte = file.read(1)[0]
        file.seek(int(sample["audio"]))
        file.write(bytes([byte ^ 1]))
    code, lines = doctor(*config(shards, tmp_path / "run"))
    message = line_of(lines, "shards", "error")
    assert code == 2
    assert f"{path}: audio of sample '{sample['key'].decode()}' is damaged; copy this shard again" in message
    path.unlink()
    code, lines = doctor(*config(shards, tmp_path / "run"))
    assert code == 2
    assert f"{path}: shard is missing; copy or pack it again" in line_of(lines, "shards", "error")


@pytest.fixture
def web(keypad_shards: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The shards at a URL, of a plain server that knows no ranges, and the folder that it serves."""
    folder = tmp_path / "served"
    shutil.copytree(keypad_shards, folder)

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()


def test_shards_at_a_url(doctor: Run, web: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, folder = web
    run = config(url, tmp_path / "run", f"data.cache={tmp_path}/cache")
    code, lines = doctor(*run)
    assert code == 0, lines
    assert f"{url}: 48 train" in line_of(lines, "shards", "ok")
    assert "room for all 5.8 MB" in line_of(lines, "cache", "ok")
    kept = [path.stat().st_size for path in (tmp_path / "cache").iterdir()]
    assert sum(kept) < 100_000, "the table alone: no shard was fetched"

    code, lines = doctor(*run, "data.cache_gb=0.001")
    assert code == 2
    assert "or raise data.cache_gb" in line_of(lines, "cache", "error")
    with monkeypatch.context() as patch:
        patch.setattr(paths, "file_system", lambda _: "nfs4")
        assert "network file system (nfs4); fix: set data.cache" in line_of(doctor(*run)[1], "cache", "warning")

    shard = folder / Manifest.load(folder).shards[0].url
    shard.write_bytes(bytes(shard.stat().st_size))
    code, lines = doctor(*run)
    assert code == 2
    assert "is damaged; copy this shard again" in line_of(lines, "shards", "error")


def test_a_full_disk(doctor: Run, keypad_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for less than what the run keeps: weights and two moments, of `keep` checkpoints and two more."""
    monkeypatch.setattr(paths.shutil, "disk_usage", lambda _: SimpleNamespace(free=50_000_000))
    code, lines = doctor(*config(keypad_shards, tmp_path / "run"))
    assert code == 2
    message = line_of(lines, "space", "error")
    assert "50.0 MB free; checkpoints of 18.8 MB each need up to 75.2 MB" in message
    assert "lower checkpoint.keep" in message
    assert doctor(*config(keypad_shards, tmp_path / "run", "checkpoint.keep=1", "train.optimizer=sgd"))[0] == 0


def test_mlflow(doctor: Run, keypad_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(keypad_shards, tmp_path / "run")
    os.environ["MLFLOW_TRACKING_URI"] = "http://anna:geheim@127.0.0.1:9/ml?token=geheim"
    began = time.monotonic()
    code, lines = doctor(*run)
    assert code == 2
    assert "http://127.0.0.1:9/ml does not answer as an MLflow server" in line_of(lines, "mlflow", "error")
    assert not any("geheim" in line or "anna" in line for line in lines)
    assert time.monotonic() - began < 60
    assert doctor(*run, "tracking.enabled=false")[0] == 0

    del os.environ["MLFLOW_TRACKING_URI"]
    store = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    code, lines = doctor(*run)
    assert code == 2
    assert "not a usable MLflow store: no such table: runs" in line_of(lines, "mlflow", "error")
    store.execute("create table runs (id)")
    assert "0 runs" in line_of(doctor(*run)[1], "mlflow", "ok")
    store.execute("begin exclusive")
    code, lines = doctor(*run, *["--timeout", "2"])
    assert code == 2
    assert "database is locked; fix: end the program that holds it" in line_of(lines, "mlflow", "error")
    store.rollback()

    monkeypatch.setattr(paths, "file_system", lambda _: "lustre")
    code, lines = doctor(*run)
    assert code == 0, "a warning alone"
    message = line_of(lines, "mlflow", "warning")
    assert "network file system (lustre)" in message
    assert "fix: set MLFLOW_TRACKING_URI to a server" in message
    assert lines[-1] == "no errors, 1 warning"


def test_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CONSTRAINTS", tmp_path / "constraints.txt")
    machine.CONSTRAINTS.write_text('# tested\ntorch==1.0\nnumpy==0.1; python_version < "3"\n')
    found = [f for f in machine.python_and_packages() if f.check == "packages"]
    assert [f.status for f in found] == ["warning"]
    assert f"torch {torch.__version__} (tested: 1.0)" in found[0].found
    assert "numpy" not in found[0].found
    monkeypatch.setattr(machine, "requires", lambda _: ["torch>=99", "no-such-package-at-all", 'ruff; extra == "dev"'])
    found = [f for f in machine.python_and_packages() if f.check == "packages"]
    assert found[0].status == "error"
    assert "(needed: >=99), no-such-package-at-all is missing" in found[0].found
    assert "pip install" in found[0].fix
    monkeypatch.setattr(machine, "TESTED_PYTHON", (3, 99))
    assert machine.python_and_packages()[0].status == "warning"


def test_gpus_that_torch_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    assert machine.nvidia_driver(tmp_path / "none") is None
    proc = tmp_path / "version"
    proc.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n")
    assert machine.nvidia_driver(proc) == "550.54.15"
    monkeypatch.setattr(machine, "nvidia_driver", lambda: None)
    assert machine.gpus(0) == [("ok", "gpu", "none: CPU", "")]
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert "Slurm gave 8 GPUs on this node" in machine.gpus(0)[0].found
    monkeypatch.setattr(machine, "nvidia_driver", lambda: "550.54.15")
    for built_for, text in ((None, "is a build for CPUs"), ("12.8", "torch for CUDA 12.8 finds no GPU")):
        monkeypatch.setattr(torch.version, "cuda", built_for)
        (found,) = machine.gpus(0)
        assert found.status == "error"
        assert text in found.found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.gpus(0)[0].status == "warning"


def core(*affinity: int, threads: int = 1, quota: float | None = None) -> dict[str, Any]:
    return {"affinity": [*affinity], "quota": quota, "machine": 8, "threads": threads, "omp": None}


def test_threads_against_cores() -> None:
    nodes = {"a": [0, 1], "b": [2, 3]}
    fine = {rank: core(*range(8), threads=4) for rank in range(4)}
    (found,) = machine.threads(nodes, fine, 2)
    assert found.status == "ok"
    crowded = fine | {rank: core(*range(8), threads=8) for rank in (2, 3)}
    on_a, on_b = machine.threads(nodes, crowded, 2)
    assert (on_a.status, on_b.status) == ("ok", "warning")
    assert on_b.found.startswith("b: 2 ranks with 8 compute threads each on 8 cores")
    assert on_b.fix == "export OMP_NUM_THREADS=4"
    limited = {rank: core(*range(8), threads=2, quota=2.0) for rank in range(4)}
    assert machine.threads(nodes, limited, 2)[0].fix == "export OMP_NUM_THREADS=1"
    few = {rank: core(*range(8), quota=1.0) for rank in range(4)}
    assert "start fewer ranks there" in machine.threads(nodes, few, 2)[0].fix
    bound = {rank: core(rank) for rank in range(4)}
    (found,) = machine.threads(nodes, bound, 2)
    assert found.status == "warning"
    assert "a rank is bound to 1 core of 8, and data.reader_threads=2 read beside" in found.found
    assert "SRUN_CPUS_PER_TASK" in found.fix


def test_quota_of_cgroups(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    assert machine.cpu_quota(tmp_path, own) is None
    own.write_text("0::/job/step\n")
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "job" / "step" / "cpu.max").write_text("max 100000\n")
    assert machine.cpu_quota(tmp_path, own) is None
    (tmp_path / "job" / "cpu.max").write_text("350000 100000\n")
    assert machine.cpu_quota(tmp_path, own) == 3.5
    own.write_text("4:cpu,cpuacct:/old\n3:memory:/other\n")
    old = tmp_path / "cpu,cpuacct" / "old"
    old.mkdir(parents=True)
    for name, value in (("quota", 150000), ("period", 100000)):
        (old / f"cpu.cfs_{name}_us").write_text(f"{value}\n")
    assert machine.cpu_quota(tmp_path, own) == 1.5


def test_variables_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith(("SLURM_", "SRUN_", "RANK", "TORCHELASTIC", "ACCELERATE"))]:
        monkeypatch.delenv(name)

    def judge(world: int, affinity: int, **env: str) -> Any:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        (found,) = machine.slurm(world, affinity)
        return found

    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert judge(1, 8).found == "not inside a job"
    batch = judge(1, 8, SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES="2", SLURM_NTASKS="16")
    assert batch.status == "warning"
    assert "outside of srun" in batch.found
    alone = judge(1, 8, SLURM_NTASKS="1", SLURM_CPUS_PER_TASK="8")
    assert alone.fix.startswith("export SRUN_CPUS_PER_TASK")
    assert judge(1, 8, SRUN_CPUS_PER_TASK="8").status == "ok"
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_NTASKS": "16"}
    assert judge(16, 8, **step).status == "ok"
    bound = judge(16, 1)
    assert "8 cores a task were asked for, this one is bound to 1" in bound.found
    assert "SRUN_CPUS_PER_TASK" in bound.fix
    left = judge(1, 8, RANK="0", WORLD_SIZE="1")
    assert left.fix.startswith("unset RANK WORLD_SIZE")


def test_a_check_never_ends_the_doctor() -> None:
    def fails(error: Exception) -> Any:
        def call() -> list[finding.Finding]:
            raise error

        return call

    (found,) = finding.examine("x", 5, "y", fails(ZeroDivisionError("at http://a:b@host/?key=1\nline")))
    assert found.status == "error"
    assert "ZeroDivisionError: at http://host/ line" in found.found
    answered, answers = threading.Event(), threading.Event()
    (found,) = finding.examine("x", 0.2, "the moon", lambda: [answers.wait(60), answered.set()])  # type: ignore[list-item]
    assert not answered.is_set(), "it was not waited for"
    answers.set()
    assert found.found == "no answer within 0.2 s from the moon"
    hung_threads.clear()


def test_clocks_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    assert paths.file_times("a", {"seconds": 0.4}) == []
    (found,) = paths.file_times("a", {"seconds": -70.0})
    assert found.status == "warning"
    assert "-70.0 s from the clock of a" in found.found
    assert rendezvous.numbers([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"
