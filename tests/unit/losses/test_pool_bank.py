"""The bank: the last rows of earlier steps, the same on every rank, in order, through wrap-around and resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cpsp_dist.config import ObjectiveSettings, load_config
from cpsp_dist.distributed import process_group
from cpsp_dist.losses.diagnostics import POOL_METRICS
from cpsp_dist.losses.gather import rank_and_world
from cpsp_dist.losses.global_batch import GlobalBatch, Rows
from cpsp_dist.losses.memory_bank import MemoryBank
from cpsp_dist.losses.mining import mine
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.losses.psa_v import psa_v, video_embedding
from cpsp_dist.losses.supcon import supcon
from cpsp_dist.training.checkpoint import Checkpoints
from cpsp_dist.training.trainer import train
from cpsp_dist.utils.errors import ConfigError
from tests.support.examples import examples
from tests.support.loss_cases import form, make_batch, random_batch, random_output
from tests.support.runs import KEYPAD, overrides

ONLY_PSA_V = ObjectiveSettings(event=0.0, category=0.0, avps=0.0, psa_s=0.0)


def members(video: list[int]) -> GlobalBatch:
    size = len(video)
    everywhere = torch.ones(size, dtype=torch.bool)
    return GlobalBatch(everywhere, torch.zeros(size, dtype=torch.int64), torch.tensor(video), everywhere, 0, 1)


def rows(first: int, count: int, category: int = 0) -> Rows:
    number = torch.arange(first, first + count)
    return Rows(number.double().unsqueeze(1).expand(-1, 2), torch.full((count,), category), number)


def content(bank: MemoryBank, present: list[int] | None = None) -> list[int]:
    found = bank.excluding(members(present or []), like=torch.zeros(1, 2, dtype=torch.float64))
    assert torch.equal(found.rows[:, 0].long(), found.video)  # rows and ids stay together
    return found.video.tolist()


@examples(100)
@given(size=st.integers(1, 7), counts=st.lists(st.integers(0, 9), max_size=8), absent=st.integers(0, 30))
def test_ring_holds_the_last_rows(size: int, counts: list[int], absent: int) -> None:
    """Against a list: any number of rows at a time, more than it holds, none; class 0 and video 0 among them."""
    bank, everything = MemoryBank(size), []
    for count in counts:
        bank.put(rows(len(everything), count))
        everything += range(len(everything), len(everything) + count)
        expected = everything[-size:]
        assert sorted(content(bank)) == expected
        # Row number n lies in slot n % size: after a wrap-around the newest come first.
        assert content(bank) == sorted(expected, key=lambda n: n % size)
        assert sorted(content(bank, [absent])) == [n for n in expected if n != absent]


def test_an_empty_slot_is_no_row_and_class_0_is() -> None:
    """A fresh bank's zeros are not videos of class 0."""
    event = torch.ones(2, 6, dtype=torch.bool)
    batch, output = make_batch(event, torch.tensor([1, 1]), video=torch.tensor([5, 6])), random_output(3, 2)
    objectives = Objectives(ONLY_PSA_V, pool="gather", bank=8)
    assert objectives(output, batch)[1]["psa_v"] == 0  # one class: no negative
    other = make_batch(event, torch.tensor([0, 0]), video=torch.tensor([7, 0]))
    found = objectives(random_output(4, 2), other)[1]["psa_v"]  # against the two of class 1
    mined_from = video_embedding(torch.cat([random_output(4, 2).fusion, output.fusion])).detach()
    category, video = torch.tensor([0, 0, 1, 1]), torch.tensor([7, 0, 5, 6])
    mined = mine(mined_from[:2], torch.arange(2), mined_from, category, video, 3)
    assert mined.mask.sum(1).tolist() == [2, 2]
    torch.testing.assert_close(found, psa_v(mined_from[:2], mined_from, mined, 0.2).mean())
    # Now rows of class 0 are remembered, and are negatives of a batch of class 1, and positives of one of class 0.
    objectives(random_output(5, 2), make_batch(event, torch.tensor([1, 0]), video=torch.tensor([8, 9])))
    health = objectives.health()
    assert health["pool/remembered"] == 4
    assert health["pool/size"] == 6
    assert health["pool/anchors_with_positive"] == 1


