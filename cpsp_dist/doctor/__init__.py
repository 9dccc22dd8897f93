"""`cpsp-dist doctor`: checks on every rank, reported by rank 0, a line for each finding.

A check of a machine or a configuration before a run belongs here. `rendezvous.py` brings the ranks together,
`machine.py` looks at what they run on, `network.py` at what is between them, `paths.py` at what a run reads and writes,
`finding.py` is a line and its limit. No check ends the program: what goes wrong in one is its finding.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from cpsp_dist.config import Config, flat, load_config
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.distributed.process_group import discover
from cpsp_dist.distributed.store import hung_threads
from cpsp_dist.doctor import machine, paths
from cpsp_dist.doctor.finding import ERROR, OK, WARNING, Finding, examine
from cpsp_dist.doctor.network import all_reduce, clocks, network_fix
from cpsp_dist.doctor.rendezvous import Rendezvous, check_all_ranks_present
from cpsp_dist.training.checkpoint import Checkpoints
from cpsp_dist.training.engine import check_compile, check_launcher_settings, deepspeed_settings, import_deepspeed
from cpsp_dist.training.precision import settle_alone
from cpsp_dist.utils.console import echo
from cpsp_dist.utils.errors import EXIT_USER_ERROR, UserError
from cpsp_dist.utils.hashing import text_sha256
from cpsp_dist.utils.shipped import find_config
from cpsp_dist.utils.text import one_line

#: Checks that a rank makes for itself, one after the other, each within the limit.
OWN_CHECKS = 11
#: Nodes that a line names; more are counted.
NAMED = 8


def doctor(path: str | None, overrides: Sequence[str], limit: float, *, as_json: bool = False) -> int:
    """Check, print on rank 0, and return the exit code, the same on every rank.

    path, overrides: a configuration, or None for the environment alone. limit: seconds that any wait takes.
    """
    launcher = machine.launcher()
    try:
        ranks = discover()
        # Before the rendezvous, which sets RANK and its like for torch.
        slurm = machine.slurm(ranks.world, len(machine.cores()["affinity"]))
        rendezvous = Rendezvous(ranks, limit)
    except UserError as error:
        echo(Finding(ERROR, "ranks", one_line(error)).format())
        return _end(EXIT_USER_ERROR)
    checks = RankChecks(rendezvous, limit)
    checks.findings += slurm
    try:
        config = checks.examine_own(path, overrides)
        return _end(checks.report(config, launcher, as_json))
    except RuntimeError as error:  # of the store: it ends with rank 0
        text = (
            f"rank {ranks.rank}: the rendezvous at {rendezvous.place} was lost: {one_line(error).split(' [')[0][:150]}"
        )
        echo(Finding(ERROR, "ranks", text, "look at the output of rank 0").format())
        return _end(EXIT_USER_ERROR)


class RankChecks:
    """This rank's checks, and on rank 0 everybody's."""

    def __init__(self, rendezvous: Rendezvous, limit: float):
        self.rendezvous, self.limit = rendezvous, limit
        self.findings: list[Finding] = []
        self.facts: dict[str, str] = {}  # that have to be the same on every node
        self.cores: dict[str, Any] = {}

    def _check(self, name: str, waits_for: str, call: Callable[[], list[Finding]]) -> bool:
        """Make a check; whether it found no error."""
        self.rendezvous.set_current_check(name)
        found = examine(name, self.limit, waits_for, call)
        self.findings += found
        return all(finding.status != ERROR for finding in found)

    def examine_own(self, path: str | None, overrides: Sequence[str]) -> Config | None:
        """What a rank can check without the others: of a machine's disks, its first one. The configuration, if any."""
        ranks, once = self.rendezvous.ranks, self.rendezvous.first_on_node
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
            self._check_paths(config)
        if ranks.first:
            self._check("mlflow", "the MLflow store", lambda: paths.mlflow(config, self.limit))
        return config

    def _load(self, path: str, overrides: Sequence[str], configs: list[Config]) -> list[Finding]:
        config = load_config(path, overrides)
        configs.append(config)
        text = json.dumps(flat(config), sort_keys=True, default=str)
        self.facts["config"] = text_sha256(text)[:12]
        return [Finding(OK, "config", str(find_config(path)))]

    def _check_paths(self, config: Config) -> None:
        manifests: list[Manifest] = []

        def shards() -> list[Finding]:
            found, manifest = paths.shards(config)
            manifests.append(manifest)
            self.facts["shards"] = manifest.fingerprint[:12]
            return found

        if self._check("shards", f"{config.data.shards}", shards):
            self._check("cache", "the cache's disk", lambda: paths.cache(config, manifests[0]))
            if self.rendezvous.ranks.first:
                self._check("space", f"the disk of {config.output}", lambda: paths.room(config, manifests[0]))
        settled = [config]
        if config.train.precision == "auto":
            self._check("precision", f"the disk of {config.output}", lambda: self._precision(config, settled))
        config = settled[-1]
        self._check("launcher", "the files that the launcher names", lambda: self._launcher(config))
        self._check("compile", "the GPU", lambda: self._compile(config))
        if config.engine.kind == "deepspeed":
            self._check("deepspeed", "the disk of the packages", lambda: self._deepspeed(config))

    def _precision(self, config: Config, settled: list[Config]) -> list[Finding]:
        """What auto is in the run that the output holds, or in a new one on such devices."""
        checkpoints = Checkpoints(config.output)
        newest, _ = checkpoints.newest_valid()
        saved = {} if newest is None else checkpoints.load(newest)[1].config
        found, why = settle_alone(config, self.rendezvous.ranks.device, saved)
        settled.append(found)
        return [Finding(OK, "precision", f"train.precision=auto is {found.train.precision} in this run: {why}")]

    def _launcher(self, config: Config) -> list[Finding]:
        check_launcher_settings(config, self.rendezvous.ranks.device.type)
        return []

    def _compile(self, config: Config) -> list[Finding]:
        check_compile(config, self.rendezvous.ranks.device)
        return []

    def _deepspeed(self, config: Config) -> list[Finding]:
        deepspeed_settings(config, self.rendezvous.ranks.world)
        try:
            found = import_deepspeed(self.rendezvous.ranks.device).__version__
        except Exception as error:
            text = f"cannot be imported: {type(error).__name__}: {one_line(error)[:200]}"
            return [Finding(ERROR, "deepspeed", text, "CUDA_HOME may have to be set; or engine.kind=ddp")]
        return [Finding(OK, "deepspeed", f"{found} can be imported")]

    def report(self, config: Config | None, launcher: str, as_json: bool) -> int:
        """What takes all ranks, then all findings, reported by rank 0; the exit code."""
        rendezvous, patience = self.rendezvous, OWN_CHECKS * self.limit
        own = {"findings": self.findings, "facts": self.facts, "cores": self.cores, "config": config is not None}
        answers, lost = rendezvous.gather("own", own)
        go = rendezvous.share(
            "go",
            {
                "all": not (lost or rendezvous.missing or rendezvous.problem),
                "output": not lost and bool(answers) and all(e["config"] for e in answers.values()),
            },
            patience + self.limit,
        )
        together: list[Finding] = []
        times: dict[str, float] = {}
        clock = rendezvous.clock() if go and go["all"] else {}
        if go and go["output"] and config is not None:
            rendezvous.set_current_check("output")
            together, times = paths.output(config, rendezvous, self.limit)
        if go and go["all"] and rendezvous.ranks.world > 1:
            backend = "nccl" if rendezvous.ranks.device.type == "cuda" else "gloo"
            rendezvous.set_current_check("all-reduce")
            found = examine(
                "all-reduce", self.limit, "the other ranks", lambda: all_reduce(rendezvous.ranks, rendezvous)
            )
            # A collective that fails does so for the network, as a rule: those who came have met already.
            together += [f._replace(fix=network_fix(backend)) if f.status == ERROR else f for f in found]
        rest, more_lost = rendezvous.gather("together", {"findings": together, "clock": clock})
        code = 0
        if rendezvous.ranks.first:
            reported: list[tuple[int | None, Finding]] = [
                (None, f) for f in check_all_ranks_present(rendezvous, launcher) + lost + more_lost
            ]
            reported += [(r, Finding(*f)) for r, e in answers.items() for f in e["findings"]]
            reported += [(None, f) for f in self._judge(config, answers)]
            reported += [(r, Finding(*f)) for r, e in rest.items() for f in e["findings"]]
            by_rank = {r: e["clock"] for r, e in rest.items() if e["clock"]}
            if by_rank:
                reported += [
                    (None, f) for f in clocks(rendezvous, by_rank) + paths.file_times(rendezvous.hosts[0], times)
                ]
            code = _print(rendezvous, reported, as_json)
        return rendezvous.finish(code, patience + 4 * self.limit)

    def _judge(self, config: Config | None, answers: dict[int, dict[str, Any]]) -> list[Finding]:
        """What only shows when all ranks' facts lie side by side."""
        readers = config.data.reader_threads if config is not None else 1
        cores = {rank: here["cores"] for rank, here in answers.items()}
        facts = {rank: here["facts"] for rank, here in answers.items()}
        return machine.threads(self.rendezvous.nodes, cores, readers) + paths.agreement(self.rendezvous, facts)


