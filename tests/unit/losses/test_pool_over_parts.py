"""`pool.over=parts`: the gradients of W ranks in A parts are those of one process with the complete global batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from cpsp_dist.config import Config, ObjectiveSettings
from cpsp_dist.data.batch import Batch
from cpsp_dist.data.reader.schedule import ReadSchedule
from cpsp_dist.distributed import process_group
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.models.layers import start_step
from cpsp_dist.training import grad_cache, step
from cpsp_dist.training.engine import build_engine
from cpsp_dist.training.engine.deepspeed import DeepSpeedEngine
from cpsp_dist.training.feed import MicroBatch
from cpsp_dist.training.step import StepRunner, dropout_seed
from tests.support.pool_cases import ALL, SLOTS, global_batch, rank_share, relative, seeded_network
from tests.support.ranks import in_each_world


class Run(NamedTuple):
    """Steps of one network; a step is the cases of its parts."""

    objectives: ObjectiveSettings
    steps: list[tuple[str, ...]]
    bank: int = 0
    dropout: float = 0.0
    network: str = "psp"
    supervision: Any = "full"


def mining(name: str, **more: Any) -> ObjectiveSettings:
    return ALL.model_copy(update={"mining": name} | more)


TWO, FOUR = ("uneven", "even"), ("uneven", "empty rank", "background rank", "same clip twice")
#: Of some, at the second step, a bank has rows of the first; 9 rows are fewer than a step has.
RUNS = {
    "published mining": Run(ALL, [TWO, ("all background", "empty rank")]),
    "four parts": Run(ALL, [FOUR]),
    "proportional": Run(mining("proportional", negatives=20), [TWO]),
    "semihard, bank": Run(mining("semihard"), [TWO, ("even", "uneven")], bank=9),
    "supcon, bank": Run(mining("supcon"), [FOUR, FOUR], bank=30),
    "weak": Run(mining("supcon", event=0.0, avps=0.0, psa_s=0.0), [TWO], network="avel", supervision="weak"),
}
#: Steps whose gradient one process alone has to 1e-6 in float32; with "empty rank" rounding is 3e-5 of it.
LEARNED = {
    "published mining": RUNS["published mining"]._replace(steps=[TWO, ("background rank", "uneven")]),
    "four parts": RUNS["four parts"]._replace(steps=[("uneven", "even", "background rank", "same clip twice")]),
    **{name: RUNS[name] for name in ("semihard, bank", "weak")},
}


def part_of(run: Run, number: int, part: int) -> Batch:
    batch = global_batch(run.steps[number][part])
    batch.video += 6 * (2 * number + part)  # some videos are in two parts
    return batch


def config_of(run: Run, precision: str, kind: str, zero: int) -> Config:
    parts = len(run.steps[0])
    train = {"precision": precision, "optimizer": "sgd", "grad_clip_norm": None, "accumulation": parts}
    train["global_batch"] = SLOTS * parts
    engine = {"kind": kind, "zero": zero}
    return Config.model_validate(
        {"data": {"shards": "-"}, "engine": engine, "train": train, "pool": {"over": "parts", "bank": run.bank}}
    )


def network_of(run: Run) -> nn.Module:
    model = seeded_network(run.network, run.supervision)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = run.dropout
    return model


def gradients(runs: dict[str, Run], precision: str = "fp64", kind: str = "ddp", zero: int = 0) -> dict[str, Any]:
    """For each step of each run its terms, and the parameters' gradients as the engine has averaged them."""
    ranks, results = process_group.discover(), {}
    for name, run in runs.items():
        config, model = config_of(run, precision, kind, zero), network_of(run)
        engine = build_engine(model, config, ranks)
        model.train()
        objectives = Objectives(
            run.objectives, pool="gather", bank=run.bank, supervision=run.supervision, parts=config.train.accumulation
        )
        parts = config.train.accumulation
        schedule = ReadSchedule([SLOTS * parts], global_batch=SLOTS * parts, seed=1, accumulation=parts)
        runner = StepRunner(config, ranks, schedule, ReadBeforeUpdate(engine, config), objectives)  # type: ignore[arg-type]
        for number, cases in enumerate(run.steps):
            shares = [rank_share(part_of(run, number, part), ranks.rank, ranks.world) for part in range(len(cases))]
            taken = iter([MicroBatch(share, torch.where(share.valid, share.index, -1), None) for share in shares])
            feed: Any = SimpleNamespace(take=taken.__next__, prefetch=lambda: None)
            result = runner.run_micro_batches(feed, number, 0, 0.0)
            assert len(result.micro_losses) == 1
            results[f"{name} {number}"] = (result.micro_losses[0], runner.engine.found)  # type: ignore[attr-defined]
        engine.close()
    return results


class ReadBeforeUpdate:
    """An engine that keeps a copy of the gradients before its last `step`; the learning rate is 0."""

    def __init__(self, engine: Any, config: Config) -> None:
        self.engine, self.parts, self.module, self.count = engine, config.train.accumulation, engine.module, 0
        self.found: dict[str, Tensor] = {}

    def __call__(self, batch: Batch) -> Any:
        return self.engine(batch)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, learning_rate: float) -> float:
        self.count += 1
        if self.count % self.parts == 0:
            self.found = {}
            for name, parameter in self.module.named_parameters():
                grad = parameter.grad
                if isinstance(self.engine, DeepSpeedEngine):
                    from deepspeed.utils import safe_get_full_grad

                    grad = safe_get_full_grad(parameter)
                assert grad is not None, name
                self.found[name] = grad.clone()
        return float(self.engine.step(learning_rate))


