"""A real Slurm cluster of virtual nodes on this machine, for the tests and for trying scripts out.

    python tests/tools/slurm_lab.py install          Debian's packages (also `make slurm-up`, which continues with `up`)
    python tests/tools/slurm_lab.py up [NODES]       start it (2 nodes), and print what a shell has to export
    python tests/tools/slurm_lab.py down             end it
    python tests/tools/slurm_lab.py fail NODE        pull that node's plug: everything on it is gone at once
    python tests/tools/slurm_lab.py boot NODE        start it again

Each node is a process, mount and host name namespace with a slurmd of its own; all share this machine's disk, which so
is the shared file system. Everything listens on 127.0.0.1. Needs root; no systemd, no cgroups. A job in the partition
`high` preempts one in `batch` (the default), which is requeued. CPSP_SLURM_LAB is its folder, CPSP_SLURM_PORT the first
of its ports.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "munge", "slurmdbd", "mariadb-server-core"]
#: What each node claims to have, whatever the machine has.
CPUS, MEGABYTES, GPUS = 16, 64_000, 8
#: Seconds in which each daemon has to answer.
LIMIT = 60.0

#: A node's first process: arguments are its name, and the file that lists all nodes' addresses.
NODE = """
mount -t proc proc /proc
hostname "$1"
{ echo "127.0.0.1 $1"; cat "$2"; } > "$2.$1"
mount --bind "$2.$1" /etc/hosts
mount -t tmpfs -o mode=1777,nosuid,nodev node /dev/shm
slurmd -D -N "$1" &
trap 'exit 0' TERM
while :; do wait; sleep 3600 & done
"""

SLURM_CONF = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential is over: 120 s otherwise.
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.own
SlurmdPidFile={folder}/run/%n.own
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
PriorityType=priority/basic
# The ranks of a job meet on a port made from its number, and two clusters here share the machine's ports.
FirstJobId={port}
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=60
MessageTimeout=30
KillWait=5
MinJobAge=1800
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/run/munge.sock
GresTypes=gpu
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""

SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={dbd_port}
CommunicationParameters=NoInAddrAny
SlurmUser=root
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/run/slurmdbd.own
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={db_port}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm_acct_db
"""


class LabError(Exception):
    """The cluster could not be brought up; says which part, and the end of its log."""


