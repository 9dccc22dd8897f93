"""What a configured run reads and writes: shards, output folder, cache, MLflow's store."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import sqlite3
import time
from pathlib import Path
from urllib.parse import quote

import torch
from crc32c import crc32c

from cpsp_dist.config import Config
from cpsp_dist.data.manifest import ARRAY_FIELDS, Manifest
from cpsp_dist.data.reader.files import file_system
from cpsp_dist.doctor.finding import ERROR, OK, WARNING, Finding
from cpsp_dist.doctor.rendezvous import CLOCK_TOLERANCE, Rendezvous
from cpsp_dist.models import model_for
from cpsp_dist.tracking.store import default_uri, reach, sqlite_file, tracking_uri
from cpsp_dist.training.checkpoint import Checkpoints
from cpsp_dist.training.setup import open_manifest
from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.files import alone, require_can_be_made
from cpsp_dist.utils.text import format_bytes, one_line

#: What the names of files begin with that a node writes for the others to look for.
TOKEN = ".cpsp-doctor-"
#: Samples of each split that are read and compared with their checksums.
SAMPLES = 4
#: File systems of a network, as Linux names them; SQLite's locks do not hold there, or hang.
NETWORK = {
    *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "beegfs_nodev", "cifs", "smb3", "ceph", "fuse.ceph", "glusterfs"),
    *("fuse.glusterfs", "fuse.sshfs", "wekafs", "panfs", "pvfs2", "afs", "9p", "orangefs"),
}


def shards(config: Config) -> tuple[list[Finding], Manifest]:
    """A sample of each split, read from this node."""
    manifest = open_manifest(config)
    manifest.rows("train")
    for rows in manifest.splits.values():
        for row in sorted({rows[i * (len(rows) - 1) // max(SAMPLES - 1, 1)] for i in range(SAMPLES)} if rows else ()):
            _read(manifest, row)
    splits = ", ".join(f"{len(rows):,} {name}" for name, rows in manifest.splits.items())
    summary = f"{manifest.place}: {splits} samples, fingerprint {manifest.fingerprint[:12]}; a sample of each read"
    return [Finding(OK, "shards", summary)], manifest


def _read(manifest: Manifest, row: int) -> None:
    """Raises DataError where an array of a sample is not as it was packed. Of a URL, those bytes alone are fetched."""
    sample = manifest.samples[row]
    shard = manifest.shards[sample["shard"]]
    for name in ARRAY_FIELDS:
        start, size = int(sample[name]), manifest.fields[name].nbytes
        if manifest.remote is not None:
            data = manifest.remote.read_part(shard.url, start, start + size, shard.filesize)
        else:
            try:
                with open(manifest.path(shard), "rb") as file:
                    file.seek(start)
                    data = file.read(size)
            except OSError as error:
                raise DataError(
                    f"{manifest.path(shard)}: cannot be read: {error.strerror}; check its permissions"
                ) from None
        if crc32c(data) != sample[f"{name}_crc"]:
            key = sample["key"].decode()
            raise DataError(f"{manifest.place}/{shard.url}: {name} of sample '{key}' is damaged; copy this shard again")


def cache(config: Config, manifest: Manifest) -> list[Finding]:
    """Room for what is fetched from a URL."""
    if manifest.remote is None:
        return []
    folder = manifest.remote.cache.folder
    size, largest = (function(s.filesize for s in manifest.shards) for function in (sum, max))
    have = sum(manifest.path(s).stat().st_size for s in manifest.shards if manifest.path(s).is_file())
    limit = config.data.cache_gb
    free = shutil.disk_usage(existing(folder)[0]).free + have
    room = free if limit is None else min(free, int(limit * 1e9))
    fix = "set data.cache to a folder on a larger local disk" + (", or raise data.cache_gb" if limit else "")
    if room < 4 * largest:
        text = f"{folder}: room for {format_bytes(room)}, and one shard has up to {format_bytes(largest)}"
        return [Finding(ERROR, "cache", text, fix)]
    if file_system(folder) in NETWORK:
        text = f"{folder} lies on a network file system ({file_system(folder)})"
        return [Finding(WARNING, "cache", text, "set data.cache to a folder on a local disk")]
    if room < size:
        text = f"{folder}: room for {format_bytes(room)} of {format_bytes(size)}: each epoch fetches shards again"
        return [Finding(WARNING, "cache", text, fix)]
    return [Finding(OK, "cache", f"{folder}: room for all {format_bytes(size)}")]


def room(config: Config, manifest: Manifest) -> list[Finding]:
    """Room for the checkpoints, where they go."""
    folder = existing(Path(config.output))[0]
    with torch.device("meta"):
        model = model_for(config.model, manifest)
    one, most = Checkpoints.bytes_needed(model, config)
    held = sum(p.stat().st_size for p in Checkpoints(config.output).folder.glob("step-*/*"))
    free = shutil.disk_usage(folder).free
    needs = f"checkpoints of {format_bytes(one)} each need up to {format_bytes(most)}"
    summary = f"{config.output}: {format_bytes(free)} free; {needs}"
    if free < most - held:
        fix = "make room, set output to another disk, or lower checkpoint.keep"
        return [Finding(ERROR, "space", summary, fix)]
    return [Finding(OK, "space", summary)]


def output(config: Config, rendezvous: Rendezvous, limit: float) -> tuple[list[Finding], dict[str, float]]:
    """The output folder takes a file from every node, and is the same folder on all of them. The file's time against
    rank 0's clock, as {'seconds'}.

    Rank 0 leaves a token, the others look for it: all ranks that came call it. Nothing stays."""
    folder, levels = existing(Path(config.output))
    token = folder / f"{TOKEN}{secrets.token_hex(8)}"
    first, hosts, findings, times, wrote, seen = rendezvous.ranks.first, rendezvous.hosts, [], {}, time.time(), True
    with contextlib.ExitStack() as stack:
        stack.callback(_remove, token)
        if rendezvous.first_on_node:
            try:
                require_can_be_made(Path(config.output))
                _remove_left(folder)
                stack.enter_context(alone(token))
                token.write_text(token.name)
                times = {"seconds": token.stat().st_mtime - wrote}
            except OSError as error:
                findings = [_unwritable(config, folder, error)]
        theirs = rendezvous.share("token", {"name": token.name, "levels": levels, "there": not findings}, limit + 10)
        rendezvous.set_current_check("output, looking for rank 0's file")
        if theirs and theirs["there"] and not first and not findings:
            place = Path(config.output).absolute()
            sought = [place, *place.parents][theirs["levels"]] / theirs["name"]
            end = time.monotonic() + limit
            while not (seen := _holds(sought, theirs["name"])) and time.monotonic() < end:
                time.sleep(0.1)
            if not seen:
                text = (
                    f"{sought.parent}: the file that rank 0 ({hosts[0]}) wrote there did not appear within {limit:g} s"
                )
                fix = "set output to a folder of the shared file system, as an absolute path"
                findings = [Finding(ERROR, "output", text, fix)]
        # Nobody removes a token that somebody still looks for.
        looked, _ = rendezvous.gather("looked", seen and not findings)
    if first and not findings:
        same = len(rendezvous.nodes) > 1 and len(looked) == len(hosts) and all(looked.values())
        new = "" if levels == 0 else f" (to be made in {folder})"
        text = f"{config.output}: writable{new}" + (", the same folder on every node" if same else "")
        findings = [Finding(OK, "output", text)]
    return findings, times


def _remove(token: Path) -> None:
    with contextlib.suppress(OSError):
        token.unlink(missing_ok=True)


def _remove_left(folder: Path) -> None:
    """The files of killed doctors; who still looks for one holds its lock."""
    for token in folder.glob(f"{TOKEN}*"):
        with contextlib.suppress(OSError), open(token, "r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            token.unlink()


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False


def _unwritable(config: Config, folder: Path, error: OSError) -> Finding:
    text = f"output={config.output}: nothing can be written to {folder}: {error.strerror}"
    return Finding(ERROR, "output", text, "set output to a folder that you may write to, on a disk with room")


def file_times(host: str, found: dict[str, float]) -> list[Finding]:
    """The times of files against rank 0's clock: of a file server with a clock of its own."""
    ahead = found.get("seconds", 0.0)
    if abs(ahead) <= CLOCK_TOLERANCE:
        return []
    text = f"files in the output folder get times {ahead:+.1f} s from the clock of {host}"
    return [Finding(WARNING, "clock", text, "start NTP (chrony) on the file server and the nodes")]


