"""A simulated GPU, for a machine that has none: a real training runs on tensors that report `cuda:0`.

`simulated_device` computes and records what is done there; here is what torch has around it: cuDNN's LSTM, autocast,
streams and events, and the questions that `torch.cuda` answers.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from tests.support.simulated_device import CUDA, GpuTensor, SimulatedGpu, map_values
from tests.support.simulated_graph import Graph, capture

MEMORY = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")


class _Lstm(torch.autograd.Function):
    """As cuDNN has it: one call each way, whose kernels are not seen."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Any:
        held = [x.held for x in given]

        def call() -> list[torch.Tensor]:
            with _disable_current_modes(), torch.enable_grad():
                ctx.given = [x.detach().clone().requires_grad_() for x in held]
                x, h, c, *weights = ctx.given
                ctx.made = _REAL_LSTM(x, (h, c), weights, True, 1, 0.0, True, True, True)
                return [x.detach().clone() for x in ctx.made]

        return _called("aten._cudnn_rnn", call)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        held = [g.held for g in grads]

        def call() -> list[torch.Tensor]:
            with _disable_current_modes():
                return list(torch.autograd.grad(ctx.made, ctx.given, held, allow_unused=True))

        return _called("aten._cudnn_rnn_backward", call)


def _called(name: str, call: Callable[[], list[torch.Tensor]]) -> tuple[torch.Tensor | None, ...]:
    machine = SimulatedGpu.current
    assert machine is not None
    machine.kernel(name)
    out = call()
    if machine.capturing is not None:
        machine.capturing.add(call, out)
    return tuple(None if x is None else GpuTensor(x) for x in out)


_REAL_LSTM = torch._VF.lstm  # type: ignore[attr-defined]


def _lstm(x: Any, state: Any, weights: Any, has_biases: bool, layers: int, *rest: Any) -> Any:
    assert (layers, has_biases) == (1, True), "only what the networks here use"
    if not isinstance(x, GpuTensor):
        return _REAL_LSTM(x, state, weights, has_biases, layers, *rest)
    assert {type(t) for t in (x, *state, *weights)} <= {GpuTensor, torch.nn.Parameter}
    if torch.is_autocast_enabled("cuda"):
        x, *rest = (part.to(torch.bfloat16) for part in (x, *state, *weights))
        state, weights = rest[:2], rest[2:]
    return _Lstm.apply(x, *state, *weights)


class _Calls(TorchFunctionMode):
    """What torch does before the dispatcher by means that simulated tensors do not have: `torch.autocast` looks at
    their keys, and a device without an index asks CUDA for the current one."""

    PRODUCTS: ClassVar = {functional.linear, functional.scaled_dot_product_attention, torch.bmm, torch.matmul}
    PRODUCTS |= {torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm, torch.mm, torch.einsum}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args, kwargs = map_values(_with_index, args), {key: _with_index(value) for key, value in (kwargs or {}).items()}
        if func in self.PRODUCTS and torch.is_autocast_enabled("cuda"):
            args, kwargs = map_values(_in_bf16, args), {key: _in_bf16(value) for key, value in kwargs.items()}
            SimulatedGpu.current.record.bf16_products += 1  # type: ignore[union-attr]
        return func(*args, **kwargs)


def _with_index(x: Any) -> Any:
    return CUDA if isinstance(x, str | torch.device) and str(x) == "cuda" else x


#: Weights that autocast has cast, until the outermost of its contexts ends.
_CASTS: dict[torch.Tensor, torch.Tensor] = {}


def _in_bf16(x: Any) -> Any:
    if not (isinstance(x, torch.Tensor) and x.is_floating_point()):
        return x
    if not (x.is_leaf and x.requires_grad and torch.is_autocast_cache_enabled()):
        return x.to(torch.bfloat16)
    if x not in _CASTS:
        _CASTS[x] = x.to(torch.bfloat16)
    return _CASTS[x]


_REAL_TO = torch.nn.Module.to


def _module_to(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Parameters that are where they should be stay the same objects, as on a GPU, where they are not made anew."""
    _, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    parameters = [*module.parameters()]
    there = all(isinstance(p.data, GpuTensor) for p in parameters) and all(dtype in (None, p.dtype) for p in parameters)
    return module if parameters and there else _REAL_TO(module, *args, **kwargs)


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_event(self, event: _Event) -> None: ...

    def wait_stream(self, stream: _Stream) -> None: ...

    def synchronize(self) -> None:
        SimulatedGpu.current.sync("synchronize")  # type: ignore[union-attr]

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None: ...


class _Event:
    """Ready once the host has waited for the device since it was recorded."""

    def __init__(self, **_: Any) -> None:
        self.recorded = 0

    def record(self, *_: Any) -> None:
        self.recorded = self._syncs()

    def query(self) -> bool:
        return self._syncs() > self.recorded

    def synchronize(self) -> None:
        """A reader thread that waits delays nobody."""
        if threading.current_thread() is threading.main_thread() and not self.query():
            SimulatedGpu.current.sync("event")  # type: ignore[union-attr]

    def elapsed_time(self, other: _Event) -> float:
        return 0.0

    @staticmethod
    def _syncs() -> int:
        assert SimulatedGpu.current is not None
        return SimulatedGpu.current.waits


@contextlib.contextmanager
def simulated_gpu() -> Iterator[SimulatedGpu]:
    """This machine has a GPU, whose record is that of the simulation."""
    import torch.optim.optimizer as optimizer

    stream = _Stream()
    replaced: dict[str, Any] = {
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.get_device_properties": lambda *_: SimpleNamespace(
            name="simulated", uuid="0", total_memory=1 << 34
        ),
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.set_device": lambda device: None,
        "torch.cuda.Event": _Event,
        "torch.cuda.Stream": _Stream,
        "torch.cuda.stream": lambda stream: stream,
        "torch.cuda.current_stream": lambda *_: stream,
        "torch.cuda.default_stream": lambda *_: stream,
        "torch.cuda.CUDAGraph": Graph,
        "torch.cuda.graph": capture,
        "torch.cuda.get_rng_state": lambda device: torch.get_rng_state(),
        "torch.cuda.set_rng_state": lambda state, device: torch.set_rng_state(state),
        "torch.cuda.synchronize": lambda *_: machine.sync("synchronize"),
        "torch.cuda.get_device_capability": lambda *_: (9, 0),
        "torch.cuda.mem_get_info": lambda *_: (1 << 34, 1 << 34),
        "torch.cuda.reset_peak_memory_stats": lambda *_: None,
        "torch.cuda.empty_cache": lambda: None,
        **{f"torch.cuda.{name}": lambda *_: 0 for name in MEMORY},
        "torch.cuda.nvtx.range_push": lambda *_: 0,
        "torch.cuda.nvtx.range_pop": lambda *_: 0,
        "torch.clear_autocast_cache": _CASTS.clear,
        "torch.cuda.manual_seed_all": lambda seed: None,
        "torch.cuda.is_bf16_supported": lambda *_, **__: True,
        "torch.nn.Module.to": _module_to,
        "torch._VF.lstm": _lstm,
        "torch.nn.modules.rnn._VF.lstm": _lstm,
    }
    supported = optimizer._foreach_supported_types
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch(name, value, create=True))
        stack.enter_context(mock.patch.object(optimizer, "_foreach_supported_types", [*supported, GpuTensor]))
        machine = SimulatedGpu.current = SimulatedGpu()
        stack.enter_context(machine)
        stack.enter_context(_Calls())
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            yield machine
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
            torch.__future__.set_overwrite_module_params_on_conversion(before)
            SimulatedGpu.current = None