@pytest.mark.parametrize("mining", ["published", "proportional", "semihard", "supcon"])
@examples(25)
@given(seed=st.integers(0, 2**20), size=st.integers(0, 7))
def test_bank_equals_a_larger_pool_without_gradient(mining: Any, seed: int, size: int) -> None:
    """A batch beside a bank is the first part of a batch that holds both, with the bank's part detached; stale copies
    of the batch's videos left out."""
    objectives = Objectives(ONLY_PSA_V.model_copy(update={"mining": mining}), pool="gather", bank=9)
    before, now = random_batch(seed, 9), random_batch(seed + 7, size)
    old, new = random_output(seed, 9), random_output(seed + 5, size)
    objectives(old, before)
    total, terms = objectives(new, now)

    def rows_of(output: Any, batch: Any, kept: Tensor) -> Rows:
        return Rows(video_embedding(output.fusion)[kept], batch.category[kept], batch.video[kept])

    kept_now = now.valid & now.event.any(1)
    stale = torch.isin(before.video, now.video[now.valid])
    kept_before = before.valid & before.event.any(1) & ~stale
    fresh, remembered = rows_of(new, now, kept_now), rows_of(old, before, kept_before)
    both = Rows(*(torch.cat(pair) for pair in zip(fresh, (x.detach() for x in remembered), strict=True)))
    own = torch.arange(len(fresh.rows))
    other = both.video[own].unsqueeze(1) != both.video
    same = both.category[own].unsqueeze(1) == both.category
    if mining == "supcon":
        values, counted = supcon(fresh.rows, own, *both, 0.1), (other & same).any(1)
    else:
        k = max(1, round(3 * len(both.rows) / 64)) if mining == "proportional" else 3
        mined = mine(fresh.rows, own, *both, k, semihard=mining == "semihard")
        values, counted = psa_v(fresh.rows, both.rows, mined, 0.2), (other & ~same).any(1)
    expected = values[counted].sum() / max(int(counted.sum()), 1)
    torch.testing.assert_close(terms["psa_v"], expected.detach())
    (found,) = torch.autograd.grad(total, new.fusion)
    (wanted,) = torch.autograd.grad(expected, new.fusion)
    torch.testing.assert_close(found, wanted)
    assert old.fusion.grad is None


def remember(state: dict[str, Tensor], steps: range) -> dict[str, Tensor]:
    """The state after these steps of uneven batches of 8 slots, from `state`."""
    rank, ranks = rank_and_world()
    objectives = Objectives(ONLY_PSA_V, pool="gather", bank=11)
    objectives.load(state)
    for step in steps:
        complete, output = random_batch(step, 8), random_output(step, 8)
        own = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
        complete.video += 8 * (step % 3)
        batch = type(complete)(**{name: x[own] for name, x in vars(complete).items()})
        objectives(type(output)(*(None if x is None else x[own] for x in output)), batch)
    return objectives.state()


