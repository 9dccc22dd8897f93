"""Which MLflow run an output folder belongs to: that of an earlier start, where it is one and is there still."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cpsp_dist.config import Config, flat
from cpsp_dist.tracking.store import RUN_FILE, Store, StoreError, tracking_uri
from cpsp_dist.utils.json_lines import JsonLines, parse_line, read_bytes
from cpsp_dist.utils.redact import without_secrets

#: The points of a run, in its folder.
POINTS_FILE = "metrics.jsonl"
#: Its starts, too.
STARTS_FILE = "starts.jsonl"


class RunRecord:
    """The file in which a folder names its MLflow run, for starts before its first checkpoint."""

    def __init__(self, config: Config, data: str):
        """data: the shards' fingerprint."""
        self.file = Path(config.output) / RUN_FILE
        self._starts = JsonLines(self.file.with_name(STARTS_FILE), lambda text: None)
        store = without_secrets(tracking_uri(config))
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
        try:
            known = json.loads(read_bytes(self.file))
            return known["run_id"] if known == {"run_id": known["run_id"], **self._identity} else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def write(self, run_id: str) -> None:
        with contextlib.suppress(OSError):
            self.file.write_text(json.dumps({"run_id": run_id, **self._identity}), encoding="utf-8")


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
        return str(known["store"]), str(known["run_id"])
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
