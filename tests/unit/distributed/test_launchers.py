"""Which rank a process is, by the environment alone: every launcher, and every mistake in one line."""

from __future__ import annotations

import random
from typing import Any

import pytest

from cpsp_dist.distributed.launchers import Place, first_host, launch_identity, port_of_job, read_place
from cpsp_dist.utils.command import should_print
from cpsp_dist.utils.errors import EXIT_USER_ERROR, UserError

MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SLURM = {"SLURM_JOB_ID": "70", "SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16"}
SLURM |= {"SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[003-004]"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, Place()),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **MASTER},
            Place(3, 4, 1, "node1", 29500, "RANK and WORLD_SIZE"),
        ),
        # a PyTorchJob of Kubernetes
        ({"RANK": "1", "WORLD_SIZE": "2", **MASTER}, Place(1, 2, 0, "node1", 29500, "RANK and WORLD_SIZE")),
        (SLURM, Place(9, 16, 1, "gpu003", 20070, "srun")),
        (SLURM | MASTER | {"WORLD_SIZE": "16"}, Place(9, 16, 1, "node1", 29500, "srun")),
        # torchrun in a step
        (
            SLURM | MASTER | {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "5"},
            Place(5, 8, 5, "node1", 29500, "RANK and WORLD_SIZE"),
        ),
        # a batch script is one process, whatever the job's tasks
        ({"SLURM_JOB_ID": "70", "SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, Place()),
        (
            OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"} | {"MASTER_PORT": "1234"},
            Place(1, 2, 1, "127.0.0.1", 1234, "mpirun (Open MPI)"),
        ),
        # mpirun in a Slurm job starts its daemons with srun
        (
            SLURM | OPEN_MPI | {"MASTER_ADDR": "gpu003"},
            Place(1, 2, 1, "gpu003", 20070, "mpirun (Open MPI)"),
        ),
        (
            {"MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_LOCAL_RANK": "0", **MASTER},
            Place(0, 4, 0, "node1", 29500, "mpirun (MVAPICH2)"),
        ),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", **MASTER},
            Place(1, 2, 1, "node1", 29500, "mpirun (PMI)"),
        ),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, Place(launcher="mpirun (PMI)")),
    ],
)
def test_each_launcher(env: dict[str, str], place: Place) -> None:
    assert read_place(env) == place


RANKS = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **MASTER}