def bank_states(halves: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [remember({}, range(6)), *[remember(half, range(3, 6)) for half in halves]]


def test_same_content_and_order_on_all_ranks_and_after_a_resume_on_any_number(ranks: Any) -> None:
    """One process and 2 ranks, uninterrupted or resuming from a state: one content, bit for bit, wrapped around."""
    half, complete = remember({}, range(3)), remember({}, range(6))
    assert complete["bank.count"] > 2 * 11 > 11
    resumed = [remember(half, range(3, 6)), *(state for rank in ranks(bank_states, 2, [half]) for state in rank)]
    assert len(resumed) == 5
    for state in resumed:
        assert state.keys() == complete.keys()
        for name, tensor in complete.items():
            assert torch.equal(state[name], tensor), name


@examples(60)
@given(count=st.integers(0, 30), before=st.integers(1, 9), after=st.integers(1, 9))
def test_another_size_takes_over_the_newest(count: int, before: int, after: int) -> None:
    one, two = MemoryBank(before), MemoryBank(after)
    if count:
        one.put(rows(0, count))
    two.load(one.state())
    assert sorted(content(two)) == list(range(count))[-min(before, after) :]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_not_remembered(broken: float) -> None:
    """A step that the trainer leaves out for it must not spoil the steps after it."""
    bank, new = MemoryBank(4), rows(0, 3)
    new = new._replace(rows=new.rows.clone())
    new.rows[1, 1] = broken
    bank.put(new)
    assert content(bank) == [0, 2]
    assert bank.count == 2


def test_a_state_is_no_view_and_a_run_without_bank_has_none() -> None:
    bank = MemoryBank(3)
    bank.put(rows(0, 2))
    state = bank.state()
    bank.put(rows(2, 2))
    assert state["bank.video"].tolist() == [0, 1, 0]
    assert form("full").state() == {}
    form("full").load(state)  # a run that continues without its bank


def test_a_bank_of_local_pools_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("data: {shards: x}\npool: {bank: 64}\n")
    assert load_config(tmp_path / "x.yaml").pool.bank == 64
    with pytest.raises(ConfigError, match="bank=64 needs scope=gather"):
        load_config(tmp_path / "x.yaml", ["pool.scope=local"])


def train_with_bank(shards: Path, output: Path) -> None:
    """Steps not yet done of 8, on the ranks there are."""
    settings = ["train.steps=8", "checkpoint.every_steps=4", "model.dropout=0.1", "tracking.every_steps=2"]
    settings += ["pool.bank=20", "objectives.mining=semihard", "tracking.enabled=false", "engine.kind=ddp"]
    train(load_config(KEYPAD, overrides(shards, output, *settings)), process_group.discover())


def train_and_again(shards: Path, output: Path) -> dict[str, Tensor]:
    """What 8 steps end with; then steps 5 to 8 are forgotten and done again."""
    train_with_bank(shards, output)
    state, _ = Checkpoints(output).load(8)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(Checkpoints(output).path(8))
    dist.barrier()
    train_with_bank(shards, output)
    return state.weights | state.objectives


def test_training_with_a_bank_resumes_bit_for_bit_and_on_another_world_size(
    ranks: Any, keypad_shards: Path, tmp_path: Path
) -> None:
    """The bank is in the checkpoint; two ranks continue as if nothing had happened, one takes over the bank of two."""
    output = tmp_path / "run"
    expected = ranks(train_and_again, 2, keypad_shards, output, timeout=200)[0]
    state, _ = Checkpoints(output).load(8)
    found = state.weights | state.objectives
    assert found.keys() == expected.keys() > {"bank.rows", "bank.category", "bank.video", "bank.count"}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert 20 < found["bank.count"] <= 64  # wrapped around

    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    healthy = [line for line in metrics if "pool/size" in line]
    assert [line["step"] for line in healthy] == [2, 4, 6, 8]
    assert all(f"pool/{name}" in healthy[-1] for name in POOL_METRICS)
    assert healthy[-1]["pool/size"] > 8  # more than the global batch
    assert healthy[-1]["pool/gather_bytes"] == 4 * 2 * 256 * 4  # embeddings and gradients alone

    shutil.rmtree(Checkpoints(output).path(8))
    train_with_bank(keypad_shards, output)
    alone = Checkpoints(output).load(8)[0].objectives
    # The same videos, in the same order; dropout is a matter of ranks, so the rows differ a little.
    assert torch.equal(alone["bank.video"], found["bank.video"])
    assert torch.equal(alone["bank.category"], found["bank.category"])
    assert alone["bank.count"] == found["bank.count"]