class Lab:
    """The cluster in `folder` (made and used by root), with ports from `port` on."""

    def __init__(self, folder: Path, port: int, env: Mapping[str, str] = os.environ):
        self.folder, self.port = folder, port
        self.env = {**env, "SLURM_CONF": str(folder / "etc/slurm.conf")}

    def up(self, nodes: int = 2) -> None:
        """Start it anew, without the jobs of an earlier one."""
        self.down()
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("etc", "run", "log", "state", "spool", "dev"):
            (self.folder / name).mkdir(parents=True)
        os.chmod(self.folder, 0o755)
        names = [f"node{i + 1}" for i in range(nodes)]
        self._configure(names)
        run = self.folder / "run"
        self._spawn("munged", ["munged", "-F", f"--key-file={self._key()}", f"--socket={run}/munge.sock"]
                    + [f"--seed-file={run}/munge.seed", f"--pid-file={run}/munged.own"])  # fmt: skip
        self._until("munged", lambda: self._succeeds("munge", "-S", f"{run}/munge.sock", "-n"))
        self._start_database()
        self._spawn("slurmdbd", ["slurmdbd", "-D"])
        self._until("slurmdbd", lambda: answers(self.port + 1))
        self._spawn("slurmctld", ["slurmctld", "-D"])
        for name in names:
            self.boot(name)
        self._until("slurmctld", lambda: self.idle() == nodes)

    def down(self) -> None:
        """End all that it started."""
        if self._pid("slurmctld"):  # so that clients that wait for a job end too
            for command in (["scancel", "--user=root"], ["scontrol", "shutdown"]):
                with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                    subprocess.run(command, env=self.env, timeout=10, capture_output=True)
        for record in sorted((self.folder / "run").glob("*.pid"), key=lambda path: path.name.startswith("m")):
            self._end(record.stem)

    def fail(self, node: str) -> None:
        """Pull the plug."""
        self._end(node)

    def boot(self, node: str) -> None:
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        space = ["unshare", "--fork", "--kill-child", "--pid", "--mount", "--uts"]
        self._spawn(node, [*space, "bash", "-c", NODE, "node", node, str(self.folder / "etc/hosts")])

    def idle(self) -> int:
        """Nodes that wait for work."""
        done = self.run("sinfo", "-hN", "-p", "batch", "-t", "idle", "-o", "%N")
        return len(set(done.stdout.split())) if done.returncode == 0 else 0

    def _configure(self, names: Sequence[str]) -> None:
        etc = self.folder / "etc"
        for i in range(GPUS):
            os.mknod(self.folder / f"dev/gpu{i}", 0o666 | 0o020000, os.makedev(1, 3))  # each a /dev/null
        lines = [
            f"NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={self.port + 10 + i} CPUs={CPUS} "
            f"RealMemory={MEGABYTES} Gres=gpu:{GPUS} State=UNKNOWN"
            for i, name in enumerate(names)
        ]
        host = socket.gethostname().split(".")[0]
        known = {"folder": self.folder, "host": host, "port": self.port, "dbd_port": self.port + 1}
        known |= {"db_port": self.port + 2, "password": secrets.token_hex(16), "nodes": "\n".join(lines)}
        (etc / "slurm.conf").write_text(SLURM_CONF.format(**known))
        # No variables of Slurm's own: an empty CUDA_VISIBLE_DEVICES reaches the job, which then trains on the CPU.
        gpus = f"Name=gpu File={self.folder}/dev/gpu[0-{GPUS - 1}] Flags=no_gpu_env"
        gres = f"AutoDetect=off\nNodeName=node[1-{len(names)}] {gpus}\n"
        (etc / "gres.conf").write_text(gres)
        (etc / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in [*names, f"localhost {host}"]))
        self._private("etc/slurmdbd.conf", SLURMDBD_CONF.format(**known).encode())
        self.password = known["password"]

    def _key(self) -> Path:
        return self._private("run/munge.key", secrets.token_bytes(128))

    def _private(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.touch(0o600)
        path.write_bytes(content)
        return path

    def _start_database(self) -> None:
        """slurmdbd's database, with nothing in it; a crash may lose it, the next `up` makes it anew."""
        data, temporary, tables = self.folder / "db", self.folder / "db-tmp", Path("/usr/share/mysql")
        (data / "mysql").mkdir(parents=True)
        temporary.mkdir()  # of its own: a server that starts deletes the temporary tables of all others in its folder
        common = ["--no-defaults", "--user=root", f"--datadir={data}", f"--tmpdir={temporary}"]
        common += ["--innodb-buffer-pool-size=16M"]
        common += ["--innodb-log-file-size=8M", "--innodb-flush-log-at-trx-commit=0", "--innodb-flush-method=nosync"]
        common += ["--innodb-lock-wait-timeout=900", "--skip-log-bin", "--performance-schema=OFF", "--sync-frm=OFF"]
        script = "CREATE DATABASE IF NOT EXISTS mysql;\nUSE mysql;\nSET @auth_root_socket=NULL;\n"
        for part in ("mysql_system_tables.sql", "mysql_performance_tables.sql", "mysql_system_tables_data.sql"):
            script += (tables / part).read_text() + "\n"
        script += "CREATE DATABASE slurm_acct_db;\nFLUSH PRIVILEGES;\n"
        script += f"CREATE USER 'slurm'@'127.0.0.1' IDENTIFIED BY '{self.password}';\n"
        script += "GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';\n"
        made = subprocess.run(
            ["mariadbd", *common, "--bootstrap", "--max-allowed-packet=8M"],
            input=script.encode(),
            capture_output=True,
            timeout=LIMIT,
        )
        if made.returncode:
            raise LabError(f"mariadbd cannot make its tables: {made.stderr[-2000:].decode(errors='replace')}")
        more = ["--bind-address=127.0.0.1", f"--port={self.port + 2}", f"--socket={self.folder}/run/db.sock"]
        self._spawn("mariadbd", ["mariadbd", *common, *more, "--skip-name-resolve"])
        self._until("mariadbd", lambda: answers(self.port + 2))

    def _spawn(self, name: str, command: Sequence[str]) -> None:
        with open(self.folder / f"log/{name}.out", "ab") as log:
            process = subprocess.Popen(
                command, env=self.env, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        record = f"{process.pid} {started(process.pid)}"
        (self.folder / f"run/{name}.pid").write_text(record)

    def _pid(self, name: str) -> int | None:
        """The process recorded as `name`, if it is that very one and runs."""
        try:
            pid, start = (self.folder / f"run/{name}.pid").read_text().split()
            return int(pid) if started(int(pid)) == start else None
        except (OSError, ValueError):
            return None

    def _end(self, name: str) -> None:
        end = time.monotonic() + LIMIT
        while (pid := self._pid(name)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # a node's wrapper takes all of its namespace with it
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            if time.monotonic() > end:
                raise LabError(f"{name} (process {pid}) does not end")
            time.sleep(0.02)
        (self.folder / f"run/{name}.pid").unlink(missing_ok=True)

    def _until(self, name: str, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + LIMIT
        while not condition():
            if self._pid(name) is None or time.monotonic() > end:
                logs = [p.read_text(errors="replace")[-1500:] for p in sorted((self.folder / "log").glob(f"{name}.*"))]
                state = "does not answer" if self._pid(name) else "ended"
                raise LabError("\n".join([f"{name} {state}; its log:", *logs]))
            time.sleep(0.1)

    def run(self, *command: str, timeout: float = LIMIT, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """A command of a user of the cluster, on the machine that jobs are submitted from."""
        return subprocess.run(command, env=self.env, cwd=cwd, timeout=timeout, capture_output=True, text=True)

    def ask(self, *command: str) -> str:
        """What a command prints; one that fails, as where the controller is too busy, is given again."""
        end = time.monotonic() + LIMIT
        while (done := self.run(*command)).returncode:
            if time.monotonic() > end:
                raise LabError(f"{' '.join(command)}: {done.stderr}")
            time.sleep(0.1)
        return done.stdout

    def _succeeds(self, *command: str) -> bool:
        return self.run(*command).returncode == 0


def started(pid: int) -> str:
    """When a process started, in clock ticks; nothing if it is gone."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return "" if state == "Z" else rest[18]
    except OSError:
        return ""


def answers(port: int) -> bool:
    with socket.socket() as s:
        s.settimeout(1)
        return s.connect_ex(("127.0.0.1", port)) == 0


def missing() -> str:
    """Why no cluster can run here; nothing if one can."""
    for name in ("slurmctld", "slurmd", "slurmdbd", "mariadbd", "munged", "sbatch", "unshare"):
        if shutil.which(name) is None:
            return f"{name} is not on the PATH (it may lie in /usr/sbin)"
    if os.geteuid() != 0:
        return "it needs root"
    made = subprocess.run(["unshare", "--fork", "--pid", "--mount", "--uts", "true"], timeout=LIMIT)
    return "this machine makes no namespaces" if made.returncode else ""


def install() -> None:
    """Debian's packages. None of their own services is started meanwhile: Debian asks this file."""
    apt = ["apt-get", "-y", "-qq", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300"]
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    policy = Path("/usr/sbin/policy-rc.d")
    made = not policy.exists()
    if made:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        subprocess.run(["apt-get", "-qq", "update"], check=True, timeout=600)
        subprocess.run([*apt, "install", *PACKAGES], env=env, check=True, timeout=900, stdout=subprocess.DEVNULL)
    finally:
        if made:
            policy.unlink()


def main(arguments: Sequence[str]) -> int:
    folder = os.environ.get("CPSP_SLURM_LAB") or Path(tempfile.gettempdir()) / "cpsp-slurm"
    lab = Lab(Path(folder), int(os.environ.get("CPSP_SLURM_PORT", "17100")))
    match arguments:
        case ["install"]:
            if missing():
                install()
        case ["up", *count] if not missing():
            lab.up(int(count[0]) if count else 2)
            print(f"export SLURM_CONF={lab.env['SLURM_CONF']}")
        case ["up", *_]:
            print(f"error: no cluster can run here: {missing()}", file=sys.stderr)
            return 2
        case ["down"]:
            lab.down()
        case ["fail", node]:
            lab.fail(node)
        case ["boot", node]:
            lab.boot(node)
        case _:
            print(__doc__)
            return 2
    return 0


if __name__ == "__main__":
    os.environ["PATH"] += ":/usr/sbin"
    sys.exit(main(sys.argv[1:]))
