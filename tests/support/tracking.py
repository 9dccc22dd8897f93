"""Small runs that tests of tracking start, and what these runs and their store logged."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from tests.support.environment import REPO

CONFIG = REPO / "configs" / "keypad.yaml"


def arguments(shards: Path, output: Path, *more: str) -> list[str]:
    settings = [f"data.shards={shards}", f"output={output}", "train.global_batch=8", "train.steps=6"]
    settings += ["tracking.every_steps=2", "checkpoint.every_steps=3", "engine.kind=ddp"]
    settings += ["tracking.report=false"]
    return ["--config", str(CONFIG), *settings, *more]


def logged_steps(output: Path) -> list[int]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss/total" in line]


def points_of(store: Path, step: int) -> int:
    with closing(sqlite3.connect(store, timeout=30)) as database:
        (row,) = database.execute("SELECT count(*) FROM metrics WHERE key = 'loss/total' AND step = ?", [step])
        return row[0]
