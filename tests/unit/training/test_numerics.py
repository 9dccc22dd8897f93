"""`train.deterministic` and `train.tf32` reach torch's switches; what a GPU then computes is test_gpu.py's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from cpsp_dist.config.schema import TrainSettings
from cpsp_dist.training import evaluate
from cpsp_dist.training.engine import describe_numerics, import_deepspeed, set_numerics
from cpsp_dist.utils.errors import ConfigError

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def switches() -> tuple[bool, ...]:
    return (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    matmul, cudnn, deterministic, fill = switches()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_switches_are_set(monkeypatch: pytest.MonkeyPatch, tf32: bool, deterministic: bool) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    settings = TrainSettings(tf32=tf32, deterministic=deterministic)
    before = switches()
    set_numerics(settings, CPU)
    assert switches() == before
    set_numerics(settings, CUDA)
    assert switches() == (tf32, tf32, deterministic, False)
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


def test_a_workspace_that_does_not_repeat_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG=:4096:8 or :16:8, not ':0:0'"):
        set_numerics(TrainSettings(), CUDA)
    set_numerics(TrainSettings(deterministic=False), CUDA)


def test_an_evaluation_computes_as_the_run_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cpsp-dist evaluate` of a run that was trained with TF32."""
    run = SimpleNamespace(config=SimpleNamespace(train=TrainSettings(tf32=True), model=None), progress=None)
    monkeypatch.setattr(evaluate, "load_run", lambda _: run)
    monkeypatch.setattr(evaluate, "require_encoders", lambda *_: None)
    monkeypatch.setattr(evaluate, "open_manifest", lambda *_: SimpleNamespace(rows=lambda _: None))
    monkeypatch.setattr(evaluate, "discover", lambda: SimpleNamespace(device=CUDA))

    class Built(Exception):
        pass

    def built(*_: object) -> None:
        raise Built

    monkeypatch.setattr(evaluate, "model_for", built)
    with pytest.raises(Built):
        evaluate.evaluate_run("run", "test")
    assert switches() == (True, True, True, False)


def test_the_header_has_both() -> None:
    assert describe_numerics(TrainSettings(precision="fp32"), CUDA) == "fp32, TF32 off, deterministic"
    other = TrainSettings(precision="bf16", tf32=True, deterministic=False)
    assert describe_numerics(other, CUDA) == "bf16, TF32 on, not deterministic"
    assert describe_numerics(TrainSettings(precision="fp32", tf32=True), CPU) == "fp32"


def test_deepspeed_takes_our_device_and_no_warning_of_the_lstm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    with warnings.catch_warnings(record=True) as caught:
        import_deepspeed(CPU)
        warnings.warn("RNN module weights are not part of single contiguous chunk of memory.", stacklevel=1)
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert not [w for w in caught if "RNN module" in str(w.message)]
