"""Which MLflow run an output folder belongs to: that of an earlier start, where it is one and is there still."""

from __future__ import annotations

import contextlib
import json
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cpsp_dist.config import Config, flat
from cpsp_dist.tracking.store import RUN_FILE, Store, StoreError, experiment_id, tracking_uri
from cpsp_dist.utils import files
from cpsp_dist.utils.json_lines import JsonLines, parse_line, read_bytes
from cpsp_dist.utils.redact import without_secrets

#: The points of a run, in its folder.
POINTS_FILE = "metrics.jsonl"
#: Its starts, too.
STARTS_FILE = "starts.jsonl"
#: A run's tag from the moment it is made: by it, a start finds the run that an earlier one asked for.
KEY = "cpsp_dist.key"


class RunRecord:
    """The file in which a folder names its MLflow run, for starts before its first checkpoint."""

    def __init__(self, config: Config, data: str):
        """data: the shards' fingerprint."""
        self.file = Path(config.output) / RUN_FILE
        self._starts = JsonLines(self.file.with_name(STARTS_FILE), lambda text: None)
        store = without_secrets(tracking_uri(config))
        self._key: str | None = None
        self._identity: dict[str, Any] = {"store": store, "config": flat(config), "data": data}

    def note_start(self, step: int, tags: Mapping[str, str]) -> None:
        """Count a start, which trains from `step`; also one that ends before MLflow answers. tags: where it runs."""
        self._starts.append({"step": step, "time": round(time.time(), 3), "tags": {**tags}})

    def restarts(self) -> int:
        """Starts after the first."""
        try:
            return max(0, sum(1 for _ in self._starts.lines()) - 1)
        except OSError:
            return 0

    def read(self) -> str | None:
        """The run's id, if it was the same run."""
        run_id = self._read().get("run_id")
        return run_id if isinstance(run_id, str) else None

    def write(self, run_id: str) -> None:
        self._key = None
        self._write({"run_id": run_id})

    def ask(self) -> str:
        """The key for the tag KEY of the run that MLflow is then asked to make: a new one, or that of an earlier
        request, which may still be answered."""
        self._key = self.asked() or uuid.uuid4().hex
        self._write({"run_id": None, "key": self._key})
        return self._key

    def asked(self) -> str | None:
        """The key of a run that MLflow was asked to make and whose id nobody noted: no answer came, or the process was
        killed before. None where there is none such."""
        known = self._key or self._read().get("key")
        return known if isinstance(known, str) and re.fullmatch("[0-9a-f]{32}", known) else None

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(read_bytes(self.file))
            found = {name: known.pop(name) for name in ("run_id", "key") if name in known}
            return found if known == self._identity else {}
        except (OSError, ValueError, AttributeError, TypeError, RecursionError):
            return {}

    def _write(self, known: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            files.write_text(self.file, json.dumps(known | self._identity))


def asked_run(store: Store, config: Config, record: RunRecord) -> str | None:
    """The id of the run of `record.asked`, where the store made it, or None where it cannot search. Raises StoreError
    where it does not answer."""
    if not (key := record.asked()):
        return None
    experiment = experiment_id(store, config)
    try:
        found = store.search_runs([experiment], f"tags.`{KEY}` = '{key}'", max_results=1)
    except StoreError as error:
        if error.silent:
            raise
        return None
    return str(found[0].info.run_id) if found else None


def started_as(folder: Path) -> dict[str, str]:
    """Tags of the last start of the run in a folder, as host, device and launcher, and `restarts`; none where it left
    none."""
    try:
        lines = [parse_line(line) for line in read_bytes(folder / STARTS_FILE).splitlines(keepends=True)]
    except OSError:
        return {}
    starts = [line for line in lines if line is not None]
    tags = starts[-1].get("tags") if starts else None
    if not isinstance(tags, dict):
        return {}
    return {name: tag for name, tag in tags.items() if isinstance(tag, str)} | {"restarts": str(len(starts) - 1)}


def recorded_run(folder: Path) -> tuple[str, str] | None:
    """Store and id of the MLflow run that a folder names; the store's URI has no password."""
    try:
        known = json.loads(read_bytes(folder / RUN_FILE, limit=1 << 24))
        return (str(known["store"]), str(known["run_id"])) if known["run_id"] else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def known_run(store: Store, ids: Iterable[str | None], folder: Path, report: Callable[[str], None]) -> Any:
    """The first of these runs that is the folder's; None where there is none, or it is not there any more, or another
    folder's: `report` gets the reason. Raises StoreError where the store does not answer."""
    for run_id in dict.fromkeys(known for known in ids if known):
        try:
            run = store.get_run(run_id)
        except StoreError as error:
            if error.code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            report(f"MLflow has no run {run_id} any more")
            continue
        place, here = run.data.tags.get("output"), str(folder.resolve())
        if run.info.lifecycle_stage != "active":
            reason = "was deleted"
        elif place and place != here and _holds_a_run(Path(place)):
            reason = f"belongs to {place}, of which {here} is a copy"
        else:
            return run
        report(f"MLflow's run {run_id} {reason}")
    return None


def _holds_a_run(folder: Path) -> bool:
    try:
        return (folder / POINTS_FILE).is_file()
    except OSError:  # not permitted: somebody else's
        return True