def mlflow(config: Config | None, limit: float) -> list[Finding]:
    """Whether rank 0 reaches the store. Nothing is made in it."""
    if config is not None and not config.tracking.enabled:
        return [Finding(OK, "mlflow", "off (tracking.enabled=false)")]
    if config is None and not os.environ.get("MLFLOW_TRACKING_URI"):
        return [Finding(OK, "mlflow", "MLFLOW_TRACKING_URI is not set: a SQLite file beside the run folders")]
    uri = (
        tracking_uri(config) if config is not None else os.environ.get("MLFLOW_TRACKING_URI") or default_uri("runs/run")
    )
    if (file := sqlite_file(uri)) is not None:
        return _sqlite(file, limit)
    try:
        reach(uri, limit)
    except Exception as error:
        reason = _reason(error)
        text = f"{uri} does not answer as an MLflow server: {reason}; a run continues without it and keeps its metrics"
        return [Finding(ERROR, "mlflow", text, "see to the server, its URL in MLFLOW_TRACKING_URI, and its rights")]
    return [Finding(OK, "mlflow", f"{uri} answers")]


def _reason(error: Exception) -> str:
    text = one_line(error)
    for known in ("Connection refused", "Name or service not known", "Temporary failure in name resolution"):
        if known in text:
            return known
    return text[:200] or type(error).__name__


