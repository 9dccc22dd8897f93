"""Every network with its objectives under every ZeRO stage: two ranks do what one process does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cpsp_dist.config import Config
from cpsp_dist.distributed import process_group
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.training.engine import build_engine
from tests.support.pool_cases import global_batch
from tests.support.pool_cases import rank_share as share
from tests.support.pool_cases import seeded_network as network

MODELS = {"psp": "full", "avel": "weak", "avsdn": "full", "cmran": "weak", "cmbs": "weak", "cace": "full"}
#: The main network, and CACE-Net, which has CMBS's base class and CMRAN's layers.
SHORT = ["psp", "cace"]


def train(names: list[str], kinds: list[tuple[str, int]]) -> dict[tuple[str, str, int], dict[str, Tensor]]:
    """The weights of each network after 3 steps of plain SGD in fp32."""
    ranks, found = process_group.discover(), {}
    for name in names:
        supervision = MODELS[name]
        for kind, zero in kinds:
            objectives: dict[str, Any] = {"sspsp": 1.0, "psa_s": 1.0, "margin": 0.8}
            if supervision == "weak":
                objectives |= {"event": 0.0, "avps": 0.0, "psa_s": 0.0}
            if name == "cace":
                objectives |= {"gate": 1.0, "modality": 1.0, "contrast": 1.0}
            config = Config.model_validate(
                {
                    "data": {"shards": "-"},
                    "model": {"name": name, "supervision": supervision},
                    "objectives": objectives,
                    "engine": {"kind": kind, "zero": zero},
                    "train": {"optimizer": "sgd", "grad_clip_norm": None, "global_batch": 12, "precision": "fp32"},
                }
            )
            engine = build_engine(network(name, supervision), config, ranks)
            loss = Objectives(config.objectives, pool="gather", supervision=config.model.supervision)
            for case in ("even", "uneven", "empty rank"):
                batch = share(global_batch(case), ranks.rank, ranks.world).to(ranks.device, torch.float32)
                engine.backward(loss(engine(batch), batch)[0])
                engine.step(1e-3)
            engine.module.eval()
            with torch.no_grad():
                engine(batch)  # ZeRO-3 has to find each parameter in evaluation too
            found[name, kind, zero] = engine.capture().weights
    return found


DDP, *ZERO = [("ddp", 0), *[("deepspeed", zero) for zero in range(4)]]


@pytest.mark.parametrize(
    ("names", "kinds"),
    [(SHORT, [ZERO[3]]), pytest.param(list(MODELS), [DDP, *ZERO], marks=pytest.mark.long)],
    ids=["ZeRO-3", "all"],
)
def test_each_network_under_each_zero_stage(ranks: Any, names: list[str], kinds: list[tuple[str, int]]) -> None:
    (alone,) = ranks(train, 1, names, [DDP])
    starts = {name: network(name, MODELS[name]).float().state_dict() for name in names}
    for together in ranks(train, 2, names, kinds, timeout=300):
        assert together.keys() == {(name, *kind) for name in names for kind in kinds}
        for (name, kind, zero), weights in together.items():
            for key, expected in alone[name, "ddp", 0].items():
                close = torch.allclose(weights[key], expected, rtol=1e-5, atol=1e-5)
                assert close, (name, kind, zero, key, (weights[key] - expected).abs().max())
            assert any(not torch.equal(weights[key], start) for key, start in starts[name].items()), "it has trained"
