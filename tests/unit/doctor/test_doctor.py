"""`cpsp-dist doctor`: what users meet, each reported in a line with its fix; every wait with a limit."""

from __future__ import annotations

import json
import os
import shutil
import socket
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
import torch.distributed as dist

from cpsp_dist.cli import main
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.distributed import rendezvous as meeting
from cpsp_dist.distributed.card import Card
from cpsp_dist.distributed.store import hung_threads
from cpsp_dist.doctor import finding, machine, paths, rendezvous
from tests.support.runs import KEYPAD

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


def config(shards: Path | str, output: Path | str, *more: str) -> list[str]:
    return ["--config", str(KEYPAD), f"data.shards={shards}", f"output={output}", "engine.kind=ddp", *more]


def line_of(lines: list[str], check: str, status: str) -> str:
    found = [line for line in lines if line.split()[:2] == [status, check]]
    assert len(found) == 1, "\n".join(lines)
    return found[0]


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


def become_a_node(rank: int) -> None:
    """Each rank a machine of its own, by name."""
    socket.gethostname = lambda: f"node{rank}.cluster"


def start(
    prefork: Any, arguments: list[str], world: int, patch: str = "become_a_node", *args: object, **env: str
) -> Any:
    arguments = ["doctor", "--timeout", "20", *arguments]
    return prefork.start(
        arguments,
        world,
        command="cpsp_dist.cli",
        patch=f"tests.unit.doctor.test_doctor:{patch}",
        patch_args=args,
        **env,
    )


