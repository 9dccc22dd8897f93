"""`cpsp-dist launch` without a Slurm: what it refuses, prints, pickles and names; training on this machine's ranks."""

from __future__ import annotations

import csv
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
from cpsp_dist.config import load_config, loading
from cpsp_dist.config.yaml_text import read_yaml
from cpsp_dist.launch import files, jobs
from cpsp_dist.launch.cluster import Resources, batch_file
from cpsp_dist.launch.jobs import Job, State
from cpsp_dist.launch.sweep import plan_runs, with_parent
from cpsp_dist.tracking.runs import find_runs
from cpsp_dist.tracking.sweeps import close_sweep, open_sweep
from cpsp_dist.utils import processes
from cpsp_dist.utils.errors import ConfigError
from tests.support.environment import REPO, environment
from tests.support.limits import SECONDS
from tests.support.runs import KEYPAD, loss_history, newest_weights, overrides
from tests.support.runs import sweep_parents as parents

QUICK = ["train.steps=3", "tracking.every_steps=1"]


def launch(*arguments: str, timeout: float = 180, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cpsp_dist", "launch", *arguments]
    return subprocess.run(
        command, env=environment(**env), cwd=REPO, capture_output=True, text=True, errors="replace", timeout=timeout
    )


def stub(folder: Path, name: str, script: str) -> None:
    """A command of that name for a PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


# Sweeps


def test_a_sweep_has_a_run_for_each_combination():
    sweeps = ["train.seed=1,2", "objectives.psa_v=0,0.5", "train.milestones=[6,9],[4]"]
    output, runs = plan_runs(KEYPAD, ["output=runs/s", "tracking.run_name=all"], sweeps)
    assert output == "runs/s"
    assert len({run.name for run in runs}) == 8
    assert [run.name for run in runs[:3]] == [
        "psa_v=0,milestones=6_9,seed=1",
        "psa_v=0,milestones=4,seed=1",
        "psa_v=0.5,milestones=6_9,seed=1",
    ]
    for run in runs:
        seed = int(run.name[-1])
        expected = load_config(
            KEYPAD,
            [
                f"output=runs/s/{run.name}",
                f"train.seed={seed}",
                f"objectives.psa_v={0.5 if 'psa_v=0.5' in run.name else 0}",
                f"train.milestones={[6, 9] if '6_9' in run.name else [4]}",
            ],
        )
        assert run.config == expected


def test_keys_with_one_last_part_are_named_in_full():
    _, runs = plan_runs(KEYPAD, [], ["checkpoint.every_steps=1", "tracking.every_steps=2"])
    assert [run.name for run in runs] == ["checkpoint.every_steps=1,tracking.every_steps=2"]
    _, (alone,) = plan_runs(KEYPAD)
    assert alone.name == ""
    assert alone.config == load_config(KEYPAD)


def test_every_mistake_of_a_sweep_is_reported_at_once():
    sweeps = [
        "train.seed=1,x",
        "train.gama=1",
        "output=a,b",
        "pool.bank=0,8",
        "data.reader_threads=1,1",
        "train.epochs",
    ]
    sweeps += ["pool.bank=1", "data.prefetch_batches=2"]
    with pytest.raises(ConfigError) as raised:
        plan_runs(KEYPAD, ["pool.scope=local", "evaluation.bach=3", "data.prefetch_batches=4"], sweeps)
    assert str(raised.value).splitlines() == [
        f"{KEYPAD}: ",
        "  --sweep output: a sweep sets it for each of its runs",
        "  --sweep 'data.reader_threads=1,1': a value stands there twice",
        "  --sweep 'train.epochs': write it as section.key=value,value,...",
        "  --sweep pool.bank: is given twice; list all values in one",
        "  --sweep data.prefetch_batches: also stands among the overrides; take it out of there",
        "  unknown key 'train.gama'; did you mean 'train.gamma'?",
        "  unknown key 'evaluation.bach'; did you mean 'evaluation.global_batch'?",
        "  gama=1,bank=8,seed=1: pool: bank=8 needs scope=gather: every rank remembers the same videos",
        "  gama=1,bank=0,seed=x: train.seed='x': input should be a valid integer",
    ]


def test_the_files_of_a_sweep_are_read_once(monkeypatch):
    """Thousands of runs would take a minute else."""
    files = []
    monkeypatch.setattr(loading, "read_yaml", lambda path: files.append(path) or read_yaml(path))
    _, runs = plan_runs("ave_full", ["data.shards=s"], [f"train.seed={','.join(map(str, range(200)))}"])
    assert [run.config.train.seed for run in runs] == [*range(200)]
    assert len(files) == len({*files})


@pytest.mark.long
def test_the_largest_sweep():
    began = time.process_time()
    _, runs = plan_runs(KEYPAD, [], ["train.seed=1,2", f"train.epochs={','.join(map(str, range(1, 2501)))}"])
    assert len({run.config.output for run in runs}) == 5000
    assert time.process_time() - began < SECONDS


def test_a_sweep_of_too_many_runs_or_mistakes_is_a_few_lines():
    many = ",".join(map(str, range(2, 302)))
    with pytest.raises(ConfigError, match=r"a sweep of 27,000,000 runs; 5,000 are the most, split it into several$"):
        plan_runs(KEYPAD, [], [f"train.{key}={many}" for key in ("seed", "epochs", "steps")])
    with pytest.raises(ConfigError) as raised:
        plan_runs(KEYPAD, [], [f"train.gamma={many}"])
    lines = str(raised.value).splitlines()
    assert lines[1] == "  gamma=2: train.gamma=2: input should be less than or equal to 1"
    assert lines[-1] == "  and 260 more mistakes"
    assert len(lines) == 42


# Before anything is submitted


def test_mistakes_are_refused_before_anything_is_submitted(tmp_path, monkeypatch, capsys):
    stub(tmp_path / "bin", "sbatch", f"touch {tmp_path}/submitted")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    ours = ["launch", str(KEYPAD), f"output={tmp_path}/out"]
    secret = "data.shards=https://me:s3cret@example.org/shards"
    for arguments, message in [
        (["train.sed=2"], "unknown key 'train.sed'; did you mean 'train.seed'?"),
        (["--nodes", "2", "train.sed=2", "--local"], "unknown key 'train.sed'"),  # behind a flag, too
        (["--sweep", "train.sed=1,2"], "unknown key 'train.sed'"),
        ([secret], "https://example.org/shards is given with a password or signature"),
        (["--slurm", "ntasks=4"], "--slurm ntasks: that is decided by --nodes and --ranks-per-node"),
        (["--local", "--nodes", "2"], "--local is one machine"),
        (["--status", str(tmp_path)], "--status asks for what was launched"),
    ]:
        assert main([*ours, *arguments]) == 2, arguments
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        assert message in line
        assert "s3cret" not in line
    assert main(["launch", "--status", str(tmp_path)]) == 2
    assert "nothing was launched here" in capsys.readouterr().err
    assert main(["launch"]) == 2
    assert not (tmp_path / "submitted").exists()
    assert not (tmp_path / "out").exists()


SEEDS = ["--sweep", "train.seed=1,2"]


@pytest.mark.parametrize(
    ("output", "more", "message"),
    [
        ("pipe", [], "cannot write the launch's files: [Errno 20] Not a directory"),
        ("loop", [], "cannot write the launch's files: [Errno 40] Too many levels of symbolic links"),
        ("out", SEEDS, "cannot write the launch's files: [Errno 17] File exists"),
        ("a%b", [], "Slurm and submitit replace '%'"),
        ("new", ["--gpus-per-node", "2"], "--gpus-per-node 2, but CUDA_VISIBLE_DEVICES=0"),
        ("new", [*SEEDS, "tracking.uri=sqlite:////proc/none/no.db"], "No such file or directory"),
        pytest.param(
            *("new", [*SEEDS, "tracking.uri=sqlite:///pipe"], "not a regular file"), marks=pytest.mark.long
        ),  # imports MLflow
    ],
)
def test_the_dry_run_refuses_what_a_launch_would(output, more, message, tmp_path, monkeypatch, capsys):
    """In the same words; nothing is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out/seed=2")
    command, lines = ["launch", str(KEYPAD), f"output={output}", "--local", *more], []
    for how in ([], ["--dry-run"]):
        before = sorted(tmp_path.rglob("*"))
        assert main([*command, *how]) == 2, how
        lines += capsys.readouterr().err.splitlines()
        assert sorted(tmp_path.rglob("*")) == before
    assert len(lines) == 2
    assert message in lines[0]
    assert lines[0].partition("slurm/")[0] == lines[1].partition("slurm/")[0], "up to the time"


def test_without_slurm_local_is_proposed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", str(KEYPAD), f"output={tmp_path}/out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: no sbatch here, so this machine is no part of a Slurm cluster; --local trains on it alone"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sweep", [False, True])
def test_a_refused_submission_is_one_line_and_leaves_no_files(tmp_path, monkeypatch, capfd, sweep):
    stub(tmp_path / "bin", "sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    stub(tmp_path / "bin", "srun", "exit 1")  # submitit looks for it before it hands in an array
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    more = ["--sweep", "train.seed=1,2"] if sweep else []
    assert main(["launch", str(KEYPAD), f"output={tmp_path}/out", "--partition", "gpu", *more]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line == "error: Slurm refuses the job: invalid partition specified: gpu"
    if sweep:
        assert [run["status"] for run in parents(tmp_path / "out")] == ["FAILED"]
    assert not (tmp_path / "out").exists()


# The batch file


def test_dry_run_prints_the_batch_file_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm needed
    monkeypatch.chdir(tmp_path)
    flags = ["--nodes", "4", "--gpus-per-node", "8", "--cpus-per-task", "6", "--time", "1-00:00:00", "--mem", "64G"]
    flags += ["--partition", "gpu", "--account", "lab", "--qos", "long", "--slurm", "constraint=h100"]
    flags += ["--slurm", "exclusive", "--setup", "module load cuda", "--parallel", "2", "--dry-run"]
    assert main(["launch", str(KEYPAD), "output=runs/big", "--sweep", "train.seed=1,2,3", *flags]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == "#!/bin/bash"
    asked = sorted(line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH"))
    folder = asked[11].removeprefix("output=").removesuffix("/%A_%a_batch.out")
    assert folder.startswith(f"{tmp_path}/runs/big/slurm/20")
    assert asked == [
        "account=lab",
        "array=0-2%2",
        "constraint=h100",
        "cpus-per-task=6",
        "exclusive",
        "gpus-per-node=8",
        "job-name=big",
        "mem=64G",
        "nodes=4",
        "ntasks-per-node=8",
        "open-mode=append",
        f"output={folder}/%A_%a_batch.out",
        "partition=gpu",
        "qos=long",
        "requeue",
        "signal=USR2@300",  # to all ranks; not B:, which is the script's alone
        "time=1-00:00:00",
    ]
    (command,) = [line for line in lines if line.startswith("srun ")]
    assert command.startswith(f"srun --unbuffered --output {folder}/%A_%a_%t_log.out ")
    assert command.endswith(f"{sys.executable} -u -m submitit.core._submit {folder}")
    assert lines.index("module load cuda") < lines.index(command)
    assert "seed=2: output runs/big/seed=2" in printed.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("codes", "requeues", "end"),
    [
        ([0], 0, 0),
        ([2], 0, 2),  # a user's mistake
        ([1], 0, 1),
        ([75, 75, 75, 75, 75, 0], 5, 0),  # stopped and saved: as often as the cluster likes
        ([69, 137, 0], 2, 0),  # a lost rank, a killed one
        ([137, 143, 75, 69, 137], 4, 137),  # not for ever
    ],
)
def test_the_batch_file_asks_for_a_requeue_as_the_exit_code_asks(tmp_path, codes, requeues, end):
    """The very file, under bash, with an srun that ends with these codes, one a start, and an scontrol that notes."""
    _, runs = plan_runs(KEYPAD, [f"output={tmp_path}/out"])
    stub(tmp_path / "bin", "srun", f'read -r code <{tmp_path}/codes; sed -i 1d {tmp_path}/codes; exit "$code"')
    stub(tmp_path / "bin", "scontrol", f"echo $* >>{tmp_path}/asked; kill $PPID")  # as Slurm ends the script
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    text = batch_file(runs, f"{tmp_path}/out", "name", Resources())
    (output,) = [line for line in text.splitlines() if "--output=" in line]
    Path(output.partition("=")[2]).parent.mkdir(parents=True)
    env = environment(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", SLURM_JOB_ID="12")
    for start in range(len(codes)):
        done = subprocess.run(["bash", "-c", text], env=env, timeout=30, capture_output=True, text=True)
        left = list((tmp_path / "out").rglob("12_exit"))
        assert bool(left) == (start == len(codes) - 1), "the exit code is there when the job will not start again"
    assert done.returncode == end, done.stderr
    assert int(left[0].read_text()) == end
    asked = (tmp_path / "asked").read_text().splitlines() if requeues else []
    assert asked == ["requeue 12"] * requeues


# States


def test_states_of_jobs(tmp_path, monkeypatch):
    """As a real squeue and sacct put it; the exit code that a job left is the last word."""
    found = [Job(f"7_{number}", f"seed={number}", "out", str(tmp_path), "slurm") for number in range(6)]
    lines = ["7_2|PENDING|JobArrayTaskLimit", "7_0|RUNNING|None", "7_1|COMPLETED|None", "7_3|CANCELLED|None"]
    stub(tmp_path / "bin", "squeue", "\n".join(f"echo '{line}'" for line in lines))
    stub(tmp_path / "bin", "sacct", "echo '7_4|CANCELLED by 1000'; echo '7_0|NODE_FAIL'")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "7_1_exit").write_text("69\n")
    assert list(jobs.states(found).values()) == [
        State("FAILED", code=69),
        State("RUNNING"),
        State("PENDING", "JobArrayTaskLimit"),
        State("CANCELLED"),
        State("CANCELLED"),
        State("UNKNOWN", "Slurm does not know it"),
    ]
    stub(tmp_path / "bin", "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert jobs.states(found[:1])["7_0"].reason.endswith("Unable to contact slurm controller")
    assert not jobs.states(found[:1])["7_0"].ended


def test_a_local_job_is_known_by_more_than_its_number(tmp_path):
    """Which is given to other processes again, and is another's on another machine."""
    mine = processes.identity(os.getpid())
    machine, _, began = mine.rpartition(" ")
    found = {
        mine: State("RUNNING"),
        f"{machine} {int(began) - 1}": State("FAILED", "its launcher was killed"),
        f"another boot {began}": State("UNKNOWN", "it was started on another machine, or before this one was started"),
        "": State("UNKNOWN", "it was started on another machine, or before this one was started"),
    }
    for process, state in found.items():
        jobs.save_jobs(tmp_path, [Job(str(os.getpid()), "", "out", str(tmp_path), "local", process)])
        assert [*jobs.states(jobs.load_jobs(tmp_path)).values()] == [state], process


def test_a_forgotten_job_ends_the_wait(tmp_path, monkeypatch, capsys):
    """No accounting, and the controller has forgotten it: it is not waited for without end."""
    stub(tmp_path / "bin", "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    stub(tmp_path / "bin", "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(jobs, "ASK", 0.1)
    monkeypatch.setattr(jobs, "PATIENCE", 0.5)
    jobs.save_jobs(tmp_path, [Job("7", "", "out", str(tmp_path), "slurm")])
    assert main(["launch", "--status", str(tmp_path), "--follow"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "out: job 7 is unknown: Slurm does not know it"
    assert printed[-1] == "out: failed, Slurm does not know it, and it left no exit code; it printed nothing"


# On this machine


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


# One MLflow run above a sweep


@pytest.mark.long
def test_a_sweep_is_one_run_with_its_runs_below(prefork, keypad_shards, tmp_path, monkeypatch, capsys):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    output = tmp_path / "tried"
    settings = overrides(keypad_shards, output, *QUICK)
    _, runs = plan_runs(KEYPAD, settings, ["train.seed=1,2"])
    parent = open_sweep(runs[0].config, str(output), len(runs))
    for number, run in enumerate(runs):
        more = [f"output={run.config.output}", f"train.seed={run.config.train.seed}", f"tracking.parent={parent}"]
        more.append(f"tracking.uri={run.config.tracking.uri}")
        prefork.start(["--config", str(KEYPAD), *settings, *more], 1).finish()
        config = load_config(KEYPAD, [*settings, *more])
        close_sweep(config)  # as each job does at its end
        status = "RUNNING" if number == 0 else "FINISHED"
        assert parents(output) == [{"id": parent, "name": "tried", "status": status}]
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    below = client.search_runs([client.get_run(parent).info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert {run.info.run_name for run in below} == {"seed=1", "seed=2"}
    rows = list(csv.DictReader(Path(client.download_artifacts(parent, "comparison.csv")).read_text().splitlines()))
    accuracies = {run.info.run_name: run.data.metrics["accuracy/test"] for run in below}
    assert {row["run"]: float(row["accuracy/test"]) for row in rows} == accuracies
    assert "seed=1" in client.get_run(parent).data.tags["mlflow.note.content"]
    # The same sweep launched again, of more runs: the same run above it. One of its jobs fails before MLflow knows of
    # it, and those that followed the jobs see it.
    assert open_sweep(runs[0].config, str(output), 3) == parent
    assert parents(output)[0]["status"] == "RUNNING"
    child = with_parent(runs[0], parent)
    close_sweep(child.config)
    assert parents(output)[0]["status"] == "RUNNING"
    files.write_snapshots(output, [child], "source")
    ended = [Job("1", child.name, child.config.output, str(output), "slurm"), Job("2", "", "", str(output), "slurm")]
    files.end_sweep(ended, {"1": State("COMPLETED"), "2": State("RUNNING")})
    assert parents(output)[0]["status"] == "RUNNING"
    files.end_sweep(ended, {"1": State("COMPLETED"), "2": State("FAILED", code=2)})
    assert parents(output)[0]["status"] == "FAILED"
    # A run beside the sweep, and the tables.
    beside = [f"output={tmp_path}/beside", "train.seed=7"]
    prefork.start(["--config", str(KEYPAD), *settings, *beside], 1).finish()
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"

    def found(parent: str | None = None) -> list[str]:
        return [run.name for run in find_runs(uri, ["cpsp"], parent=parent)]

    assert found() == ["seed=1", "seed=2", "beside"]
    assert found("tried") == found(parent) == ["seed=1", "seed=2"]
    capsys.readouterr()
    assert main(["compare", "--uri", uri, "--parent", "tired"]) == 2
    assert "no sweep 'tired' in experiment 'cpsp'" in capsys.readouterr().err
    assert main(["compare", "--uri", uri, "--parent", "tried", "--mean", "--json"]) == 0
    (mean,) = json.loads(capsys.readouterr().out)["rows"]
    assert (mean["runs"], [*mean["metrics"]["accuracy/test"]["seeds"]]) == ("all", ["1", "2"])
