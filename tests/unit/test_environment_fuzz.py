"""Random subsets and values of the variables that launchers, MLflow and users set: what a command does is correct, or
one line says what is wrong. In processes of their own."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cpsp_dist.tracking.store import Store
from cpsp_dist.utils.errors import EXIT_LOST_RANK, EXIT_USER_ERROR
from cpsp_dist.utils.logs import printable
from tests.support.forked_command import Ended, run
from tests.support.runs import arguments

SECRET = "s3cr3tpw-0817"
#: Environments that launchers set for one process, of which a case takes parts.
ONE_PROCESS: tuple[Mapping[str, str], ...] = (
    {},
    {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"},
    {
        "SLURM_JOB_ID": "70",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "0",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_LOCALID": "0",
    },
    {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
    {"ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"},
)
NUMBERS = (
    "",
    "0",
    "1",
    "2",
    "-1",
    "01",
    " 1",
    "1.0",
    "abc",
    "9" * 400,
    str(2**63),
    "\u0663",
    "\x1b[31m",
    "a\nb",
    "\udcff",
)
LAUNCHER: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "LOCAL_WORLD_SIZE"), NUMBERS),
    "MASTER_ADDR": ("", "localhost", "no-such-host.invalid", "a b", "[::1]", "\x1b[2J", "x" * 5000, "999.1.1.1"),
    **{f"SLURM_{name}": NUMBERS for name in ("JOB_ID", "STEP_ID", "PROCID", "NTASKS", "LOCALID", "STEP_NUM_TASKS")},
    **{
        f"SLURM_{name}": NUMBERS for name in ("CPUS_PER_TASK", "GPUS_ON_NODE", "STEP_GPUS", "JOB_GPUS", "RESTART_COUNT")
    },
    "SLURM_STEP_NODELIST": ("", "n[1-2]", "n[", "n1,n2", "\x1b"),
    **{f"OMPI_COMM_WORLD_{name}": NUMBERS for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")},
    "ACCELERATE_USE_DEEPSPEED": ("true", "", "1", "\x1b[2J"),
    "ACCELERATE_MIXED_PRECISION": ("bf16", "fp16", "fp8", "", "\x1b[2J"),
    "ACCELERATE_GRADIENT_CLIPPING": NUMBERS,
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": NUMBERS,
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": NUMBERS,
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("", "none", "/nowhere/x.json", ".", "\x1b[2J", "x" * 5000),
    "ACCELERATE_DYNAMO_BACKEND": ("INDUCTOR", "", "\x1b[2J"),
    "TORCHELASTIC_RUN_ID": ("none", "", "\x1b[2J"),
    "TORCHELASTIC_RESTART_COUNT": NUMBERS,
}
URIS = ("", "nonsense", "http://127.0.0.1:1", f"http://u:{SECRET}@127.0.0.1:1/", "sqlite:////nowhere/x.db", "sqlite://")
URIS += ("sqlite:///", "sqlite:///.", "file:///nowhere", "databricks", f"postgresql://u:{SECRET}@127.0.0.1:1/d", "uc:x")
URIS += ("http://[::1", "\x1b[2J", "http://", f"s3://{SECRET}@b", "x" * 5000, "http://a b", "\udcff", "http://h:99999")
SERVICE: Mapping[str, tuple[str, ...]] = {
    "MLFLOW_TRACKING_URI": URIS,
    "MLFLOW_TRACKING_USERNAME": ("me", "", "\x1b"),
    "MLFLOW_TRACKING_PASSWORD": (SECRET, ""),
    "MLFLOW_TRACKING_TOKEN": (SECRET, "", "a\nb"),
    "MLFLOW_HTTP_REQUEST_TIMEOUT": ("1", "2", "0", "-1", "abc", ""),
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": ("0", "1", "-1", "abc", ""),
    "MLFLOW_RUN_ID": ("x", "", "\x1b"),
    "MLFLOW_EXPERIMENT_ID": NUMBERS,
    "MLFLOW_EXPERIMENT_NAME": ("", "x", "\x1b"),
    "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": NUMBERS[:9],
    "MLFLOW_LOGGING_LEVEL": ("DEBUG", "", "abc"),
    "MLFLOW_TRACKING_INSECURE_TLS": ("true", "", "abc"),
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": ("true", "abc"),
}
PLACES = ("", "/nowhere", "/dev/null", ".", "\udcff", "~", "x" * 5000)
PLACE: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "CPSP_CACHE"), PLACES),
    "LC_ALL": ("C", "POSIX", "tr_TR.UTF-8", "nonsense", ""),
    "COLUMNS": NUMBERS,
    "TERM": ("", "dumb", "\x1b"),
    "NO_COLOR": ("1", ""),
    "CPSP_DEBUG": ("", "0"),
    "OMP_NUM_THREADS": ("1", "2"),
}
#: PYTHONIOENCODING, which is read before there is a command.
ENCODINGS = (None, None, "ascii", "latin-1", "utf-16", "cp1252")


def case(draw: random.Random, waits: bool) -> tuple[dict[str, str], str | None]:
    """Variables and the encoding of the streams. waits: for a second rank that never comes, too."""
    env = dict(draw.choice(ONE_PROCESS))
    for name in draw.sample([*env], k=draw.choice((0, 0, 1, len(env))) if env else 0):
        del env[name]
    for among, most in ((LAUNCHER, 2), (SERVICE, 3), (PLACE, 2)):
        for name in draw.sample([*among], k=draw.randrange(most + 1)):
            env[name] = draw.choice(among[name])
    if not waits:
        env = {name: value for name, value in env.items() if value != "2" or not re.search("SIZE|TASKS", name)}
    return {name: value for name, value in env.items() if name != "LC_ALL" or value}, draw.choice(ENCODINGS)


@pytest.fixture(scope="module")
def commands(keypad_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("environment")
    training = arguments(keypad_shards, folder / "run", "engine.kind=ddp", "engine.timeout=10", "train.steps=1")
    Store(f"sqlite:///{folder}/mlflow.db").create_experiment("cpsp")
    return {
        "train": [*training, "--dry-run"],
        "doctor": ["doctor", *training, "--timeout", "2"],
        "compare": ["compare", "--uri", f"sqlite:///{folder}/mlflow.db"],
        "compare by environment": ["compare"],
    }


def check(name: str, ended: Ended, clean: Ended) -> None:
    """Whether it did what it does in a clean environment, or refused in one line."""
    printed = ended.out + ended.err
    assert "Traceback" not in printed
    assert SECRET not in printed
    assert all(printable(line) == line for line in printed.splitlines())
    assert max(map(len, printed.splitlines()), default=0) < 1000
    assert ended.code in (0, EXIT_USER_ERROR, EXIT_LOST_RANK)
    assert ended.seconds < 20
    if name == "doctor":
        *lines, last = ended.out.splitlines()
        assert all(re.match(r"(ok|warning|error) +\S+ |   ", line) for line in [*lines, last][: -1 if lines else None])
        assert any(line.startswith("error") for line in [*lines, last]) == (ended.code != 0)
        return
    if ended.code == 0:
        for pattern in (r"^  loss .*$", r"^Nothing was written\.$", r"^experiment .*$"):
            assert re.findall(pattern, ended.out, re.MULTILINE) == re.findall(pattern, clean.out, re.MULTILINE)
    else:
        found = [line for line in ended.err.splitlines() if not line.startswith(("warning: ", "  "))]
        assert len(found) == 1
        assert found[0].startswith("error: ")


def fuzz(prefork: Any, folder: Path, commands: dict[str, list[str]], first: int, seconds: float, waits: bool) -> int:
    """How many cases were tried, each of another seed."""
    clean: dict[str, Ended] = {}

    def ended(name: str, env: Mapping[str, str], encoding: str | None) -> Ended:
        module = "cpsp_dist.train" if name == "train" else "cpsp_dist.cli"
        return run(prefork, folder, commands[name], command=module, env=env, encoding=encoding)

    end, number = time.monotonic() + seconds, first
    while time.monotonic() < end:
        draw = random.Random(number)
        name = draw.choice([*commands])
        env, encoding = case(draw, waits)
        if name not in clean:
            clean[name] = ended(name, {}, None)
        before = {*folder.rglob("*")}
        found = ended(name, env, encoding)
        try:
            check(name, found, clean[name])
            assert {*folder.rglob("*")} == before
        except AssertionError as error:
            what = f"case {number}: {name} with {env}, {encoding}: exit code {found.code}, {found.seconds:.1f} s"
            raise AssertionError(f"{what}\n{found.out[-3000:]}\n{found.err[-3000:]}") from error
        number += 1
    return number - first


def test_a_few_environments(prefork: Any, commands: dict[str, list[str]], tmp_path: Path) -> None:
    assert fuzz(prefork, tmp_path, commands, 0, 3, waits=False)


@pytest.mark.long
def test_many_environments(prefork: Any, commands: dict[str, list[str]], tmp_path: Path) -> None:
    assert fuzz(prefork, tmp_path, commands, 1000, 40, waits=True) > 3