@pytest.mark.parametrize(
    ("env", "named"),
    [
        (RANKS | {"RANK": ""}, "RANK=''"),
        (RANKS | {"RANK": "one"}, "RANK='one'"),
        (RANKS | {"RANK": "-1"}, "RANK='-1'"),
        (RANKS | {"RANK": "2"}, "rank 2 of 2"),
        (RANKS | {"RANK": "٣"}, "RANK="),
        (RANKS | {"RANK": "9" * 5000}, "RANK="),
        (RANKS | {"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        (RANKS | {"LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
        (RANKS | {"LOCAL_RANK": "7"}, "local rank 7 of 2"),
        (RANKS | {"MASTER_PORT": ""}, "MASTER_PORT=''"),
        (RANKS | {"MASTER_PORT": "0"}, "MASTER_PORT='0'"),
        (RANKS | {"MASTER_PORT": "99999"}, "MASTER_PORT='99999'"),
        (RANKS | {"MASTER_ADDR": ""}, "MASTER_ADDR=''"),
        (RANKS | {"MASTER_ADDR": "a\nb"}, "MASTER_ADDR="),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT='abc'"),
        ({"RANK": "0"}, "RANK is set but WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE='2' is set but RANK is not"),
        (SLURM | {"WORLD_SIZE": "4"}, "WORLD_SIZE=4, but SLURM_STEP_NUM_TASKS=16"),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu["}, "node list 'gpu['"),
        (OPEN_MPI, "export MASTER_ADDR"),  # on several machines, or on unknown ones
        ({"PMI_RANK": "1"}, "PMI_SIZE is not set"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "export MASTER_ADDR"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_variable(env: dict[str, str], named: str) -> None:
    with pytest.raises(UserError) as raised:
        read_place(env)
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


NAMES = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", *SLURM, *OPEN_MPI]
NAMES += [
    "SLURM_NTASKS",
    "SLURM_JOB_NODELIST",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE",
]
NAMES += ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "PMI_LOCAL_SIZE", "PMIX_NAMESPACE", "TORCHELASTIC_RUN_ID"]
VALUES = [
    "",
    "0",
    "1",
    "2",
    "3",
    "16",
    "-1",
    "1.5",
    "abc",
    "99999",
    "9" * 30,
    " 1",
    "1\n",
    "127.0.0.1",
    "node[1-2]",
    "[",
    "a,b",
]
VALUES += ["é", "\x1b[31m", "٣", "0x1", "1e3", "node1", "n-[001,3]-x[2-4],m"]


def test_any_environment_is_a_valid_world_or_one_line() -> None:
    """Random subsets and values; of the valid ones, more often than by chance, consistent ones."""
    draw = random.Random(7)
    valid, lines = 0, set[str]()
    for _ in range(20_000):
        env = {name: draw.choice(VALUES) for name in draw.sample(NAMES, draw.randrange(len(NAMES)))}
        if draw.random() < 0.5:
            env |= draw.choice([RANKS, SLURM, OPEN_MPI | MASTER])
            env |= {draw.choice(NAMES): draw.choice(VALUES)}
        try:
            place = read_place(env)
        except UserError as error:
            lines.add(str(error))
            continue
        valid += 1
        assert 0 <= place.rank < place.world, env
        assert 0 <= place.local_rank < place.world, env
        assert 0 <= place.port < 65536, env
        assert place.world == 1 or (place.address.isprintable() and place.port), env
        assert isinstance(should_print(UserError("x"), env), bool)
        launch_identity(place, env)
    assert valid > 1000
    assert all(line.isprintable() and len(line) < 300 for line in lines)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node[001-002]", "node001"),
        ("node[7,9-11],other[1-2]", "node7"),
        ("login,node[1-2]", "login"),
        ("rack[1-2]-gpu[03-04].cluster", "rack1-gpu03.cluster"),
        ("a-b_c.d,e", "a-b_c.d"),
    ],
)
def test_the_first_host_needs_no_scontrol(monkeypatch: pytest.MonkeyPatch, nodes: str, host: str) -> None:
    """A3: containers have none."""
    monkeypatch.setenv("PATH", "")
    assert first_host(nodes) == host


def test_each_step_of_a_job_has_a_port_of_its_own() -> None:
    """C6: the second step's ranks would join the first's."""
    ports = [port_of_job({"SLURM_JOB_ID": "123456", "SLURM_STEP_ID": str(step)}) for step in range(100)]
    assert len({*ports}) == 100
    assert all(20000 <= port < 32000 for port in ports)
    places = [read_place(SLURM | {"SLURM_STEP_ID": step}) for step in "01"]
    assert places[0].port != places[1].port
    assert launch_identity(places[0], SLURM) != launch_identity(places[0], SLURM | {"SLURM_STEP_ID": "1"})


@pytest.mark.parametrize(
    ("variables", "named"), [({"MASTER_PORT": "abc"}, "MASTER_PORT='abc'"), (RANKS | {"RANK": ""}, "RANK=''")]
)
@pytest.mark.parametrize("command", ["train", "dry-run", "doctor", "evaluate", "export"])
def test_every_command_reports_it_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, command: str, variables: dict[str, str], named: str
) -> None:
    from cpsp_dist.cli import main

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("cpsp_dist.utils.command._local_rank", None)
    monkeypatch.setenv("LOCAL_RANK", "0")
    arguments = {
        "train": ["train", "--config", "keypad"],
        "dry-run": ["train", "--config", "keypad", "--dry-run"],
        "doctor": ["doctor"],
        "evaluate": ["evaluate", "no-run"],
        "export": ["export", "no-run", "--out", "no-model"],
    }[command]
    assert main(arguments) == EXIT_USER_ERROR
    lines = "".join(capsys.readouterr()).splitlines()
    assert len(lines) == 1
    assert named in lines[0]
