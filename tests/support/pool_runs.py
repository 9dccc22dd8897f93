"""What each rank of the tests of the pool computes, and one process with the complete batch beside it."""

from __future__ import annotations

import gc
import weakref
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cpsp_dist.config import Config, ObjectiveSettings
from cpsp_dist.data.batch import Batch
from cpsp_dist.distributed import process_group
from cpsp_dist.losses import avps, category, event, psa_s
from cpsp_dist.losses import psa_v as psa_v_module
from cpsp_dist.losses.gather import Gather, rank_and_world
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.models import Output
from cpsp_dist.training.engine import Engine, build_engine
from cpsp_dist.training.engine.deepspeed import DeepSpeedEngine
from tests.support.pool_cases import ALL, CASES, SLOTS, K, T, global_batch, relative
from tests.support.pool_cases import rank_share as share
from tests.support.pool_cases import seeded_network as network


class Run(NamedTuple):
    """Steps of one network with one set of objectives; a step is the cases of its parts (accumulation)."""

    network: str
    supervision: Any
    objectives: ObjectiveSettings
    steps: list[tuple[str, ...]]
    scope: Any = "gather"
    bank: int = 0


EACH = [(case,) for case in CASES]
SOME = [("uneven",), ("empty rank",)]


def mining(name: Any, **more: Any) -> ObjectiveSettings:
    return ALL.model_copy(update={"mining": name} | more)


#: Between them every objective, every way of mining, every form, a bank, and parts of different sizes.
RUNS = {
    "published mining": Run("psp", "full", ALL, EACH),
    "proportional": Run("psp", "full", mining("proportional", negatives=20), SOME),
    "semihard": Run("psp", "full", mining("semihard"), SOME),
    "supcon": Run("psp", "full", mining("supcon"), SOME),
    "weak": Run(
        "avel",
        "weak",
        mining("supcon", event=0.0, avps=0.0, psa_s=0.0, weak_category="published"),
        SOME,
    ),
    "published": Run(
        "psp",
        "full",
        ALL.model_copy(
            update={"psa_s_form": "published_rows", "background": "published", "few_negatives": "published"}
        ),
        SOME,
    ),
    "bank": Run("psp", "full", ALL, [("even",), *SOME, ("all background",), ("background rank",)], bank=16),
    "bank, supcon": Run("psp", "full", mining("supcon"), [("even",), *SOME], bank=16),
    "accumulated": Run("psp", "full", ALL, [("uneven", "empty rank")]),
    "accumulated, bank": Run(
        "psp", "full", mining("semihard"), [("uneven", "empty rank"), ("same clip twice", "even")], bank=9
    ),
}
OBJECTIVES = ("event", "category", "avps", "psa_s", "psa_v", "sspsp")
OF_SOME = ("gate", "modality", "contrast")  # of networks that give what they take


def only(name: str) -> ObjectiveSettings:
    return ALL.model_copy(update={other: 0.0 for other in OBJECTIVES if other != name})


#: Each objective alone too: in the sum of all, a mistake in a small one could hide behind the others. (In "uneven" no
#: video has two alike pairs, so AVPS no gradient.)
RUNS |= {
    f"{name} alone": Run("psp", "full", only(name), [("even",), ("empty rank" if name == "avps" else "uneven",)])
    for name in OBJECTIVES
}
RUNS |= {
    f"{name} alone": Run("small", "full", only("").model_copy(update={name: 1.0}), [("even",), ("uneven",)])
    for name in OF_SOME
}
UNDER_ZERO = {
    **{name: RUNS[name]._replace(steps=[("uneven",), ("background rank",)]) for name in ("published mining", "bank")},
    **{name: RUNS[name]._replace(steps=[("uneven",)]) for name in ("proportional", "semihard", "supcon")},
    **{name: RUNS[name] for name in ("accumulated", "weak")},
}
LOCAL = {"local": Run("psp", "full", ALL, EACH, scope="local")}


def averaged_gradient(engine: Engine, parameter: torch.nn.Parameter) -> Tensor | None:
    if not isinstance(engine, DeepSpeedEngine):
        return parameter.grad
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)


