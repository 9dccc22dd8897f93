"""`engine.compile`: what is refused, and what it leaves of a network; training with it is test_cuda_graphs.py's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cpsp_dist.config import Config
from cpsp_dist.distributed.devices import explain
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.models import Output, build_model
from cpsp_dist.models.psp import PSP
from cpsp_dist.training.engine import build_engine, check_engine_settings
from cpsp_dist.training.engine.base import build_optimizer
from cpsp_dist.utils.errors import ConfigError, UserError
from tests.support.environment import REPO, environment
from tests.support.runs import KEYPAD, loss_history, overrides
from tests.support.simulated_device import CUDA
from tests.support.simulated_gpu import simulated_gpu


def config_of(**engine: object) -> Config:
    described = {"data": {"shards": "-"}, "engine": engine, "train": {"precision": "fp32"}}
    return Config.model_validate(described)


def test_graphs_without_a_gpu_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine\.compile=graphs needs a GPU, and there is none here"):
        check_engine_settings(config_of(kind="ddp", compile="graphs"), Ranks(0, 1, 0, torch.device("cpu")))


@pytest.mark.parametrize("how", ["inductor", "graphs"])
def test_weights_in_parts_are_refused(how: str) -> None:
    with pytest.raises(ValueError, match=r"engine\.compile needs complete weights, which engine\.zero=3 has not"):
        config_of(zero=3, compile=how)


def graphed_network() -> tuple[nn.Module, Tensor, Tensor]:
    """On the simulated GPU, with a batch of 2 videos."""
    network = build_model("psp", visual_channels=512, audio_channels=128, categories=3)
    build_engine(network, config_of(kind="ddp", compile="graphs"), Ranks(0, 1, 0, CUDA))
    return network.train(), torch.rand(2, 10, 7, 7, 512, device=CUDA), torch.randn(2, 10, 128, device=CUDA)


def test_a_backward_pass_of_an_earlier_forward_pass_is_refused() -> None:
    """The graphs have memory for one: it would give the gradients of another."""
    with simulated_gpu():
        network, visual, audio = graphed_network()
        first, second = network(visual, audio), network(visual + 1, audio)
        with pytest.raises(RuntimeError, match="a backward pass is of the last forward pass, and once"):
            first.fusion.sum().backward()
        loss = second.fusion.sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="a backward pass is of the last forward pass, and once"):
            loss.backward()


def test_a_network_that_waits_for_the_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = PSP.forward

    def waiting(self: PSP, visual: Tensor, audio: Tensor) -> Output:
        output = plain(self, visual, audio)
        return output._replace(fusion=output.fusion * float(output.fusion.detach().sum()))

    monkeypatch.setattr(PSP, "forward", waiting)
    with simulated_gpu():
        network, visual, audio = graphed_network()
        with pytest.raises(UserError, match=r"cannot be captured \(.*not permitted.*\).*; set engine\.compile=none"):
            network(visual, audio)


def test_an_error_of_a_capture_is_not_a_lost_gpu() -> None:
    """It would be requeued, to fail again."""
    assert explain(RuntimeError("CUDA error: operation not permitted when stream is capturing"), CUDA) is None


def test_a_closed_engine_leaves_the_network_as_it_was() -> None:
    with simulated_gpu():
        network = build_model("psp", visual_channels=512, audio_channels=128, categories=3)
        names = [name for name, _ in network.named_parameters()]
        engine = build_engine(network, config_of(kind="ddp", compile="graphs"), Ranks(0, 1, 0, CUDA))
        assert "forward" in vars(network)
        assert [name for name, _ in network.named_parameters()] == names
        engine.close()
        assert "forward" not in vars(network)


def start(shards: Path, output: Path, *settings: str, **env: str) -> subprocess.CompletedProcess[str]:
    arguments = ["--config", str(KEYPAD), *overrides(shards, output, "engine.kind=ddp", "train.steps=3", *settings)]
    command = [sys.executable, "-m", "cpsp_dist.train", *arguments, "tracking.enabled=false", "tracking.every_steps=1"]
    return subprocess.run(command, env=environment() | env, cwd=REPO, capture_output=True, text=True, timeout=600)


@pytest.mark.long
def test_a_start_without_a_gpu_is_one_line(keypad_shards: Path, tmp_path: Path) -> None:
    for more in ([], ["--dry-run"]):
        done = start(keypad_shards, tmp_path / "run", "engine.compile=graphs", *more)
        assert done.returncode == 2, done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith("error: engine.compile=graphs needs a GPU")
        assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_inductor_trains_as_the_network_does(keypad_shards: Path, tmp_path: Path) -> None:
    losses = []
    for how in ("none", "inductor"):
        done = start(keypad_shards, tmp_path / how, f"engine.compile={how}", "model.dropout=0")
        assert done.returncode == 0, done.stderr
        assert ("torch.compile" in done.stderr + done.stdout) == (how == "inductor")
        losses.append(loss_history(tmp_path / how))
    assert len(losses[0]) == 3
    for plain, compiled in zip(*losses, strict=True):
        assert compiled == pytest.approx(plain, rel=1e-3, abs=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=str)
def test_inductor_without_a_compiler_is_one_line(more: list[str], keypad_shards: Path, tmp_path: Path) -> None:
    settings, cache = ["engine.compile=inductor", *more], str(tmp_path / "cache")
    done = start(keypad_shards, tmp_path / "run", *settings, CXX="none", TORCHINDUCTOR_CACHE_DIR=cache)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: torch.compile fails here: ")
    assert last.endswith("set engine.compile=none")


def test_adam_of_a_gpu_is_one_kernel_and_computes_adams_formula() -> None:
    config = config_of(kind="ddp")
    torch.manual_seed(0)
    start, gradients = torch.randn(5), torch.randn(3, 5)
    with simulated_gpu() as machine:
        parameter = nn.Parameter(start.to(CUDA))
        optimizer = build_optimizer(config, iter([parameter]))
        for gradient in gradients:
            parameter.grad = gradient.to(CUDA)
            optimizer.step()
        assert machine.record.kernels["aten._fused_adam_"] == len(gradients)
        assert not [name for name in machine.record.kernels if "addcdiv" in name]
        found = parameter.detach().cpu()
    x, first, second = start.double(), torch.zeros(5).double(), torch.zeros(5).double()
    for number, g in enumerate(gradients.double(), 1):
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        x = x - config.train.learning_rate * (first / (1 - 0.9**number)) / (
            (second / (1 - 0.999**number)).sqrt() + 1e-8
        )
    torch.testing.assert_close(found, x.float())