def _print(rendezvous: Rendezvous, reported: Sequence[tuple[int | None, Finding]], as_json: bool) -> int:
    """Each distinct finding once, with the nodes that it is about, in the order of the checks; the exit code."""
    nodes: dict[Finding, set[str]] = {}
    everywhere = set(rendezvous.nodes)
    for rank, finding in reported:
        nodes.setdefault(finding, set()).update(everywhere if rank is None else {rendezvous.hosts[rank]})
    # Where a check was made at all: what rank 0 finds for all is not about its node alone.
    by_check: dict[str, set[str]] = {}
    for finding, where in nodes.items():
        by_check.setdefault(finding.check, set()).update(where)
    order = list(by_check)
    errors, warnings = (sum(f.status == status for f in nodes) for status in (ERROR, WARNING))
    lines = []
    for finding in sorted(nodes, key=lambda f: order.index(f.check)):
        hosts = sorted(nodes[finding])
        expected_hosts = by_check[finding.check] if finding.status == OK else everywhere
        some = nodes[finding] != expected_hosts
        names = ", ".join(hosts[:NAMED]) + (f" and {len(hosts) - NAMED} more" if len(hosts) > NAMED else "")
        lines.append((finding, hosts, finding.format(names if some else "")))
    if as_json:
        found = [f._asdict() | {"nodes": hosts} for f, hosts, _ in lines]
        found = [{key: one_line(v) if isinstance(v, str) else v for key, v in one.items()} for one in found]
        echo(json.dumps({"errors": errors, "warnings": warnings, "findings": found}, indent=1))
    else:
        for _, _, line in lines:
            echo(line)
        echo(f"{_count(errors, 'error')}, {_count(warnings, 'warning')}")
    return EXIT_USER_ERROR if errors else 0


def _count(number: int, word: str) -> str:
    return f"{number or 'no'} {word}{'s' * (number != 1)}"


def _end(code: int) -> int:
    """A check that hangs would keep the process from ending by itself."""
    if any(thread.is_alive() for thread in hung_threads):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