def gradients(
    runs: dict[str, Run], precision: str = "fp64", kind: str = "ddp", zero: int = 0
) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """For each step of each run the terms (of its last part) and the parameters' gradients before clipping, on this
    rank's share of the slots, averaged over the ranks by the engine."""
    ranks, results = process_group.discover(), {}
    for name, run in runs.items():
        model = network(run.network, run.supervision)
        train = {
            "precision": precision,
            "optimizer": "sgd",
            "grad_clip_norm": None,
            "global_batch": SLOTS * len(run.steps[0]),
        }
        train["accumulation"] = len(run.steps[0])
        described = {"data": {"shards": "-"}, "engine": {"kind": kind, "zero": zero}, "train": train}
        engine = build_engine(model, Config.model_validate(described), ranks)
        objectives = Objectives(run.objectives, pool=run.scope, bank=run.bank, supervision=run.supervision)
        for number, cases in enumerate(run.steps):
            for part, case in enumerate(cases):
                batch = global_batch(case)
                batch.video += 6 * (number + part)  # half of a bank's rows are stale copies
                batch = share(batch, ranks.rank, ranks.world)
                total, terms = objectives(engine(batch), batch)
                engine.backward(total)
                if part < len(cases) - 1:
                    engine.step(0.0)
            found = {key: averaged_gradient(engine, p) for key, p in model.named_parameters()}
            grads = {key: grad.clone() for key, grad in found.items() if grad is not None}
            assert len(grads) == len(list(model.parameters()))
            engine.step(0.0)  # the weights stay
            results[f"{name} {number}: {', '.join(cases)}"] = (terms, grads)
    return results


def plain_gradients(
    runs: dict[str, Run], dtype: torch.dtype = torch.float64
) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The same by one process with the complete batches and torch alone: no engine, no ranks, parts added up."""
    results = {}
    for name, run in runs.items():
        model = network(run.network, run.supervision).to(dtype)
        objectives = Objectives(run.objectives, pool=run.scope, bank=run.bank, supervision=run.supervision)
        for number, cases in enumerate(run.steps):
            model.zero_grad()
            for part, case in enumerate(cases):
                batch = global_batch(case)
                batch.video += 6 * (number + part)
                total, terms = objectives(model(batch.visual.to(dtype), batch.audio.to(dtype)), batch)
                (total / len(cases)).backward()
            grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
            results[f"{name} {number}: {', '.join(cases)}"] = (terms, grads)
    return results


def mean(dicts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What tracking does with terms."""
    return {name: sum(d[name] for d in dicts) / len(dicts) for name in dicts[0]}  # type: ignore[misc]


