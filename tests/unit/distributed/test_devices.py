"""Which device a rank takes, and what errors of GPUs mean: tables, with the GPUs pretended."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cpsp_dist.distributed import devices, heartbeat, process_group
from cpsp_dist.distributed.card import Card, idle_gpus, judge
from cpsp_dist.distributed.devices import choose_device, explain, reason_of, set_device
from cpsp_dist.distributed.launchers import Place, export_place
from cpsp_dist.utils.command import LOCAL_RANKS, run_command, should_print
from cpsp_dist.utils.errors import (
    EXIT_LOST_RANK,
    EXIT_USER_ERROR,
    DeviceLost,
    LostRank,
    RankError,
    UserError,
)
from tests.support.environment import environment

NO_DRIVER = Path("no driver here")
GPU = torch.device("cuda", 1)


def place(rank: int, world: int = 8) -> Place:
    return Place(rank, world, rank, "node1", 29500, "srun")


@pytest.mark.parametrize(
    ("visible", "rank", "index"), [(8, 0, 0), (8, 7, 7), (1, 0, 0), (1, 1, 0), (1, 7, 0), (0, 3, None)]
)
def test_each_rank_has_a_device(monkeypatch: pytest.MonkeyPatch, visible: int, rank: int, index: int | None) -> None:
    """A1: where each task sees its own GPU alone (--gpus-per-task, MIG), that is GPU 0 of every rank."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    device = choose_device(place(rank), {}, NO_DRIVER)
    assert device == (torch.device("cpu") if index is None else torch.device("cuda", index))


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of them reports it, which is not rank 0, who has its GPU; the others exit without an error message."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for local, printed in ((2, True), (3, False)):
        with pytest.raises(UserError, match=f"local rank {local}, but this machine shows 2 GPUs") as raised:
            choose_device(place(local), {}, NO_DRIVER)
        env = {"RANK": str(local), "WORLD_SIZE": "4", "LOCAL_RANK": str(local)}
        assert should_print(raised.value, env) == printed


def test_a_process_without_others_prints_its_error() -> None:
    """Though a variable that somebody left behind calls it another local rank."""
    for name in LOCAL_RANKS:
        assert should_print(UserError("LOCAL_RANK is set but RANK is not"), {name: "2"})
        assert not should_print(UserError("of all"), {name: "2", "WORLD_SIZE": "4"})


def test_deepspeed_gets_the_number_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sets the device by LOCAL_RANK once more; what is printed once a machine goes by the rank's own number."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")
    monkeypatch.setattr("cpsp_dist.utils.command._local_rank", None)
    export_place(place(3), gpu=0)
    import os

    assert (os.environ["LOCAL_RANK"], os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]) == ("0", "0")
    assert not should_print(UserError("of all ranks"))
    assert should_print(DeviceLost("of this one"))


def test_a_lone_process_prints_its_error_whatever_variables_are_left_over(tmp_path: Path) -> None:
    """Of an ended mpirun, as in a container's environment; a launcher's second process leaves it to the first."""
    left_over = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    command = [sys.executable, "-m", "cpsp_dist.train", "--config", "keypad"]
    for more, printed in (({}, True), ({"SLURM_STEP_ID": "0"}, False)):
        env = environment(**left_over, **more)
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == EXIT_USER_ERROR
        assert done.stderr.startswith("error: 2 ranks by mpirun (Open MPI)") == printed
        assert done.stderr.count("\n") == printed