def _sqlite(path: Path, limit: float) -> list[Finding]:
    kind = file_system(existing(path.parent)[0])
    if kind in NETWORK:
        text = f"sqlite:///{path} lies on a network file system ({kind}), where SQLite's locks do not hold"
        fix = "set MLFLOW_TRACKING_URI to a server (`mlflow server`), or to a SQLite file on a local disk"
        return [Finding(WARNING, "mlflow", text, fix)]
    if not path.exists():
        return [Finding(OK, "mlflow", f"sqlite:///{path}: to be made")]
    try:
        store = sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=limit / 2)
        try:
            (count,) = store.execute("select count(*) from runs").fetchone()
            store.execute("begin immediate")  # the lock that a writer takes
            store.rollback()
        finally:
            store.close()
    except sqlite3.Error as error:
        fix = "end the program that holds it, or move it away" if "locked" in str(error) else "move it away"
        return [Finding(ERROR, "mlflow", f"sqlite:///{path}: not a usable MLflow store: {error}", fix)]
    return [Finding(OK, "mlflow", f"sqlite:///{path}: {count} runs, {format_bytes(path.stat().st_size)}")]


def existing(path: Path) -> tuple[Path, int]:
    """The folder itself or the nearest one above it that exists, and how many levels above that is."""
    path = path.absolute()
    for levels, place in enumerate([path, *path.parents]):
        if place.exists():
            return place, levels
    return Path("/"), len(path.parents)


def agreement(rendezvous: Rendezvous, facts: dict[int, dict[str, str]]) -> list[Finding]:
    """What has to be the same on every node. facts, by rank: 'config' and 'shards' (digests), versions by package."""
    findings = []
    fixes = {
        "config": "give the same file and overrides on every node, by absolute paths",
        "shards": "copy the same shards to every node, or use one shared folder",
    }
    for name in sorted({name for here in facts.values() for name in here}):
        seen: dict[str, list[str]] = {}
        for host, ranks in rendezvous.nodes.items():
            for value in sorted({facts[rank][name] for rank in ranks if name in facts.get(rank, {})}):
                seen.setdefault(value, []).append(host)
        if len(seen) > 1:
            sides = "; ".join(f"{value} on {', '.join(hosts)}" for value, hosts in seen.items())
            check = name if name in fixes else "packages"
            fix = fixes.get(name, "use one environment on a shared file system, or one image")
            findings.append(Finding(ERROR, check, f"not the same {name} on every node: {sides}", fix))
    return findings