def alone(runs: dict[str, Run], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """The same by torch alone: one process, one forward pass over all parts' slots, no engine, no ranks, no parts."""
    results = {}
    for name, run in runs.items():
        model = network_of(run).to(dtype)
        objectives = Objectives(run.objectives, pool="gather", bank=run.bank, supervision=run.supervision)
        for number, cases in enumerate(run.steps):
            model.zero_grad()
            batches = [part_of(run, number, part) for part in range(len(cases))]
            both = Batch(**{key: torch.cat([getattr(b, key) for b in batches]) for key in vars(batches[0])})
            total, terms = objectives(model(both.visual.to(dtype), both.audio.to(dtype)), both)
            total.backward()
            grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
            results[f"{name} {number}"] = (terms, grads)
    return results


def require_equal(together: list[dict[str, Any]], expected: dict[str, Any], bound: float) -> None:
    for key, (terms, grads) in expected.items():
        means = {name: sum(rank[key][0][name] for rank in together) / len(together) for name in terms}
        assert relative(means, terms) < bound, key  # type: ignore[arg-type]
        for rank in together:
            assert relative(rank[key][1], grads) < bound, key


# ---- planted mistakes, each with a run that sees it


@contextmanager
def planted(owner: Any, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


def wrong_scale() -> Any:
    right = grad_cache.CachedOutputs.surrogate
    return planted(grad_cache.CachedOutputs, "surrogate", lambda *a: right(*a) / a[0].parts)


def wrong_part() -> Any:
    right = grad_cache.CachedOutputs.surrogate
    return planted(grad_cache.CachedOutputs, "surrogate", lambda cache, part, out: right(cache, 0, out))


def parts_weighed_alike() -> Any:
    """Each part's loss over its own count, as without a common pool."""
    from cpsp_dist.losses import objectives

    def over_ranks(values: Tensor, counted: Tensor, batch: Any) -> Tensor:
        return batch.ranks * values.sum() / (len(counted) / 2)

    return planted(objectives, "over_ranks", over_ranks)


def other_dropout() -> Any:
    seeds = iter(range(10**6))
    return planted(step, "dropout_seed", lambda *_: next(seeds))


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "wrong_scale": (wrong_scale, "published mining"),
    "wrong_part": (wrong_part, "published mining"),
    "parts_weighed_alike": (parts_weighed_alike, "published mining"),
}
CACE = ALL.model_copy(update={"gate": 1.0, "modality": 1.0, "contrast": 1.0})
#: CACE-Net also draws the noise of its second view.
DROPOUT = {
    "dropout": Run(ALL, [("even", "uneven")], dropout=0.5),
    "cace": Run(CACE, [("even", "uneven")], dropout=0.5, network="cace"),
}


def with_dropout(name: str) -> dict[str, Any]:
    """One process: in parts with the cache, and by torch alone with the masks of both parts."""
    run = DROPOUT[name]
    cached = gradients({name: run})
    with other_dropout():
        mistaken = gradients({name: run})
    model = network_of(run)
    model.train()
    start_step(model, 0.0)
    config, ranks = config_of(run, "fp64", "ddp", 0), process_group.discover()
    outputs, batches = [], [part_of(run, 0, part) for part in (0, 1)]
    for part, batch in enumerate(batches):
        torch.manual_seed(dropout_seed(config, 0, part, ranks))
        outputs.append(model(batch.visual, batch.audio))
    together = type(outputs[0])(*(None if x[0] is None else torch.cat(x) for x in zip(*outputs, strict=True)))
    total, terms = Objectives(run.objectives, pool="gather")(together, grad_cache.joined(batches))
    total.backward()
    grads = {key: p.grad for key, p in model.named_parameters()}
    return {"cached": cached, "mistaken": mistaken, "plain": {f"{name} 0": (terms, grads)}}


def everything() -> dict[str, Any]:
    found: dict[str, Any] = {"right": gradients(RUNS)}
    for name, (mistake, run) in MISTAKES.items():
        with mistake():
            found[name] = gradients({run: RUNS[run]})
    return found


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """World size -> what `everything` gave on each rank."""
    return in_each_world(everything, tmp_path_factory)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return alone(RUNS)


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(4, marks=pytest.mark.long)])
def test_ranks_and_parts_equal_one_process(worlds: Any, expected: Any, world: int) -> None:
    """Float64, DDP, two and four parts, uneven and empty ranks, banks: 1e-12."""
    require_equal([rank["right"] for rank in worlds(world)], expected, 1e-12)
    assert all(torch.cat([g.flatten() for g in grads.values()]).norm() > 1e-3 for _, grads in expected.values())


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistake_is_caught(worlds: Any, expected: Any, mistake: str) -> None:
    found = [rank[mistake] for rank in worlds(2)]
    with pytest.raises(AssertionError):
        require_equal(found, {key: expected[key] for key in found[0]}, 1e-12)
    assert max(relative(found[0][key][1], expected[key][1]) for key in found[0]) > 1e-3


@pytest.mark.parametrize("name", ["dropout", pytest.param("cace", marks=pytest.mark.long)])
def test_second_pass_repeats_dropout(ranks: Any, name: str) -> None:
    """One process with both parts' dropout masks has the same gradients; other masks in the second pass do not."""
    (found,) = ranks(with_dropout, 1, name)
    require_equal([found["cached"]], found["plain"], 1e-12)
    assert relative(found["mistaken"][f"{name} 0"][1], found["plain"][f"{name} 0"][1]) > 1e-3


def under_zero(stage: int) -> dict[str, Any]:
    return gradients(LEARNED, "fp32", "deepspeed", stage)


@pytest.mark.parametrize("stage", [pytest.param(stage, marks=pytest.mark.long) for stage in (0, 1, 2, 3)])
def test_each_zero_stage_in_float32(ranks: Any, stage: int) -> None:
    require_equal(ranks(under_zero, 2, stage, timeout=300), alone(LEARNED, torch.float32), 1e-5)