@pytest.mark.parametrize(
    ("env", "driver", "text"),
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, False, r"Slurm gave this job GPUs \(SLURM_GPUS_ON_NODE=8\), but torch"),
        ({"SLURM_JOB_GPUS": "0,1"}, False, "SLURM_JOB_GPUS=0,1"),
        ({}, True, "this machine has an NVIDIA driver, but torch"),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": ""}, True, None),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, True, None),
        ({"SLURM_GPUS_ON_NODE": "0"}, False, None),
        ({}, False, None),
    ],
)
def test_never_on_the_cpu_without_a_word(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, env: dict[str, str], driver: bool, text: str | None
) -> None:
    """B2: a container without --nv, a CPU build of torch."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (tmp_path / "version").touch()
    found = tmp_path / "version" if driver else NO_DRIVER
    if text is None:
        assert choose_device(place(0), env, found) == torch.device("cpu")
    else:
        with pytest.raises(RankError, match=text):
            choose_device(place(0), env, found)


def gpu_card(host: str, uuid: str, gpus: int = 8) -> Card:
    return Card(host, "cuda", "NVIDIA H100", uuid, gpus, "torch 2.13.0")


def test_ranks_that_cannot_train_together() -> None:
    """A1: two ranks on one GPU; B2: a rank without a GPU among ranks with one."""
    good = [gpu_card("n1", "a"), gpu_card("n1", "b"), gpu_card("n2", "a")]
    assert judge(good) is None
    text, ranks = judge([*good, gpu_card("n1", "b")]) or ("", [])
    assert "ranks 1, 3 share one GPU of n1 (b)" in text
    assert ranks == [1]
    text, ranks = judge([*good, Card("n7", "cpu", versions="torch 2.13.0")]) or ("", [])
    assert "rank 3 (n7) has no GPU, rank 0 (n1) has one (NVIDIA H100)" in text
    assert ranks == [3]
    text, _ = judge([Card("n7", "cpu"), gpu_card("n1", "a")]) or ("", [])
    assert "rank 0 (n7) has no GPU" in text
    text, _ = judge([Card("n1", "cpu", versions="torch 2.12.0"), Card("n2", "cpu", versions="torch 2.13.0")]) or (
        "",
        [],
    )
    assert "rank 1 (n2) runs torch 2.13.0, rank 0 (n1) runs torch 2.12.0" in text


def test_idle_gpus_are_counted() -> None:
    """A pod of Kubernetes with 8 GPUs and one process."""
    assert idle_gpus([gpu_card("n1", "a"), gpu_card("n2", "a", gpus=1)]) == {"n1": 7}
    assert idle_gpus([gpu_card("n1", uuid, gpus=1) for uuid in "abc"]) == {}, "each sees its own alone"


@pytest.mark.parametrize(
    ("world", "version", "bound"),
    [(1, "2.13.0", False), (2, "2.13.0+cu130", True), (2, "2.6.0", True), (2, "2.7.0", False), (2, "2.7.1", True)],
)
def test_the_group_is_bound_to_the_device(
    monkeypatch: pytest.MonkeyPatch, world: int, version: str, bound: bool
) -> None:
    """A2: not alone, where DeepSpeed's split of the communicator fails; not with a torch that hangs."""
    if world == 1:
        given: dict[str, Any] = {}
        monkeypatch.setattr(dist, "init_process_group", lambda *_, **named: given.update(named))
        session: Any = SimpleNamespace(store=None, place=Place())
        process_group.init_process_group(session, process_group.Ranks(0, 1, 0, torch.device("cuda", 0)), 10)
        assert given["device_id"] is None
    assert process_group.binds_device(world, version) is bound


NCCL = """NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error, NCCL version 2.27.5
ncclUnhandledCudaError: Call to CUDA function failed.
Last error:
Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 4000""".replace("Duplicate GPU detected", "{}")
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79 GiB"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (torch.OutOfMemoryError(OUT_OF_MEMORY), 2, "memory is full (Tried to allocate 2.00 GiB); raise train.accum"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), 2, "is full"),
        (MemoryError(), 2, "memory is full; raise train.accumulation"),
        (
            torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nmore"),
            69,
            "uncorrectable ECC error",
        ),
        (RuntimeError("CUDA error: unspecified launch failure"), 69, "unspecified launch failure"),
        (dist.DistBackendError(NCCL.format("remote process exited")), 69, "NCCL: remote process exited"),
        (dist.DistBackendError(NCCL.format("Duplicate GPU detected")), 2, "two ranks use one GPU"),
        (dist.DistBackendError(NCCL.format("CUDA driver version is insufficient")), 2, "NVIDIA driver is too old"),
        (RuntimeError("The NVIDIA driver on your system is too old (found version 12000)"), 2, "driver is too old"),
        (RuntimeError("CUDA error: no kernel image is available for execution"), 2, "has no kernels for this GPU"),
        (RuntimeError("CUDA error: device-side assert triggered"), None, ""),
        (RuntimeError("shapes differ"), None, ""),
        (ValueError("CUDA error"), None, ""),
    ],
)
def test_what_an_error_means(capsys: Any, error: Exception, code: int | None, text: str) -> None:
    """C3, A5, A6: one line with the remedy, and the exit code that requeues what another start may survive."""
    meant = explain(error, GPU)
    if code is None:
        assert meant is None
        return
    assert isinstance(meant, UserError | DeviceLost)

    def fails() -> None:
        assert meant is not None
        raise meant

    assert run_command(fails) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line


