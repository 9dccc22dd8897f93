"""Engines: the state that leaves one enters any other, whatever its ZeRO stage, precision and rank count."""

from __future__ import annotations

import gc
import importlib
import math
import re
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cpsp_dist.config import Config
from cpsp_dist.data.batch import Batch
from cpsp_dist.distributed import process_group
from cpsp_dist.training.engine import Engine, TrainingState, build_engine
from cpsp_dist.training.engine.deepspeed_compat import _block_import
from cpsp_dist.utils.errors import UserError
from tests.support.environment import environment

KINDS = [
    *[("deepspeed", zero, precision) for zero in range(4) for precision in ("fp32", "bf16")],
    ("ddp", 0, "fp32"),
    ("ddp", 0, "fp64"),
]


class Small(nn.Module):
    """Sizes that no world size divides: padding of partitions is at work."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(13, 7)
        self.lstm = nn.LSTM(7, 5, batch_first=True, bidirectional=True)
        self.norm = nn.LayerNorm(10)
        self.last = nn.Linear(10, 1, bias=False)

    def forward(self, visual, audio):
        return self.last(self.norm(self.lstm(torch.relu(self.first(visual)))[0])) + 0 * audio.sum()


def engine(
    kind: str, zero: int, precision: str, state: TrainingState | None, accumulation: int = 1, optimizer: str = "adam"
) -> Engine:
    train = {"precision": precision, "global_batch": 12, "grad_clip_norm": 0.5, "accumulation": accumulation}
    train["optimizer"] = optimizer
    config = Config.model_validate({"data": {"shards": "-"}, "engine": {"kind": kind, "zero": zero}, "train": train})
    return build_engine(Small(), config, process_group.discover(), state)


def train_steps(wrapped: Engine, steps: range, accumulation: int = 1) -> list[float]:
    ranks, norms = process_group.discover(), []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(12, 6, 13, generator=generator).chunk(accumulation)
        y = torch.randn(12, 6, 1, generator=generator).chunk(accumulation)
        for part in range(accumulation):
            mine = x[part].chunk(ranks.world)[ranks.rank], y[part].chunk(ranks.world)[ranks.rank]
            batch = Batch(mine[0], mine[0], *[mine[1]] * 5)
            out = wrapped(batch)
            wrapped.backward((out.to(torch.promote_types(out.dtype, torch.float32)) - mine[1]).square().mean())
            norm = wrapped.step(1e-2)
        norms.append(norm)
    return norms


def exchange(states: dict[tuple, TrainingState]) -> dict[str, object]:
    """Train every kind 3 steps and on; restart it from its own state, and from each given state."""
    found: dict[str, object] = {"norms": {}, "states": {}, "bitwise": {}, "taken_over": {}, "stage": {}, "moved": {}}
    for kind in KINDS:
        complete = engine(*kind, None)
        found["norms"][kind] = train_steps(complete, range(3))
        half = found["states"][kind] = complete.capture()
        train_steps(complete, range(3, 6))
        again = engine(*kind, half)
        train_steps(again, range(3, 6))
        found["bitwise"][kind] = same(complete.capture(), again.capture())
        foreign = states.get(("deepspeed", 2, "fp32"))
        if foreign is not None:
            found["taken_over"][kind] = same(engine(*kind, foreign).capture(), foreign)
        if kind[0] == "deepspeed":
            optimizer = getattr(complete.engine.optimizer, "optimizer", complete.engine.optimizer)
            moments = sum(state["exp_avg"].numel() for state in optimizer.state.values())
            found["stage"][kind] = (complete.engine.zero_optimization_stage(), moments)
        if kind[2] != "bf16":
            found["moved"][kind] = [moved(kind, scale) for scale in (1000, 0.001)]
    found["compiler"] = "torch._inductor.compile_fx" in sys.modules
    return found


def moved(kind: tuple, scale: float) -> tuple[float, float]:
    """How far (L2) one step of SGD at rate 1 moves the weights, and the gradient's norm; `scale` is the gradient's."""
    wrapped = engine(*kind, None, optimizer="sgd")
    before = wrapped.capture().weights
    x = torch.randn(4, 6, 13, generator=torch.Generator().manual_seed(0))
    wrapped.backward(scale * wrapped(Batch(*[x] * 7)).square().mean())
    norm = wrapped.step(1.0)
    after = wrapped.capture().weights
    return torch.stack([(after[n] - before[n]).double().square().sum() for n in before]).sum().sqrt().item(), norm


def same(one: TrainingState, two: TrainingState) -> bool:
    parts = [(one.weights, two.weights), *[(one.moments[m], two.moments[m]) for m in one.moments]]
    return one.updates == two.updates and all(torch.equal(a[n], b[n].to(a[n])) for a, b in parts for n in a)


@pytest.mark.long
def test_state_is_complete_and_moves_between_all_engines(ranks):
    (one,) = ranks(exchange, 1, {}, timeout=200)
    on_three = ranks(exchange, 3, one["states"], timeout=300)
    for found in (one, *on_three):
        assert set(found["bitwise"]) == set(KINDS)
        assert all(found["bitwise"].values()), found["bitwise"]
        assert not found["compiler"], "4 s of each rank's start"
        assert len(found["stage"]) == 8
        assert len(found["moved"]) == 6
        for how_far, norm in (each[0] for each in found["moved"].values()):
            assert norm > 1
            assert how_far == pytest.approx(0.5, rel=1e-5), "a large gradient is clipped to exactly clip"
        for how_far, norm in (each[1] for each in found["moved"].values()):
            assert how_far == pytest.approx(norm, rel=1e-3), "a small one is left as it is"
            assert 1e-5 < norm < 0.5
    weights = sum(p.numel() for p in Small().parameters())
    for world, found in ((1, one), *((3, found) for found in on_three)):
        for (_, zero, precision), (stage, moments) in found["stage"].items():
            assert stage == (1 if (zero, precision) == (0, "bf16") else zero)  # bf16 needs stage 1's master weights
            share = -(-weights // world) if stage else weights  # and what pads the parts
            assert share <= moments < share + 0.2 * weights, (zero, precision, world)
    for found in on_three:
        assert set(found["taken_over"]) == set(KINDS)
        assert all(found["taken_over"].values()), found["taken_over"]
        for kind in KINDS:
            tolerance = 3e-2 if kind[2] == "bf16" else 1e-6
            assert found["norms"][kind] == pytest.approx(one["norms"][("ddp", 0, "fp64")], rel=tolerance), kind
            assert found["norms"][kind] == on_three[0]["norms"][kind], "all ranks see one norm"


def restore_by_dead_setters() -> dict[tuple, str]:
    """What a restore says where a setter of DeepSpeed does nothing; "" where it succeeds."""
    from deepspeed import utils

    get_local, found = utils.safe_get_local_optimizer_state, {}
    dead = {
        (2, "fp32"): ("safe_set_full_optimizer_state", lambda *_: None),
        (2, "bf16"): ("safe_set_full_fp32_param", lambda *_: None),
        (3, "fp32"): ("safe_get_local_optimizer_state", lambda *arguments: get_local(*arguments).clone()),
    }
    for (zero, precision), (name, setter) in dead.items():
        kind = ("deepspeed", zero, precision)
        trained = engine(*kind, None)
        train_steps(trained, range(2))
        state, original = trained.capture(), getattr(utils, name)
        for broken in (True, False):
            if broken:
                setattr(utils, name, setter)
            try:
                engine(*kind, state)
                found[(*kind, broken)] = ""
            except UserError as error:
                found[(*kind, broken)] = str(error)
            finally:
                setattr(utils, name, original)
    return found


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_setter_that_does_nothing_fails_the_restore(ranks, world):
    for found in ranks(restore_by_dead_setters, world, timeout=200):
        texts = {kind[1:3]: text for kind, text in found.items() if kind[3]}
        assert not any(text for kind, text in found.items() if not kind[3])
        assert len(texts) == 3
        for (zero, precision), text in texts.items():
            what = "weight" if precision == "bf16" else "exp_avg"
            assert re.match(rf"DeepSpeed \S+ did not take the checkpoint: {what} of first.weight", text), (zero, text)
            assert "was tested with DeepSpeed" in text


def leave_out() -> dict[tuple, list[float]]:
    """Two steps that are not finite on rank 0 alone, among good ones: the norms, and whether state and all later steps
    are those of an engine that never saw them."""
    found = {}
    ranks = process_group.discover()
    for kind in KINDS:
        troubled, spared = engine(*kind, None), engine(*kind, None)
        norms = []
        for wrapped in (troubled, spared):
            train_steps(wrapped, range(3))
            for trouble in (float("nan"), float("inf")) if wrapped is troubled else ():
                out = wrapped(Batch(*[torch.ones(4, 6, 13)] * 7)).float()
                # The second is infinite itself, and its gradient is zero.
                bad = out.mean() * trouble if trouble != trouble else 0 * out.mean() + trouble
                wrapped.backward(out.mean() if ranks.rank else bad)
                norms.append(wrapped.step(1e-2))
            train_steps(wrapped, range(3, 5))
        found[kind] = [*norms, float(same(troubled.capture(), spared.capture()))]
    return found


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_step_that_is_not_finite_changes_nothing_on_any_rank(ranks, world):
    for found in ranks(leave_out, world, timeout=300):
        assert set(found) == set(KINDS)
        for kind, (first, second, unchanged) in found.items():
            assert not math.isfinite(first), kind
            assert not math.isfinite(second), kind
            assert unchanged, kind


def accumulated(accumulation: int) -> dict[tuple, dict[str, torch.Tensor]]:
    weights = {}
    for kind in (("deepspeed", 0, "fp32"), ("deepspeed", 2, "fp32"), ("ddp", 0, "fp32")):
        wrapped = engine(*kind, None, accumulation)
        train_steps(wrapped, range(3), accumulation)
        weights[kind] = wrapped.capture().weights
    return weights


def test_accumulated_parts_are_one_batch(ranks):
    """Mean-squared error over 3 parts of 4 is that over 12: the same weights, on one rank and on two."""
    (expected,) = ranks(accumulated, 1, 1)
    for world in (1, 2):
        for found in ranks(accumulated, world, 3):
            for kind, weights in found.items():
                for name, tensor in weights.items():
                    torch.testing.assert_close(tensor, expected[kind][name], rtol=1e-4, atol=1e-5)


def train_in_new_groups(folder: Path, groups: int) -> list[dict[tuple, TrainingState]]:
    """What each kind has after 3 steps, trained in one process group after the other."""
    found: list[dict[tuple, TrainingState]] = []
    for group in range(groups):
        if group:
            ranks = process_group.discover()
            dist.barrier()
            dist.destroy_process_group()
            store = dist.FileStore(str(folder / f"group{group}"), ranks.world)
            dist.init_process_group("gloo", store=store, rank=ranks.rank, world_size=ranks.world)
        found.append({})
        for kind in KINDS:
            wrapped = engine(*kind, None)
            train_steps(wrapped, range(3))
            found[-1][kind] = wrapped.capture()
            module = weakref.ref(wrapped.module)
            wrapped.close()
            del wrapped
            gc.collect()
            assert module() is None or kind[1] == 3, f"{kind} stays in memory"
    return found


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.long)])
def test_engines_work_in_a_second_process_group(ranks, tmp_path, world):
    """DeepSpeed keeps groups in globals. The states are those of a process that had one group only, bit for bit."""
    alone = ranks(train_in_new_groups, world, tmp_path, 1)
    for (expected,), found in zip(alone, ranks(train_in_new_groups, world, tmp_path, 3, timeout=300), strict=True):
        assert len(found) == 3
        for kinds in found:
            assert set(kinds) == set(KINDS)
            assert [kind for kind in KINDS if not same(kinds[kind], expected[kind])] == []


def test_deepspeed_brings_no_mlflow() -> None:
    """Which is most of the CPU time of its import, on every rank. In a new process: this one may have both."""
    code = "import sys, torch; from cpsp_dist.training.engine import import_deepspeed as start; "
    code += "start(torch.device('cpu')); "
    code += "print(*sorted({'deepspeed', 'mlflow'} & {*sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), check=True, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["deepspeed"]


def test_a_package_is_kept_from_one_thread_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While rank 0 imports DeepSpeed its tracker imports mlflow."""
    (tmp_path / "kept_from_one.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with _block_import("kept_from_one"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("kept_from_one")
        other = threading.Thread(target=importlib.import_module, args=["kept_from_one"])
        other.start()
        other.join(60)
        assert sys.modules.pop("kept_from_one")
    assert importlib.import_module("kept_from_one")
