"""Launched jobs: which they are, what state they are in, what they print. Asks Slurm; knows nothing of submitit."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cpsp_dist.utils import files, processes
from cpsp_dist.utils.console import echo, table
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.json_lines import read_bytes

#: Seconds between two looks at the logs, and between two questions to Slurm.
LOOK, ASK = 0.2, 3.0
#: Seconds after which a job that Slurm does not know any more, and that left no exit code, counts as lost.
PATIENCE = 60.0
FORGOTTEN = "Slurm does not know it"
#: The jobs of a launch; its bytes, at most.
LAUNCH_FILE, LARGEST = "launch.json", 1 << 24
#: Slurm's states in which a job will not run again by itself. (A requeued or preempted one is PENDING before long.)
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


@dataclass(frozen=True)
class Job:
    """One run of a launch. `id`: Slurm's (12, or 12_3 in an array), or the number of a local one's process, whose
    `processes.identity` is `process`."""

    id: str
    name: str  # '' where the launch has one run
    output: str
    folder: str
    cluster: str  # slurm or local
    process: str = ""

    @property
    def log(self) -> Path:
        """What rank 0 prints."""
        return Path(self.folder) / f"{self.id}_0_log.out"

    @property
    def exit_file(self) -> Path:
        """Holds the exit code, once the job will not start again."""
        return Path(self.folder) / f"{self.id}_exit"

    @property
    def label(self) -> str:
        return self.name or Path(self.output).name


@dataclass(frozen=True)
class State:
    """`text`: Slurm's word for it; `reason`: what it waits for; `code`: where it left one."""

    text: str
    reason: str = ""
    code: int | None = None

    @property
    def ended(self) -> bool:
        return self.text in ENDED

    @property
    def succeeded(self) -> bool:
        return self.text == "COMPLETED"


def save_jobs(folder: Path, jobs: Sequence[Job]) -> None:
    files.write_text(folder / LAUNCH_FILE, json.dumps([asdict(job) for job in jobs], indent=1) + "\n")


def load_jobs(folder: str | Path) -> list[Job]:
    """The jobs of a launch: of the folder it named, or the newest in a run's output folder.

    Raises:
        UserError: nothing was launched there.
    """
    place = Path(folder)
    found = [place / LAUNCH_FILE] if (place / LAUNCH_FILE).is_file() else sorted(place.glob(f"slurm/*/{LAUNCH_FILE}"))
    try:
        content = json.loads(read_bytes(found[-1], limit=LARGEST))
        jobs = [Job(**{**job, "folder": str(found[-1].parent)}) for job in content]
        if not jobs or not all(map(_sound, jobs)):
            raise ValueError("no list of jobs")
        return jobs
    except IndexError:
        raise UserError(f"{folder}: nothing was launched here; give the output folder of a launched run") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{found[-1]}: damaged, so the jobs of this launch are not known: {error}; look for them in `squeue --me`, "
            "and remove the file once they have ended"
        ) from None


def _sound(job: Job) -> bool:
    return (
        all(isinstance(value, str) for value in asdict(job).values())
        and re.fullmatch(r"[0-9]{1,18}(_[0-9]{1,9})?", job.id) is not None
        and job.cluster in ("slurm", "local")
        and not {"/", "\0"} & {*job.name}
    )


def states(jobs: Sequence[Job]) -> dict[str, State]:
    """By job id. An exit code left behind is the last word; then Slurm's controller, which is never late; then its
    accounting, for what the controller has forgotten. UNKNOWN where nobody knows."""
    known: dict[str, State] = {}
    for job in jobs:
        code = _exit_code(job)
        if code is not None:
            known[job.id] = State("COMPLETED" if code == 0 else "FAILED", code=code)
        elif job.cluster == "local":
            known[job.id] = _of_process(job)
    ask = [job.id for job in jobs if job.id not in known]
    if ask:
        mains = ",".join(sorted({job_id.partition("_")[0] for job_id in ask}))
        answer = _ask(["squeue", "--noheader", "--array", "--states=all", f"--jobs={mains}", "--format=%i|%T|%r"])
        found = _read(answer.stdout)
        if answer.returncode and "Invalid job id" not in answer.stderr:
            silent = State(
                "UNKNOWN", "Slurm does not answer: " + (answer.stderr.strip().splitlines() or ["squeue"])[-1]
            )
            return {job_id: silent for job_id in ask} | known
        if {*ask} - {*found}:
            more = ["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={mains}", "--format=JobID,State"]
            found = _read(_ask(more).stdout) | found
        known |= {job_id: found.get(job_id, State("UNKNOWN", FORGOTTEN)) for job_id in ask}
    return known


def _read(lines: str) -> dict[str, State]:
    found = {}
    for line in lines.splitlines():
        job_id, state, *why = line.split("|")
        # "CANCELLED by 1000"; a reason stands for those that wait alone.
        word = state.split()[0].rstrip("+") if state else "UNKNOWN"
        found[job_id] = State(word, why[0].replace("None", "") if why and word == "PENDING" else "")
    return found