def require_exact(together: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """The check that the planted mistakes of `test_pool_mutants.py` have to fail."""
    for step, (terms, grads) in alone.items():
        assert relative(mean([rank[step][0] for rank in together]), terms) < 1e-12, step
        for rank in together:
            assert relative(rank[step][1], grads) < 1e-12, step


# ---- edges: no network, outputs as they may come

EDGE_TYPES = {2: torch.float64, 4: torch.float32}
EDGES = ["one class", "all distinct", "few negatives", "identical", "zero", "background rank", "empty rank", "nothing"]
WAYS = [
    (mode, scope, bank)
    for mode in ("published", "proportional", "semihard", "supcon")
    for scope, bank in (("gather", 0), ("gather", 20), ("local", 0))
]


def edge(case: str, dtype: torch.dtype) -> tuple[Output, Batch]:
    batch = global_batch(case if case in CASES else "even")
    g = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(SLOTS, *shape, generator=g, dtype=torch.float64).to(dtype)

    output = Output(normal(T), normal(K), normal(K), normal(T, 8), normal(T, 8), normal(T, 8), normal(T), None)
    batch.event[:, 0] |= case not in CASES
    if case == "all distinct":
        batch.category = torch.arange(SLOTS)
        output = output._replace(category_logits=normal(SLOTS))
    elif case == "few negatives":
        batch.category = (torch.arange(SLOTS) == 5).long()
    elif case == "identical":
        same = torch.ones(SLOTS, T, 8, dtype=dtype)
        output = output._replace(fusion=same, visual=same)
    elif case == "zero":
        output = Output(*(None if x is None else torch.zeros_like(x) for x in output))
    elif case == "nothing":
        batch.valid[:] = False
    return output, batch


def edges(dtype: torch.dtype) -> dict[tuple[Any, ...], dict[str, Tensor]]:
    """The terms, and the gradient's norm of each output, after two steps (a bank has something at the second)."""
    rank, ranks = rank_and_world()
    found = {}
    for way in WAYS:
        for case in EDGES:
            settings = ALL.model_copy(update={"mining": way[0], "negatives": 4})
            objectives = Objectives(settings, pool=way[1], bank=way[2])  # type: ignore[arg-type]
            complete, batch = edge(case, dtype)
            for step in range(2):
                batch.video += SLOTS * step
                own = slice(rank * SLOTS // ranks, (rank + 1) * SLOTS // ranks)
                output = Output(*(None if x is None else x[own].clone().requires_grad_() for x in complete))
                total, terms = objectives(output, share(batch, rank, ranks))
                total.backward()
            grads = {f"grad {n}": x.grad for n, x in output._asdict().items() if x is not None and x.grad is not None}
            squares = {n: g.square().sum() / ranks for n, g in grads.items()}
            health = {f"health {n}": torch.tensor(x) for n, x in objectives.health().items() if "gather" not in n}
            found[(*way, case)] = terms | squares | health
    return found


# ---- what the ranks do


def gathered(rows_of: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Every rank weighs the gathered rows by its own number."""
    rank = rank_and_world()[0]
    rows = rows_of[rank * 2 : rank * 2 + 2].clone().requires_grad_()
    gather = Gather(rows)
    everyone = gather.wait()
    (everyone * (rank + 1)).sum().backward()
    assert rows.grad is not None
    alive, everyone = weakref.ref(gather), everyone.detach()
    del gather
    gc.collect()
    return everyone, rows.grad, alive() is None


COLLECTIVES = ["all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "all_reduce", "broadcast"]
COLLECTIVES += ["all_gather", "reduce_scatter", "gather", "scatter", "barrier", "all_gather_object", "send", "recv"]


def collectives(cases: list[str]) -> list[list[str]]:
    """What one step of each case does, in order: collectives, losses, waits."""
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:

        def watch(owner: Any, name: str, label: str) -> None:
            real = getattr(owner, name)
            patch.setattr(owner, name, lambda *a, **k: (seen.append(label), real(*a, **k))[1])

        for name in COLLECTIVES:
            watch(dist, name, name)
        for module, name in ((event, "event_loss"), (category, "category_loss"), (avps, "avps"), (psa_s, "psa_s")):
            watch(module, name, "a loss")
        watch(psa_v_module, "mine", "mining")
        watch(Gather, "end", "wait")
        rank, ranks = rank_and_world()
        objectives = Objectives(ALL, pool="gather")
        steps = []
        for case in cases:
            batch = share(global_batch(case), rank, ranks)
            total, _ = objectives(network("psp", "full")(batch.visual, batch.audio), batch)
            seen.append("backward")
            total.backward()
            steps.append(list(seen))
            seen.clear()
    return steps


def costs(width: int) -> dict[str, dict[str, float]]:
    """Bytes and time of a step with objectives over the pool, embeddings of `width` in float32."""
    rank, ranks = rank_and_world()
    complete, batch = edge("even", torch.float32)
    own = slice(rank * SLOTS // ranks, (rank + 1) * SLOTS // ranks)
    wanted = {"psa_v": only("psa_v"), "both": only("psa_v").model_copy(update={"sspsp": 1.0}), "local": ALL}
    found = {}
    for name, chosen in wanted.items():
        fusion = torch.randn(SLOTS // ranks, T, width, requires_grad=True)
        output = Output(*(None if x is None else x[own].clone().requires_grad_() for x in complete))
        objectives = Objectives(chosen, pool="local" if name == "local" else "gather")
        objectives(output._replace(fusion=fusion), share(batch, rank, ranks))[0].backward()
        found[name] = objectives.health()
    return found


def under_zero(stage: int) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    return gradients(UNDER_ZERO, "fp32", "deepspeed", stage)


def everything() -> dict[str, Any]:
    if rank_and_world()[1] == 1:
        return {"gradients": gradients(RUNS)}
    return {
        "gradients": gradients(RUNS),
        "local": gradients(LOCAL),
        "edges": edges(EDGE_TYPES[rank_and_world()[1]]),
        "collectives": collectives(CASES),
        "gathered": gathered(torch.arange(24.0).view(8, 3)),
        "costs": costs(256),
    }
