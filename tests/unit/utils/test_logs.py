"""Where log records go: console of rank 0 and of others, files in a run's folder, and what never gets there."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from cpsp_dist.cli import main
from cpsp_dist.utils import logs
from cpsp_dist.utils.command import run_command
from cpsp_dist.utils.errors import Stopped, UserError

logger = logging.getLogger("cpsp_dist.some.module")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_LOCALID", "SLURM_PROCID", "CPSP_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(logs.socket, "gethostname", lambda: "node7")


def print_all() -> None:
    logger.debug("detail")
    logger.info("step 1")
    logger.warning("slow")
    logger.error("broken")


def test_the_console_of_rank_0(capsys: pytest.CaptureFixture[str]) -> None:
    with logs.console(stdout=True):
        print_all()
    assert capsys.readouterr() == ("step 1\n", "warning: slow\nerror: broken\n")
    with logs.console():
        print_all()
    assert capsys.readouterr() == ("", "step 1\nwarning: slow\nerror: broken\n")


def test_a_command_inside_a_command_prints_once(capsys: pytest.CaptureFixture[str]) -> None:
    with logs.console():
        with logs.console(stdout=True):
            print_all()
        logger.info("step 2")
    assert capsys.readouterr() == ("step 1\n", "warning: slow\nerror: broken\nstep 2\n")


def test_other_ranks_print_warnings_with_their_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    with logs.console(stdout=True):
        print_all()
    assert capsys.readouterr() == ("", "warning: [rank 3] slow\nerror: [rank 3] broken\n")


def test_after_a_command_everything_is_as_before(caplog: pytest.LogCaptureFixture) -> None:
    project = logging.getLogger("cpsp_dist")
    before = (project.level, project.propagate, [*project.handlers])
    run_command(print_all, debug=True)
    assert (project.level, project.propagate, [*project.handlers]) == before


def test_control_characters_and_secrets_are_not_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with logs.console(), logs.run_log(tmp_path, 0):
        logger.warning("video \x1b[31m\rx\u202e of https://me:hunter22@host/a?X-Sig=0123456789")
    line = r"video \x1b[31m\rx\u202e of https://host/a"
    assert capsys.readouterr().err == f"warning: {line}\n"
    assert line in (tmp_path / "logs" / "rank0.log").read_text()


def raise_mistake() -> None:
    raise UserError("mistake")


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_debug_adds_tracebacks(how: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_command(raise_mistake) == 2
    assert capsys.readouterr().err == "error: mistake\n"
    if how == "environment":
        monkeypatch.setenv("CPSP_DEBUG", "1")
    assert run_command(raise_mistake, debug=how == "flag") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: mistake\nTraceback (most recent call last):\n")
    assert "in raise_mistake" in err


@pytest.mark.parametrize("place", [1, 3])
def test_debug_is_taken_in_front_of_a_command_and_behind_it(place: int, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["shards", "info", "no-such-folder"]
    assert main([*arguments[: place - 1], "--debug", *arguments[place - 1 :]]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_file_of_rank_0_has_everything_with_time_and_rank(tmp_path: Path) -> None:
    def work() -> None:
        print_all()
        raise_mistake()

    with pytest.raises(UserError), logs.run_log(tmp_path, 0):
        work()
    first, *lines = (tmp_path / "logs" / "rank0.log").read_text().splitlines()
    assert " rank 0 info cpsp_dist: cpsp-dist " in first
    assert [line[20:] for line in lines[:4]] == [
        "rank 0 info cpsp_dist.some.module: step 1",
        "rank 0 warning cpsp_dist.some.module: slow",
        "rank 0 error cpsp_dist.some.module: broken",
        "rank 0 error cpsp_dist: UserError: mistake",
    ]
    assert lines[4] == "    Traceback (most recent call last):"
    assert lines[-1].endswith("UserError: mistake")


def test_other_ranks_share_a_file_of_their_machine_that_is_made_when_needed(tmp_path: Path) -> None:
    for rank in (1, 2):
        with logs.run_log(tmp_path, rank):
            logger.info("step 1")
        with pytest.raises(Stopped), logs.run_log(tmp_path, rank):
            raise Stopped("SIGTERM: saved")
    assert not [*tmp_path.iterdir()]
    for rank in (1, 2):
        with logs.run_log(tmp_path, rank):
            logger.warning("slow")
    lines = (tmp_path / "logs" / "node7.log").read_text().splitlines()
    assert [line[20:] for line in lines] == [f"rank {rank} warning cpsp_dist.some.module: slow" for rank in (1, 2)]


def test_records_wait_for_the_folder_and_a_resume_appends(tmp_path: Path) -> None:
    output = tmp_path / "run"
    with logs.run_log(output, 0):
        logger.warning("early")
        assert not output.exists()
        output.mkdir()
        logger.warning("later")
    with logs.run_log(output, 0):
        logger.warning("resumed")
    text = (output / "logs" / "rank0.log").read_text()
    assert [line.split(": ")[1] for line in text.splitlines() if " warning " in line] == ["early", "later", "resumed"]


def test_the_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LARGEST", 2000)
    for rank in (0, 1):
        with logs.run_log(tmp_path, rank):
            for _ in range(200):
                logger.warning("x" * 80)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "logs").iterdir()}
    assert {*sizes} == {"rank0.log", "rank0.log.1", "node7.log"}
    assert max(sizes.values()) < 2000 + 400


def test_a_folder_that_takes_no_file_costs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").write_text("in the way")
    with logs.console(), logs.run_log(tmp_path, 0):
        logger.warning("slow")
    assert capsys.readouterr().err == "warning: slow\n"
