"""`cpsp-dist doctor`: checks on every rank, told by rank 0, a line for each finding.

`meeting.py` brings the ranks together, `machine.py` looks at what they run on, `places.py` at what a run reads and
writes, `finding.py` is a line and its limit. No check ends the program: what goes wrong in one is its finding.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from cpsp_dist.config import Config, flat, load_config
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.distributed.process_group import discover
from cpsp_dist.doctor import machine, places
from cpsp_dist.doctor.finding import ERROR, OK, WARNING, Finding, examine, one_line, stuck
from cpsp_dist.doctor.meeting import Meeting, all_reduce, attendance, clocks, network_fix
from cpsp_dist.errors import EXIT_USER_ERROR, UserError
from cpsp_dist.training.engine import deepspeed_settings, import_deepspeed
from cpsp_dist.utils.shipped import find_config

#: Checks that a rank makes for itself, one after the other, each within the limit.
OWN_CHECKS = 10
#: Nodes that a line names; more are counted.
NAMED = 8


def doctor(path: str | None, overrides: Sequence[str], limit: float, *, as_json: bool = False) -> int:
    """Check, print on rank 0, and return the exit code, the same on every rank.

    path, overrides: a configuration, or None for the environment alone. limit: seconds that any wait takes.
    """
    launcher = machine.launcher()
    try:
        ranks = discover()
        # Before the meeting, which sets RANK and its like for torch.
        slurm = machine.slurm(ranks.world, len(machine.cores()["affinity"]))
        meeting = Meeting(ranks, limit)
    except UserError as error:
        print(Finding(ERROR, "ranks", one_line(error)).told(), flush=True)
        return _end(EXIT_USER_ERROR)
    patient = Patient(meeting, limit)
    patient.findings += slurm
    try:
        config = patient.examine_own(path, overrides)
        return _end(patient.report(config, launcher, as_json))
    except RuntimeError as error:  # of the store: it ends with rank 0
        text = f"rank {ranks.rank}: the rendezvous at {meeting.place} was lost: {one_line(error).split(' [')[0][:150]}"
        print(Finding(ERROR, "ranks", text, "look at the output of rank 0").told(), flush=True)
        return _end(EXIT_USER_ERROR)


class Patient:
    """This rank's checks, and on rank 0 everybody's."""

    def __init__(self, meeting: Meeting, limit: float):
        self.meeting, self.limit = meeting, limit
        self.findings: list[Finding] = []
        self.facts: dict[str, str] = {}  # that have to be the same on every node
        self.cores: dict[str, Any] = {}

    def _check(self, name: str, waits_for: str, call: Callable[[], list[Finding]]) -> bool:
        """Make a check; whether it found no error."""
        self.meeting.begins(name)
        found = examine(name, self.limit, waits_for, call)
        self.findings += found
        return all(finding.status != ERROR for finding in found)

    def examine_own(self, path: str | None, overrides: Sequence[str]) -> Config | None:
        """What a rank can tell without the others: of a machine's disks, its first one. The configuration, if any."""
        ranks, once = self.meeting.ranks, self.meeting.first_on_node
        self.facts = {name: now or "missing" for name, now in machine.installed().items()}
        self.cores = machine.cores()
        if once:
            self._check("packages", "the disk of the packages", machine.python_and_packages)
        self._check("gpu", "the GPUs and their driver", lambda: machine.gpus(ranks.local_rank))
        configs: list[Config] = []
        if path is not None:
            self._check("config", f"the disk of {path}", lambda: self._load(path, overrides, configs))
        config = configs[0] if configs else None
        if config is not None and once:
            self._look_at_places(config)
        if ranks.first:
            self._check("mlflow", "the MLflow store", lambda: places.mlflow(config, self.limit))
        return config

    def _load(self, path: str, overrides: Sequence[str], configs: list[Config]) -> list[Finding]:
        config = load_config(path, overrides)
        configs.append(config)
        text = json.dumps(flat(config), sort_keys=True, default=str)
        self.facts["config"] = hashlib.sha256(text.encode()).hexdigest()[:12]
        return [Finding(OK, "config", str(find_config(path)))]

    def _look_at_places(self, config: Config) -> None:
        manifests: list[Manifest] = []

        def shards() -> list[Finding]:
            found, manifest = places.shards(config)
            manifests.append(manifest)
            self.facts["shards"] = manifest.fingerprint[:12]
            return found

        if self._check("shards", f"{config.data.shards}", shards):
            self._check("cache", "the cache's disk", lambda: places.cache(config, manifests[0]))
            if self.meeting.ranks.first:
                self._check("space", f"the disk of {config.output}", lambda: places.room(config, manifests[0]))
        if config.engine.kind == "deepspeed":
            self._check("deepspeed", "the disk of the packages", lambda: self._deepspeed(config))

    def _deepspeed(self, config: Config) -> list[Finding]:
        deepspeed_settings(config, self.meeting.ranks.world)
        try:
            found = import_deepspeed(self.meeting.ranks.device).__version__
        except Exception as error:
            text = f"cannot be imported: {type(error).__name__}: {one_line(error)[:200]}"
            return [Finding(ERROR, "deepspeed", text, "CUDA_HOME may have to be set; or engine.kind=ddp")]
        return [Finding(OK, "deepspeed", f"{found} can be imported")]

    def report(self, config: Config | None, launcher: str, as_json: bool) -> int:
        """What takes all ranks, then everything told by rank 0; the exit code."""
        meeting, patience = self.meeting, OWN_CHECKS * self.limit
        own = {"findings": self.findings, "facts": self.facts, "cores": self.cores, "config": config is not None}
        everyone, lost = meeting.gather("own", own)
        go = meeting.share(
            "go",
            {
                "all": not (lost or meeting.missing),
                "output": not lost and bool(everyone) and all(e["config"] for e in everyone.values()),
            },
            patience + self.limit,
        )
        together: list[Finding] = []
        times: dict[str, float] = {}
        clock = meeting.clock() if go and go["all"] else {}
        if go and go["output"] and config is not None:
            meeting.begins("output")
            together, times = places.output(config, meeting, self.limit)
        if go and go["all"] and meeting.ranks.world > 1:
            backend = "nccl" if meeting.ranks.device.type == "cuda" else "gloo"
            meeting.begins("all-reduce")
            found = examine("all-reduce", self.limit, "the other ranks", lambda: all_reduce(meeting.ranks, meeting))
            # A collective that fails does so for the network, as a rule: those who came have met already.
            together += [f._replace(fix=network_fix(backend)) if f.status == ERROR else f for f in found]
        rest, more_lost = meeting.gather("together", {"findings": together, "clock": clock})
        code = 0
        if meeting.ranks.first:
            told: list[tuple[int | None, Finding]] = [
                (None, f) for f in attendance(meeting, launcher) + lost + more_lost
            ]
            told += [(r, Finding(*f)) for r, e in everyone.items() for f in e["findings"]]
            told += [(None, f) for f in self._judge(config, everyone)]
            told += [(r, Finding(*f)) for r, e in rest.items() for f in e["findings"]]
            by_rank = {r: e["clock"] for r, e in rest.items() if e["clock"]}
            if by_rank:
                told += [(None, f) for f in clocks(meeting, by_rank) + places.file_times(meeting.hosts[0], times)]
            code = _print(meeting, told, as_json)
        return meeting.part(code, patience + 4 * self.limit)

    def _judge(self, config: Config | None, everyone: dict[int, dict[str, Any]]) -> list[Finding]:
        """What only shows when all ranks' facts lie side by side."""
        readers = config.data.threads if config is not None else 1
        cores = {rank: here["cores"] for rank, here in everyone.items()}
        facts = {rank: here["facts"] for rank, here in everyone.items()}
        return machine.threads(self.meeting.nodes, cores, readers) + places.agreement(self.meeting, facts)


