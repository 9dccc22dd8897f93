"""What a start prints before its first step, what it refuses, and what wastes machines."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from cpsp_dist.config import Config, load_config
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.distributed.card import Card
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.models import model_for
from cpsp_dist.training import header
from cpsp_dist.training.checkpoint import TrainingProgress
from cpsp_dist.training.header import describe_ranks, require_videos_for_all, say_start, warnings
from cpsp_dist.training.lr_schedule import TrainingSchedule
from cpsp_dist.training.setup import reader_options
from cpsp_dist.utils.errors import UserError
from tests.support.runs import KEYPAD

CPU = torch.device("cpu")


def configured(**sections: dict[str, object]) -> Config:
    return Config.model_validate({"data": {"shards": "-"}} | sections)


def gpus(*hosts: str, model: str = "NVIDIA H100", visible: int = 8) -> list[Card]:
    return [Card(host, "cuda", model, f"{host}-{number}", visible) for number, host in enumerate(hosts)]


def test_a_global_batch_below_the_number_of_ranks_is_refused() -> None:
    """B6: 448 of 512 ranks would never see a video."""
    config = configured(train={"global_batch": 64})
    require_videos_for_all(config, Ranks(0, 64, 0, CPU))
    with pytest.raises(UserError, match=r"train\.global_batch=64 leaves 448 of 512 ranks without a video: raise it"):
        require_videos_for_all(config, Ranks(0, 512, 0, CPU))


def test_ranks_that_are_idle_in_a_part_are_named() -> None:
    """B6: of the evaluation, too; and GPUs without a rank (B2: a pod of Kubernetes with 8 of them)."""
    config = configured(train={"global_batch": 64, "accumulation": 16}, evaluation={"global_batch": 2})
    lines = warnings(config, gpus(*["n1"] * 8))
    assert lines == [
        "a micro-batch of 4 videos leaves 4 ranks idle; lower train.accumulation",
        "evaluation.global_batch=2 is over all 8 ranks: 6 are idle in evaluations",
    ]
    assert warnings(configured(), gpus("n1")) == [
        "7 GPUs of n1 are idle; start a rank for each (torchrun --nproc-per-node)"
    ]
    assert warnings(configured(), gpus("n1", visible=1)) == []


def test_ranks_nodes_and_devices_are_described() -> None:
    assert describe_ranks(gpus("n1", "n1", "n2")) == "3 ranks on 2 nodes (n1, n2), NVIDIA H100"
    assert describe_ranks(gpus("a", "b", "c", "d", "e")).startswith("5 ranks on 5 nodes (a, b, c, d, …)")
    mixed = [*gpus("n1"), *gpus("n1", model="NVIDIA A100")]
    assert describe_ranks(mixed) == "2 ranks on n1, NVIDIA H100 and NVIDIA A100"
    threads = torch.get_num_threads()
    assert describe_ranks([Card("n1", "cpu")]) == f"1 rank on n1, CPU ({threads} thread{'s' * (threads > 1)} each)"


@pytest.mark.parametrize(
    ("settings", "engine", "store"),
    [
        (["engine.kind=ddp", "tracking.enabled=false"], "DDP", "off (tracking.enabled=false)"),
        (["engine.zero=2", "train.precision=bf16"], "DeepSpeed ZeRO 2", "https://tracking.example/"),
    ],
)
def test_the_header(
    settings: list[str],
    engine: str,
    store: str,
    keypad_shards: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ranks, nodes, device, precision, engine; network and parameters; data, videos and steps; where MLflow is."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://anna:geheim@tracking.example/")
    config = load_config(KEYPAD, [f"data.shards={keypad_shards}", f"output={tmp_path}", "train.steps=7", *settings])
    manifest = Manifest.load(keypad_shards)
    model, schedule = model_for(config.model, manifest), TrainingSchedule(config.train, 48)
    with caplog.at_level(logging.INFO):
        say_start(config, manifest, Ranks(0, 1, 0, CPU), model, schedule, TrainingProgress())
    lines = [record.getMessage() for record in caplog.records]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert lines[0].startswith("1 rank on ")
    assert lines[0].endswith(f", {config.train.precision}, {engine}")
    assert lines[1] == f"psp, full: {parameters:,} parameters"
    assert lines[2] == f"{keypad_shards}: 48 train, 16 val, 16 test videos; 7 steps of 32"
    assert lines[3] == f"MLflow: {store}"
    assert "geheim" not in "".join(lines)


@pytest.mark.parametrize(("given", "has_it"), [("bf16", False), ("bf16", True), ("fp32", False)])
def test_bf16_that_is_only_emulated_is_named(
    given: str,
    has_it: bool,
    keypad_shards: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(header, "has_bf16", lambda device: has_it)
    settings = [f"data.shards={keypad_shards}", f"output={tmp_path}", f"train.precision={given}"]
    config, manifest = load_config(KEYPAD, settings), Manifest.load(keypad_shards)
    model, schedule = model_for(config.model, manifest), TrainingSchedule(config.train, 48)
    say_start(config, manifest, Ranks(0, 1, 0, CPU), model, schedule, TrainingProgress())
    warned = ["train.precision=bf16: this CPU only emulates it, several times slower than fp32"]
    found = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert found == (warned if given == "bf16" and not has_it else [])


@pytest.mark.parametrize(("timeout", "patience"), [(600, 300), (3600, 300), (100, 50), (10, 5)])
def test_a_silent_disk_is_named_before_the_other_ranks_give_up(timeout: int, patience: float) -> None:
    """C5: with both limits at 600 s NCCL's abort hid the line that names the disk."""
    config = configured(engine={"timeout": timeout})
    assert reader_options(config, Ranks(0, 2, 0, CPU)).patience == patience <= timeout / 2