def test_two_nodes(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    lines = start(prefork, config(keypad_shards, tmp_path / "run"), 2).finish().splitlines()
    assert "2 of 2 ranks on 2 nodes: node0 (rank 0), node1 (rank 1)" in line_of(lines, "ranks", "ok")
    assert "gloo: right" in line_of(lines, "all-reduce", "ok")
    assert "writable" in line_of(lines, "output", "ok")
    assert "the same folder on every node" in line_of(lines, "output", "ok")
    assert "all nodes within 0." in line_of(lines, "clock", "ok")
    assert not [*tmp_path.iterdir()]


def leave_keys_of_another_start(rank: int, first: str, second: str) -> None:
    """Elastic torchrun: each agent counts restarts for itself, and its store keeps the keys of the starts before."""
    become_a_node(rank)
    os.environ["TORCHELASTIC_RESTART_COUNT"] = [first, second][rank]
    real = meeting.open_store

    def opened(place: Any, limit: float) -> Any:
        store = real(place, limit)
        if rank == 0:
            for key in ("hello/1", "came/0", "roster", "verdict"):
                dist.PrefixStore("cpsp_dist/", store).compare_set(key, "", "of a start before")
        return store

    meeting.open_store = opened


def test_agents_that_restarted_differently(prefork: Any) -> None:
    """C4: the doctor's ranks meet as those of a training do."""
    lines = start(prefork, [], 2, "leave_keys_of_another_start", "0", "1").finish().splitlines()
    assert "2 of 2 ranks on 2 nodes: node0 (rank 0), node1 (rank 1)" in line_of(lines, "ranks", "ok")


def have_one_gpu(rank: int) -> None:
    become_a_node(0)
    card = Card("node0", "cuda", "NVIDIA H100", "GPU-7", 1, "torch 2.13.0")
    rendezvous._card = lambda _: card


def test_two_ranks_on_one_gpu(prefork: Any) -> None:
    launch = start(prefork, [], 2, "have_one_gpu")
    assert launch.wait(90) == [2, 2], launch.outputs()
    found = line_of(launch.ranks[0].output.splitlines(), "ranks", "error")
    assert "ranks 0-1 share one GPU of node0 (GPU-7): start at most one rank for each; fix: under Slurm use" in found


def test_nodes_that_differ(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    """Paths relative to folders that are not the same; a clock that is ahead; another environment."""
    for name, fraction in (("a", "1"), ("b", "0.5")):
        out = str(tmp_path / name / "shards")
        assert main(["shards", "subset", str(keypad_shards), "--fraction", fraction, "--out", out]) == 0
    folders = [str(tmp_path / name) for name in "ab"]
    run = [*config("shards", "run"), "--timeout", "8"]
    launch = start(prefork, run, 2, "become_two_folders", *folders)
    assert launch.wait(120) == [2, 2], launch.outputs()
    lines = launch.ranks[0].output.splitlines()
    assert not launch.ranks[1].output
    digests = [Manifest.load(tmp_path / name / "shards").fingerprint[:12] for name in ("a", "b")]
    message = line_of(lines, "shards", "error")
    assert f"{digests[0]} on node0; {digests[1]} on node1; fix: copy the same shards to every node" in message
    message = line_of(lines, "output", "error")
    assert message.split()[2:4] == ["on", "node1:"]
    assert f"{tmp_path}/b: the file that rank 0 (node0) wrote there did not appear within 8 s" in message
    assert "torch on every node" in line_of(lines, "packages", "error")
    assert "2.99.0 on node1" in line_of(lines, "packages", "error")
    assert "writable" in line_of(lines, "output", "ok")
    assert "the same folder" not in line_of(lines, "output", "ok")
    message = line_of(lines, "clock", "warning")
    assert "node1 +5." in message
    assert "NTP" in message
    assert lines[-1] == "3 errors, 2 warnings"


def become_two_folders(rank: int, first: str, second: str) -> None:
    """Rank 1 in another folder, with another clock and another torch."""
    become_a_node(rank)
    os.chdir([first, second][rank])
    if rank == 1:
        real, found = time.time, machine.installed()
        time.time = lambda: real() + 5
        machine.installed = lambda: found | {"torch": "2.99.0"}  # type: ignore[assignment]


@pytest.mark.parametrize("absent", [2, pytest.param(0, marks=pytest.mark.long)])
def test_a_rank_that_never_comes(prefork: Any, absent: int) -> None:
    began = time.monotonic()
    patch = "become_a_node" if absent else "become_the_next_rank"
    launch = start(prefork, ["--timeout", "4"], 2, patch, WORLD_SIZE="3")
    assert launch.wait(60) == [2, 2], launch.outputs()
    assert time.monotonic() - began < 45
    outputs = [rank.output.splitlines() for rank in launch.ranks]
    assert not any("Traceback" in rank.output or "frame #" in rank.output for rank in launch.ranks)
    if absent:
        message = line_of(outputs[0], "ranks", "error")
        assert "2 of 3 ranks on 2 nodes: node0 (rank 0), node1 (rank 1); timed out: waited 4 s at 127.0.0.1:" in message
        assert "for rank 2; fix: look at the output of rank 2" in message
        assert line_of(outputs[0], "packages", "ok"), "the others' findings are printed all the same"
    else:
        for rank, lines in enumerate(outputs, 1):
            assert len(lines) == 1
            assert f"rank {rank} of 3 on node{rank}: nobody answered at 127.0.0.1:" in lines[0]
            assert "within 4 s (Connection refused); fix: see whether rank 0 was started" in lines[0]


def become_the_next_rank(rank: int) -> None:
    os.environ["RANK"] = str(rank + 1)
    become_a_node(rank + 1)


def hang_at_the_shards(rank: int) -> None:
    """A file system that does not answer on one node; and a network card that sums wrongly."""
    become_a_node(rank)
    if rank == 1:
        paths.shards = lambda _: time.sleep(600)  # type: ignore[assignment]
    dist.all_reduce = lambda *_: None


def test_a_disk_that_hangs_and_a_wrong_sum(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    run = [*config(keypad_shards, tmp_path / "run"), "--timeout", "5"]
    launch = start(prefork, run, 2, "hang_at_the_shards")
    assert launch.wait(90) == [2, 2], launch.outputs()
    assert time.monotonic() - began < 60
    lines = launch.ranks[0].output.splitlines()
    assert f"on node1: no answer within 5 s from {keypad_shards}" in line_of(lines, "shards", "error")
    assert "gloo: the sum over 2 ranks came out as 1, not 3; fix: export GLOO_SOCKET_IFNAME=" in line_of(
        [line for line in lines if "came out as 1" in line], "all-reduce", "error"
    )


def die_at_the_shards(rank: int, victim: int) -> None:
    become_a_node(rank)
    if rank == victim:
        paths.shards = lambda _: os._exit(9)  # type: ignore[assignment]


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.long)])
def test_a_rank_that_dies_is_missed(prefork: Any, keypad_shards: Path, tmp_path: Path, victim: int) -> None:
    """Rank 0 holds the store by which they talk."""
    began = time.monotonic()
    run = [*config(keypad_shards, tmp_path / "run"), "--timeout", "2"]
    launch = start(prefork, run, 2, "die_at_the_shards", victim)
    assert launch.wait(90) == ([9, 2] if victim == 0 else [2, 9]), launch.outputs()
    assert time.monotonic() - began < 45
    message = [line for line in launch.ranks[1 - victim].output.splitlines() if "was lost" in line]
    assert len(message) == 1
    if victim:
        assert "rank 1 on node1 was lost at 'shards': nothing came from it within 7 s" in message[0]
    else:
        assert "rank 1: the rendezvous at 127.0.0.1:" in message[0]
        assert "Traceback" not in launch.ranks[1].output


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
    began = time.monotonic()
    (found,) = finding.examine("x", 0.2, "the moon", lambda: [time.sleep(3)])  # type: ignore[list-item]
    assert time.monotonic() - began < 2
    assert found.found == "no answer within 0.2 s from the moon"
    hung_threads.clear()


def test_clocks_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    assert paths.file_times("a", {"seconds": 0.4}) == []
    (found,) = paths.file_times("a", {"seconds": -70.0})
    assert found.status == "warning"
    assert "-70.0 s from the clock of a" in found.found
    assert rendezvous.numbers([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"
