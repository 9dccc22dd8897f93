"""`cpsp-dist bench scaling`: bytes and copies are what the sizes demand; on GPUs each rank has one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from cpsp_dist.bench import ranks, scaling
from cpsp_dist.bench.profiled import STEPS, figures_of
from cpsp_dist.cli.bench import _describe_scaling
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.utils.errors import UserError
from tests.support.simulated_device import CUDA, Record, SimulatedGpu
from tests.support.simulated_gpu import simulated_gpu
from tests.support.simulated_training import WORLD, simulated_ranks

VIDEOS = 3


class Profile:
    """In place of torch's profiler: a copy of a MB takes 1 ms, a kernel 1 µs, one of NCCL 500 ms."""

    last: Profile

    def __init__(self, **_: Any) -> None:
        Profile.last = self
        self.record = Record()

    def __enter__(self) -> Profile:
        assert SimulatedGpu.current is not None
        SimulatedGpu.current.record = self.record
        return self

    def __exit__(self, *_: object) -> None: ...

    def events(self) -> list[Any]:
        found = []
        done = [("Memcpy HtoD (Pinned -> Device)", copy.bytes / 1e3) for copy in self.record.copies]
        done += [(name, 5e5 if name.startswith("nccl") else 1.0) for name in self.record.kernels.elements()]
        for name, us in done:
            found.append(mock.Mock(device_time=us, is_user_annotation=False))
            found[-1].name, found[-1].device_type.name = name, "CUDA"
        for device in ("CUDA", "CPU"):  # what the optimizer's step encloses, and the host's part of it
            found.append(mock.Mock(device_time=9e9, is_user_annotation=True))
            found[-1].name, found[-1].device_type.name = "Optimizer.step#Adam.step", device
        return found


@pytest.mark.long
def test_a_row_of_a_gpu_has_copies_and_the_share_in_which_it_computes() -> None:
    """A batch is copied once a step, from pinned memory; waiting for another rank is not computing."""
    with simulated_ranks(), simulated_gpu(), mock.patch("torch.profiler.profile", Profile):
        row = scaling.measure_steps(Ranks(0, WORLD, 0, CUDA), VIDEOS, 1)
    found = Profile.last.record
    batch = scaling.rank_batch(VIDEOS, Ranks(0, 1, 0, torch.device("cpu")))
    large = [copy for copy in found.copies if copy.bytes > 1e4]
    assert {(copy.kind, copy.blocking) for copy in found.copies} == {("H2D pinned", False)}
    assert sum(copy.bytes for copy in large) == STEPS * (batch.visual.nbytes + batch.audio.nbytes)
    assert row["h2d_ms"] == pytest.approx(sum(copy.bytes for copy in found.copies) / STEPS / 1e6)
    nccl = sum(count for name, count in found.kernels.items() if name.startswith("nccl"))
    computing = sum(found.kernels.values()) - nccl
    assert nccl >= STEPS * 2, "embeddings there and gradients back"
    assert row["busy_share"] * row["step_ms"] == pytest.approx(computing / STEPS / 1e3)
    assert row["kernels"] == (computing + nccl + len(found.copies)) / STEPS
    assert row["pool_bytes"] == 2 * VIDEOS * 256 * 4, "embeddings of the other rank's videos, and gradients back"


def test_figures_are_of_one_step() -> None:
    events = [
        ("Memcpy HtoD (Pinned -> Device)", 3000.0),
        ("Memcpy DtoH", 9e9),
        ("gemm", 6000.0),
        ("ncclDevKernel", 9e9),
    ]
    assert figures_of(events, 3, 4.0) == {"h2d_ms": 1.0, "busy_share": 0.5, "kernels": 4 / 3}


def where(given: Ranks) -> dict[str, str]:
    return {"device": str(given.device)}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_rank_has_its_gpu_and_nccl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    groups: list[tuple[Any, ...]] = []
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *args, **more: groups.append((args[0], more)))
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    monkeypatch.setattr(ranks, "binds_device", lambda world: True)
    monkeypatch.setenv("LOCAL_RANK", "")
    threads = torch.get_num_threads()
    try:
        with simulated_gpu():
            ranks._rank(0, 2, str(tmp_path), device, where, ())
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    expected = ("nccl", torch.device("cuda", 0)) if device == "cuda" else ("gloo", None)
    assert [(backend, more["device_id"]) for backend, more in groups] == [expected]
    assert json.loads((tmp_path / "result.json").read_text()) == {"device": "cuda:0" if device == "cuda" else "cpu"}


def test_each_rank_needs_a_gpu_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[int, str]] = []

    def launch(function: Any, world: int, *args: Any, device: str) -> dict[str, Any]:
        started.append((world, device))
        return {"samples_per_second": 10.0 * world, "step_ms": 5.0, "waited_ms": 0.0, "pool_bytes": 0,
                "gradient_bytes": 0, "h2d_ms": 0.25, "busy_share": 0.5, "kernels": 1}  # fmt: skip

    monkeypatch.setattr(scaling, "launch", launch)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "simulated")
    with simulated_gpu():
        with pytest.raises(UserError, match="--ranks 2: here is 1 GPU, one for each rank"):
            scaling.bench_scaling(ranks=[1, 2])
        with mock.patch("torch.cuda.device_count", return_value=2):  # undone before the simulation is
            printed = _describe_scaling(scaling.bench_scaling())
    assert started == [(1, "cuda"), (2, "cuda")]
    assert printed.startswith("simulated; 64 videos a rank")
    assert [line.split()[-2:] for line in printed.splitlines()[-2:]] == [["0.25", "50%"]] * 2


def fail(given: Ranks) -> dict[str, str]:
    raise RuntimeError("the reason\nadvice of many lines")


def give_what_json_has_not(given: Ranks) -> dict[str, object]:
    """It fails after the measurement, where the result is written."""
    return {"device": given.device}


@pytest.mark.long
@pytest.mark.parametrize(
    ("function", "reason"),
    [(fail, "the reason"), (give_what_json_has_not, "Object of type device is not JSON serializable")],
)
def test_a_rank_that_fails_is_one_line(function: Any, reason: str) -> None:
    with pytest.raises(UserError, match=rf"^rank 0 of 1: {reason}$"):
        ranks.launch(function, 1)
