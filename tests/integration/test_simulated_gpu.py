"""Training on the simulated GPU: nothing lies on another device, no copy makes the host wait, and the host waits for
the GPU at most twice a micro-batch: for the gradient's norm, and for the flag by which all ranks stop together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from cpsp_dist.bench.batches import own_objectives
from cpsp_dist.config import Config
from cpsp_dist.losses import psa_v
from cpsp_dist.models import MODELS
from tests.support.runs import saved_precision
from tests.support.simulated_device import CUDA
from tests.support.simulated_gpu import simulated_gpu
from tests.support.simulated_training import WARM_UP, SimulatedRun, SimulatedStep, simulate_training

#: The norm, and one flag.
BUDGET = 2

WEAK = ["model.supervision=weak", "objectives.event=0", "objectives.avps=0", "objectives.psa_s=0"]
PUBLISHED = ["objectives.psa_s_form=published_rows", "objectives.background=published"]
PUBLISHED += ["objectives.few_negatives=published"]
#: Every form: settings by name.
VARIANTS = {
    "psp": [],
    "weak": WEAK,
    "CMBS, weak": ["model.name=cmbs", *WEAK],
    "CACE-Net, weak": ["model.name=cace", *WEAK],
    "weak, published": [*WEAK, "objectives.weak_category=published", "objectives.mining=supcon"],
    "bank": ["pool.bank=24"],
    "bank, accumulation": ["pool.bank=24", "train.accumulation=2"],
    "sspsp": ["objectives.sspsp=1"],
    "local pool": ["pool.scope=local"],
    "accumulation": ["train.accumulation=2"],
    "one pool over parts": ["train.accumulation=2", "pool.over=parts", "pool.bank=24", "objectives.sspsp=1"],
    "pad": ["data.epoch_end=pad", "train.global_batch=14"],
    "uneven": ["train.global_batch=11"],
    "fp64": ["train.precision=fp64"],
    "sgd": ["train.optimizer=sgd", "train.grad_clip_norm=null"],
    "published forms": PUBLISHED,
    "listed samples": ["data.log_samples=true"],
    "bf16": ["train.precision=bf16"],
    "ZeRO 0": ["engine.zero=0"],
    "ZeRO 0, accumulation": ["engine.zero=0", "train.accumulation=2"],
    "ZeRO 2": ["engine.zero=2"],
    "ZeRO 2, accumulation": ["engine.zero=2", "train.accumulation=2"],
    "ZeRO 2, bfloat16": ["engine.zero=2", "train.precision=bf16"],
    "bf16, by default": ["train.precision=auto"],
    "ZeRO 1 by default": ["engine.zero=0", "train.precision=auto"],
}
SECTIONS = {name: field.annotation for name, field in Config.model_fields.items()}
ENGINE = SECTIONS["engine"].model_json_schema()["properties"]
#: DDP, and DeepSpeed at each of its stages.
ENGINES = [f"engine.kind={kind}" for kind in ENGINE["kind"]["enum"] if kind != "deepspeed"]
ENGINES += [f"engine.zero={stage}" for stage in range(ENGINE["zero"]["minimum"], ENGINE["zero"]["maximum"] + 1)]
MININGS = SECTIONS["objectives"].model_json_schema()["properties"]["mining"]["enum"]
SHORT = ("psp", "bank, accumulation", "ZeRO 0")
#: What stage 3 waits for by itself.
STAGE_3 = re.compile(r"zero/(stage3|partition_parameters|partitioned_param_coordinator)\.py:\d+ .*synchronize\(\)")
#: Of the gradients, of their norm and of the weights from stage 1 on, of the pool (two) and of the flag. Those of DDP's
#: own reducer, in C++, are counted by `cpsp-dist bench collectives`.
SHARDED = {"all_reduce": 3, "all_gather_into_tensor": 2, "reduce_scatter_tensor": 1}
COLLECTIVES = {
    "ZeRO 1 by default": SHARDED,
    "ZeRO 2": SHARDED,
    "ZeRO 2, bfloat16": SHARDED,
    "ZeRO 0": {"all_reduce": 2, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1},
    "psp": {"all_reduce": 1, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1},
}


def check(run: SimulatedRun, budget: int = BUDGET, steps: Sequence[SimulatedStep] = ()) -> None:
    """Of `steps`, or the settled one: no host sync above the budget; of all steps: no copy that makes the host wait."""
    for step in run.steps:
        for copy in step.record.copies:
            assert copy.blocking or copy.kind != "H2D pageable", f"waits in spite of non_blocking: {copy.where}"
    for step in steps or [run.step]:
        print(run.report(step))
        assert run.syncs_per_micro_batch(step) <= budget, run.report(step)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SHORT else pytest.mark.long) for name in VARIANTS]
)
def test_host_waits_for_the_norm_and_one_flag(name: str, keypad_shards: Path, tmp_path: Path) -> None:
    run = simulate_training(keypad_shards, tmp_path, *VARIANTS[name], evaluation=name == "psp")
    assert len(run.steps) == 4
    check(run)
    assert run.step.collectives == COLLECTIVES.get(name, run.step.collectives)
    assert bool(run.step.record.bf16_products) == ("bf16" in name)
    if "default" in name:  # DeepSpeed's network is in bf16 itself, without autocast's products
        assert saved_precision(tmp_path) == "bf16"


#: Its other output from the first epoch on: ZeRO 3 learns the order of the parameters again where it begins.
FROM_THE_START = {"cace": ["model.enhanced_from=0"]}


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("network", MODELS)
def test_each_network_engine_and_mining(network: str, engine: str, keypad_shards: Path, tmp_path: Path) -> None:
    """Three steps of each. Stage 3 waits in DeepSpeed, too: before it takes the gradients' parts, after the step, and
    for each parameter above its threshold, so that no more than two are on their way."""
    settings = [f"model.name={network}", engine, *own_objectives(network), *FROM_THE_START.get(network, [])]
    run = simulate_training(keypad_shards, tmp_path, *settings, saving=False, minings=MININGS)
    steps = run.steps[WARM_UP:]
    assert [step.mining for step in steps] == [mining for mining in MININGS for _ in range(3)]
    for record in (step.record for step in steps if engine.endswith("3")):
        in_deepspeed = [sync for sync in record.syncs if STAGE_3.search(sync.where)]
        assert len(in_deepspeed) >= 2
        record.syncs = [sync for sync in record.syncs if sync not in in_deepspeed]
    check(run, steps=steps)


@pytest.mark.long
def test_skipped_samples_cost_one_more(keypad_shards: Path, tmp_path: Path) -> None:
    """Where any rank may skip a sample, ranks exchange labels, and the host reads them."""
    run = simulate_training(keypad_shards, tmp_path, "data.on_error=skip")
    check(run, BUDGET + 1)
    assert run.step.collectives["all_gather_into_tensor"] == 2


@pytest.mark.long
def test_a_planted_item_is_found_with_file_and_line(
    keypad_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test of the test: one `.item()` in a loss."""
    file = tmp_path / "cpsp_dist" / "losses" / "planted.py"
    file.parent.mkdir(parents=True)
    file.write_text("def planted(values):\n\n    values.sum().item()\n    return values\n")
    scope: dict = {}
    exec(compile(file.read_text(), str(file), "exec"), scope)
    supcon = psa_v.psa_v
    monkeypatch.setattr(psa_v, "psa_v", lambda *args, **more: scope["planted"](supcon(*args, **more)))
    run = simulate_training(keypad_shards, tmp_path / "run")
    with pytest.raises(AssertionError, match=r"item: cpsp_dist/losses/planted\.py:3 values\.sum\(\)\.item\(\)"):
        check(run)


def test_what_a_gpu_refuses_is_refused_and_what_it_waits_for_is_recorded() -> None:
    with simulated_gpu() as machine:
        x = torch.arange(6.0, device=CUDA)
        assert x.device == torch.device("cuda", 0)
        assert not machine.record.syncs
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(6)
        pageable = torch.ones(6)
        y = pageable.to(CUDA, non_blocking=True)
        assert [copy.kind for copy in machine.record.copies] == ["H2D pageable"]
        assert pageable.pin_memory().to(CUDA, non_blocking=True).sum() == 6
        assert machine.record.copies[1].kind == "H2D pinned"
        before = len(machine.record.syncs)
        for act in (x[x > 2].sum, x.nonzero, x.unique, lambda: x.sum().item(), x.cpu, (x + y).tolist):
            act()
            assert len(machine.record.syncs) > before, act
            before = len(machine.record.syncs)
        x[torch.tensor([1, 2], device=CUDA)] = 0.0
        x.masked_fill_(x > 1, 0.0)
    assert torch.tensor([1.0]).device.type == "cpu"
