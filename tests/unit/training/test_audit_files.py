"""`audit/rank*.jsonl` of a run, damaged in every way: damaged lines are left out with a warning, training continues."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch

from cpsp_dist.config import load_config
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.training.step_metrics import Audit
from cpsp_dist.utils.json_lines import parse_line
from tests.support.limits import within_limits
from tests.support.mutations import damaged, replaced
from tests.support.tiny_shards import write_shards


def test_every_damage_to_an_audit_costs_damaged_lines_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config("keypad", [f"output={tmp_path / 'run'}", "data.shards=s", "data.log_samples=true"])
    manifest, ranks = write_shards(tmp_path / "shards", {"train": [3]}).manifest, Ranks(0, 1, 0, torch.device("cpu"))
    folder = tmp_path / "run" / "audit"
    folder.parent.mkdir()
    with closing(Audit(config, manifest, ranks, 0)) as audit:
        for step in range(1, 9):
            audit.write_step(step, [step % 3, (step + 1) % 3])
    undamaged = (folder / "rank0.jsonl").read_bytes()
    lines = undamaged.splitlines(keepends=True)
    (folder / "rank1.jsonl").mkdir()  # keeps no other file from being cut
    for content in damaged(undamaged, 13, 100):
        for name in ("rank0.jsonl", "rank2.jsonl"):
            (folder / name).write_bytes(content)
        caplog.clear()
        with within_limits(content):
            Audit(config, manifest, ranks, 6)
        for name in ("rank0.jsonl", "rank2.jsonl"):
            kept = (folder / name).read_bytes().splitlines(keepends=True)
            assert all((parse_line(line) or {"step": 9})["step"] <= 6 for line in kept)
            assert {line for line in lines[:6] if line in content.splitlines(keepends=True)} <= {*kept}
        assert any("rank1.jsonl" in line and "; training continues" in line for line in caplog.messages)
        assert all("\n" not in line for line in caplog.messages)
    (folder / "rank0.jsonl").unlink()
    for what in replaced(folder / "rank0.jsonl"):
        with closing(Audit(config, manifest, ranks, 6)) as audit:
            audit.write_step(7, [0])
        assert ((folder / "rank0.jsonl").is_file()) is (what in ("a link to nowhere", "nothing")), what
        if what in ("a link to nowhere", "nothing"):
            (folder / "rank0.jsonl").resolve().unlink()
