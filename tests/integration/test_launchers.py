"""One training entry, many launchers: the same loss to the last digit on one seed.

The others (srun, submitit) are in the tests of Slurm; `LAUNCHED` and `conftest.loss_history` are for them too.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.environment import REPO, environment, free_port
from tests.support.runs import KEYPAD, loss_history, overrides

ACCELERATE = REPO / "configs" / "accelerate"
#: What every launcher runs, on top of `overrides(shards, output)`.
LAUNCHED = ["train.steps=2", "tracking.every_steps=1", "tracking.enabled=false", "model.dropout=0.1"]


def arguments(shards: Path, output: Path) -> list[str]:
    return ["--config", str(KEYPAD), *overrides(shards, output, *LAUNCHED)]


def accelerate(file: str, *more: str) -> list[str]:
    return ["-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE / file), *more, "-m"]


def launch(commands: list[list[str]], arguments: list[str], folder: Path) -> None:
    """Start each of `commands` (Python's arguments up to the module) in `folder`, as their home too, and wait."""
    (folder / "home").mkdir(exist_ok=True)
    env = environment(HOME=str(folder / "home"), TORCH_CPP_LOG_LEVEL="ERROR")
    started = []
    for number, command in enumerate(commands):
        log = folder / f"{Path(arguments[2]).name}{number}.log"
        with open(log, "w") as file:
            arguments_of_rank = [sys.executable, *command, "cpsp_dist.train", *arguments]
            started.append((subprocess.Popen(arguments_of_rank, env=env, cwd=folder, stdout=file, stderr=file), log))
    try:
        codes = [process.wait(timeout=240) for process, _ in started]
        assert codes == [0] * len(codes), "\n".join(log.read_text()[-4000:] for _, log in started)
    finally:
        for process, _ in started:
            process.kill()
            process.wait()


def commands_of(name: str) -> list[list[str]]:
    """The commands that together are one start, up to the module; the name begins with the number of ranks."""
    address = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    return {
        "1-python": [["-m"]],
        "2-torchrun": [["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]],
        "2-accelerate": [accelerate("one_machine.yaml", "--main_process_port", str(free_port()))],
        "2-accelerate-two-machines": [
            accelerate("two_machines.yaml", *address, "--machine_rank", str(machine)) for machine in (0, 1)
        ],
    }[name]


@pytest.fixture(scope="module")
def plain(prefork: Any, keypad_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Any]:
    """Number of ranks -> losses of the same command in a launcher's environment without a launcher."""

    @functools.cache
    def losses(world: int) -> list[dict[str, float]]:
        output = tmp_path_factory.mktemp("plain") / "run"
        prefork.start(arguments(keypad_shards, output), world).finish()
        found = loss_history(output)
        assert len(found) == 2
        return found

    return losses


@pytest.mark.parametrize("name", ["2-torchrun", "2-accelerate"])
def test_the_same_loss_in_forked_ranks(
    plain: Any, prefork: Any, keypad_shards: Path, tmp_path: Path, name: str
) -> None:
    (command,) = commands_of(name)
    run = [*command, "cpsp_dist.train", *arguments(keypad_shards, tmp_path / "run")]
    prefork.start(run, 1, command="tests.support.forked_launcher", HOME=str(tmp_path)).finish()
    assert loss_history(tmp_path / "run") == plain(2)
    assert plain(2) != plain(1), "dropout differs by rank: ranks that did not meet would show"


@pytest.mark.long
@pytest.mark.parametrize("name", ["1-python", "2-torchrun", "2-accelerate", "2-accelerate-two-machines"])
def test_the_same_loss_under_every_launcher(plain: Any, keypad_shards: Path, tmp_path: Path, name: str) -> None:
    """And none of them leaves the environment, with what is secret in it, in a file."""
    launch(commands_of(name), arguments(keypad_shards, tmp_path / name), tmp_path)
    assert loss_history(tmp_path / name) == plain(int(name[0]))
    assert not list(tmp_path.rglob(".deepspeed_env"))


@pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.name)
def test_no_shipped_file_uses_pdsh(path: Path) -> None:
    """It starts jobs that do not know of each other, and writes all of the environment to `.deepspeed_env`."""
    settings = yaml.safe_load(path.read_text())
    assert settings["deepspeed_config"]["deepspeed_multinode_launcher"] == "standard"
    assert "pdsh" not in str(settings)