def _ask(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]}: {error}")


def _exit_code(job: Job) -> int | None:
    return read_code(job.exit_file)


def read_code(file: Path) -> int | None:
    """The exit code in a file; None where it is not there, just being written, or holds no exit code."""
    try:
        code = int(read_bytes(file, limit=100))
    except (OSError, ValueError):
        return None
    return code if 0 <= code < 256 else None


def _of_process(job: Job) -> State:
    """The state of a local job that left no exit code."""
    if job.process.rpartition(" ")[0] != processes.machine():
        return State("UNKNOWN", "it was started on another machine, or before this one was started")
    alive = processes.identity(int(job.id)) == job.process
    return State("RUNNING") if alive else State("FAILED", "its launcher was killed")


def describe_jobs(jobs: Sequence[Job], now: dict[str, State]) -> str:
    """A line for each job: state, step, log; and below it why one failed."""
    rows = [
        {
            "run": job.label,
            "job": job.id,
            "state": now[job.id].text.lower() + (f" ({now[job.id].reason})" if now[job.id].reason else ""),
            "step": last_step(job),
            "log": str(job.log),
        }
        for job in jobs
    ]
    failed = [
        f"{job.label}: {reason(job, now[job.id])}" for job in jobs if now[job.id].ended and not now[job.id].succeeded
    ]
    return "\n".join([table(rows), *failed])


def reason(job: Job, state: State) -> str:
    """Why a job failed: its exit code, or Slurm's word, and the last line of the log."""
    how = (
        f"exit code {state.code}" if state.code else state.text.lower() + (f", {state.reason}" if state.reason else "")
    )
    for log in (
        job.log,
        *sorted(Path(job.folder).glob(f"{job.id}_*_log.out")),
        Path(job.folder) / f"{job.id}_batch.out",
    ):
        if lines := _tail(log).strip().splitlines():
            return f"{how}: {lines[-1]}"
    return f"{how}; it printed nothing"


def last_step(job: Job) -> str:
    """As rank 0 logged last: `12/40`, or `-`."""
    steps = re.findall(r"^step (\d+/\d+) ", _tail(job.log), re.MULTILINE)
    return steps[-1] if steps else "-"


def _tail(file: Path, size: int = 65536) -> str:
    try:
        return read_bytes(file, max(0, file.stat().st_size - size)).decode(errors="replace")
    except OSError:
        return ""


class Logs:
    """Prints what rank 0 of each job prints, complete lines, with the run's name where there are several."""

    def __init__(self, jobs: Sequence[Job]):
        self.jobs, self._read = jobs, dict[str, int]()

    def show(self) -> None:
        for job in self.jobs:
            try:
                text = read_bytes(job.log, self._read.get(job.id, 0))
            except OSError:  # it waits
                continue
            text = text[: text.rfind(b"\n") + 1]
            self._read[job.id] = self._read.get(job.id, 0) + len(text)
            for line in text.decode(errors="replace").splitlines():
                echo(f"{job.name}: {line}" if job.name else line)


def follow(jobs: Sequence[Job]) -> dict[str, State]:
    """Print rank 0's log of each job until none will run again, requeues included; their states at the end.

    Says what it waits for, where a job waits, and again when that changes.
    """
    logs, printed = Logs(jobs), dict[str, State]()
    known = {job.id: time.monotonic() for job in jobs}  # when somebody last knew it
    while True:
        asked, now = time.monotonic(), states(jobs)
        for job in jobs:
            state, before = now[job.id], printed.get(job.id)
            if state.text in ("PENDING", "UNKNOWN") and state != before:
                why = f": {state.reason}" if state.reason else ""
                echo(f"{job.label}: job {job.id} is {state.text.lower()}{why}")
            printed[job.id] = state
            if state.reason != FORGOTTEN:
                known[job.id] = asked
            elif asked - known[job.id] > PATIENCE:
                now[job.id] = State("FAILED", f"{FORGOTTEN}, and it left no exit code")
            # Without an exit code: not while Slurm is just about to start it again.
            if state.ended and state.code is None and state != before:
                now[job.id] = State("COMPLETING")
        # The states are older than the logs: nothing that an ended job printed is missed.
        logs.show()
        if all(now[job.id].ended for job in jobs):
            return now
        left = [job for job in jobs if not now[job.id].ended]
        while time.monotonic() - asked < ASK and not any(job.exit_file.exists() for job in left):
            time.sleep(LOOK)
            logs.show()


def exit_code(ended: dict[str, State]) -> int:
    """Of a command that waited for jobs: 0 where all ended well, their own where they agree, else 1."""
    codes = {state.code or 1 for state in ended.values() if not state.succeeded}
    return 0 if not codes else codes.pop() if len(codes) == 1 else 1