def test_nccls_reason_is_kept() -> None:
    """A6: it comes last, after more than the 200 characters that were kept once."""
    error = dist.DistBackendError("x" * 300 + "\n" + NCCL.format("driver says no"))
    assert reason_of(error).endswith("NCCL: driver says no : rank 1 and rank 0 both on CUDA device 4000")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("CUDA driver version is insufficient for CUDA runtime version", UserError),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", DeviceLost),
        ("No CUDA GPUs are available", DeviceLost),
    ],
)
def test_a_device_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, text: str, kind: type[Exception]) -> None:
    """A5: before the first collective, where no other handler is."""

    def fails(_: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(torch.cuda, "set_device", fails)
    with pytest.raises(kind):
        set_device(GPU)
    set_device(torch.device("cpu"))


class Peers:
    """Rank 0's heartbeat beside the keys of rank 1, in one store."""

    def __init__(self, device: str) -> None:
        self.store = dist.HashStore()
        self.beating = heartbeat.Heartbeat(self.store, 1, 2, 60, device)


def test_who_reports_stays_until_the_others_know() -> None:
    """C1: gone at once, NCCL's watchdog of the others would see a closed connection first, and abort them with 134."""
    peers = Peers("cuda")
    assert peers.beating.grace < 1
    assert heartbeat.GRACE["cpu"] > peers.beating.grace
    order: list[str] = []

    def report() -> None:
        peers.beating.report_exit("a mistake", EXIT_USER_ERROR)
        order.append("left")

    thread = threading.Thread(target=report)
    thread.start()
    while not peers.store.check([heartbeat.EXITED]):
        pass
    order.append("known")
    assert json.loads(peers.store.get(heartbeat.EXITED))["code"] == EXIT_USER_ERROR
    peers.store.set(f"{heartbeat.NOTED}0", "1")
    thread.join(30)
    peers.beating.close()
    assert order == ["known", "left"]


def failing(error: BaseException) -> BaseException:
    """What a rank raises that meets `error` while another one is alive; and what the other learns, by a key."""
    store = dist.HashStore()
    store.set(f"{heartbeat.NOTED}0", "1")
    beating = heartbeat.Heartbeat(store, 1, 2, 60)
    try:
        process_group._leave_early(error, process_group.Ranks(1, 2, 1, torch.device("cuda", 1)), beating)
    except BaseException as raised:
        raised.learnt = json.loads(store.get(heartbeat.EXITED))  # type: ignore[attr-defined]
        return raised
    finally:
        beating.close()
    raise AssertionError


def test_the_others_learn_the_code_of_a_lost_gpu() -> None:
    """C3: a GPU that is lost requeues the job, a full memory does not."""
    lost: Any = failing(torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"))
    assert isinstance(lost, LostRank)
    assert (lost.code, lost.learnt["code"]) == (EXIT_LOST_RANK, EXIT_LOST_RANK)
    full: Any = failing(torch.OutOfMemoryError(OUT_OF_MEMORY))
    assert isinstance(full, UserError)
    assert full.learnt["code"] == EXIT_USER_ERROR
    assert "raise train.accumulation" in full.learnt["reason"]
    assert devices.REPEATED.search("device-side assert triggered")


def test_a_collective_that_failed_for_a_suspension_asks_for_a_new_start() -> None:
    """`scontrol suspend` for longer than engine.timeout: all ranks are alive, and their connections are not."""
    store = dist.HashStore()
    other = heartbeat.Heartbeat(store, 0, 2, 60)
    beating = heartbeat.Heartbeat(store, 1, 2, 60)
    beating.paused = 700.0
    error = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:525] Connection closed by peer")
    try:
        with pytest.raises(DeviceLost, match="rank 1: stood still for 700 s, as by `scontrol suspend`") as raised:
            process_group._leave_early(error, process_group.Ranks(1, 2, 1, torch.device("cpu")), beating)
    finally:
        beating.close()
        other.close()
    learnt = json.loads(store.get(heartbeat.EXITED))
    assert (learnt["code"], learnt["ranks"]) == (EXIT_LOST_RANK, [1])

    def fails() -> None:
        raise raised.value

    assert run_command(fails) == EXIT_LOST_RANK


def test_a_barrier_of_nccl_names_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else NCCL guesses the device, and prints a warning about it on each rank."""
    given: list[Any] = []
    stand_ins = {"is_initialized": lambda: True, "get_world_size": lambda: 2, "get_backend": lambda: "nccl"}
    for name, value in (stand_ins | {"barrier": lambda device_ids: given.append(device_ids)}).items():
        monkeypatch.setattr(torch.distributed, name, value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    process_group.barrier()
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    process_group.barrier()
    assert given == [[3], None]