def _print(meeting: Meeting, told: Sequence[tuple[int | None, Finding]], as_json: bool) -> int:
    """Each distinct finding once, with the nodes that it is about, in the order of the checks; the exit code."""
    nodes: dict[Finding, set[str]] = {}
    everywhere = set(meeting.nodes)
    for rank, finding in told:
        nodes.setdefault(finding, set()).update(everywhere if rank is None else {meeting.hosts[rank]})
    # Where a check was made at all: what rank 0 finds for all is not about its node alone.
    by_check: dict[str, set[str]] = {}
    for finding, where in nodes.items():
        by_check.setdefault(finding.check, set()).update(where)
    order = list(by_check)
    errors, warnings = (sum(f.status == status for f in nodes) for status in (ERROR, WARNING))
    lines = []
    for finding in sorted(nodes, key=lambda f: order.index(f.check)):
        hosts = sorted(nodes[finding])
        whole = by_check[finding.check] if finding.status == OK else everywhere
        some = nodes[finding] != whole
        names = ", ".join(hosts[:NAMED]) + (f" and {len(hosts) - NAMED} more" if len(hosts) > NAMED else "")
        lines.append((finding, hosts, finding.told(names if some else "")))
    if as_json:
        found = [f._asdict() | {"nodes": hosts} for f, hosts, _ in lines]
        found = [{key: one_line(v) if isinstance(v, str) else v for key, v in one.items()} for one in found]
        print(json.dumps({"errors": errors, "warnings": warnings, "findings": found}, indent=1), flush=True)
    else:
        for _, _, line in lines:
            print(line)
        print(f"{_count(errors, 'error')}, {_count(warnings, 'warning')}", flush=True)
    return EXIT_USER_ERROR if errors else 0


def _count(number: int, word: str) -> str:
    return f"{number or 'no'} {word}{'s' * (number != 1)}"


def _end(code: int) -> int:
    """A check that hangs would keep the process from ending by itself."""
    if any(thread.is_alive() for thread in stuck):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
