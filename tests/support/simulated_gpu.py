"""A simulated GPU: tensors that report `cuda:0` and hold CPU data, for a machine that has none.

`SimulatedGpu` is a dispatch mode. It sees every operator, computes it on the CPU, and records what that is on a GPU:
launch a kernel, copy between host and device, or make the host wait for the device (a host sync), with file and line.
It raises where CUDA would: operands on different devices.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import linecache
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType, SimpleNamespace
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

CUDA = torch.device("cuda", 0)

#: Operators that launch nothing.
_VIEWS = """view t transpose expand unsqueeze squeeze slice select detach alias as_strided _unsafe_view permute split
unbind _reshape_alias chunk diagonal lift_fresh empty empty_like new_empty empty_strided new_empty_strided is_same_size
unfold view_as numel split_with_sizes record_stream"""
NO_KERNEL = {f"aten.{name}" for name in _VIEWS.split()} | {"prim.device"}
#: Their result's size depends on the values, so the host waits for it.
_SIZED_BY_VALUES = """nonzero masked_select unique_dim _unique2 unique_consecutive unique_dim_consecutive bincount equal
is_nonzero repeat_interleave"""
VALUE_DEPENDENT = {f"aten.{name}" for name in _SIZED_BY_VALUES.split()}
MEMORY = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
INDEXING = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"}


class Sync(NamedTuple):
    what: str
    where: str


class Copy(NamedTuple):
    kind: str  # 'H2D pinned', 'H2D pageable', 'D2H'
    blocking: bool
    bytes: int
    where: str


@dataclass
class Record:
    """What was done on the GPU."""

    kernels: collections.Counter[str] = field(default_factory=collections.Counter)
    syncs: list[Sync] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    bf16_products: int = 0  # of the forward pass


def where() -> str:
    """`file:line code` of the innermost frame of the package, and of DeepSpeed where that is further inside."""
    frame: FrameType | None = sys._getframe()
    inside = ""
    while frame is not None:
        path = frame.f_code.co_filename
        if "/cpsp_dist/" in path:
            return _shown(frame, "cpsp_dist") + inside
        if "/deepspeed/runtime/" in path and not inside:
            inside = f", in {_shown(frame, 'deepspeed')}"
        frame = frame.f_back
    return "?"


def _shown(frame: FrameType, package: str) -> str:
    path, line = frame.f_code.co_filename, frame.f_lineno
    return f"{package}/{path.rpartition(f'/{package}/')[2]}:{line} {linecache.getline(path, line).strip()}"


class GpuTensor(torch.Tensor):
    """Reports that it lies on cuda:0; the values are those of `held`."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> GpuTensor:
        shape = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="meta")
        made = torch.Tensor._make_subclass(cls, shape, False)  # C++ sees 'meta', Python 'cuda'
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"GpuTensor({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert SimulatedGpu.current is not None, f"{func} outside of the simulated GPU"
        with SimulatedGpu.current:
            return func(*args, **(kwargs or {}))

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined, no-any-return]

    @data.setter
    def data(self, new: torch.Tensor) -> None:
        """As ZeRO 3 makes parameters empty and complete again."""
        torch.Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        assert isinstance(new, GpuTensor)
        self.held = new.held

    # These read the storage, or the device, in C++.
    def new_tensor(self, data: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=CUDA)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def record_stream(self, stream: Any) -> None:
        pass

    def numpy(self, *_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")


class SimulatedGpu(TorchDispatchMode):
    current: ClassVar[SimulatedGpu | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.record = Record()
        self.waits = 0  # of the host for the device, ever
        self._pinned: dict[int, torch.UntypedStorage] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and its guard costs as much as an operator

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count this CPU tensor as pinned."""
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = storage
        return tensor

    def kernel(self, name: str) -> None:
        self.record.kernels[name] += 1

    def sync(self, what: str) -> None:
        self.waits += 1
        self.record.syncs.append(Sync(what, where()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = _name_of(func)
        tensors: list[torch.Tensor] = []
        _find_tensors((*args, *kwargs.values()), tensors)
        on_gpu = [x for x in tensors if isinstance(x, GpuTensor)]
        asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        to_gpu = bool(on_gpu) if asked is None else asked.type in ("cuda", "meta")
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        pinning = name == "aten._pin_memory" or kwargs.pop("pin_memory", False)
        self._note(func, name, args, kwargs, to_gpu, tensors)
        out = _on_cpu(func, name, args, kwargs)
        if pinning:
            return self.pin(out)
        if name.endswith("_") and args and isinstance(args[0], GpuTensor) and out is args[0].held:
            if args[0].shape != out.shape:  # squeeze_
                args[0].data = GpuTensor(out)
            return args[0]  # in place
        if "out" in kwargs:
            return kwargs["out"]
        if not to_gpu:
            return out
        for x in on_gpu:
            if x.held is out:
                return x
        return _map(lambda x: GpuTensor(x) if isinstance(x, torch.Tensor) else x, out)

    def _note(self, func: Any, name: str, args: Any, kwargs: Any, to_gpu: bool, tensors: list[torch.Tensor]) -> None:
        touches = any(isinstance(x, GpuTensor) for x in tensors)
        if name in ("aten._to_copy", "aten.copy_"):
            self._note_copy(name, args, kwargs, to_gpu)
        elif name == "aten._local_scalar_dense" and touches:
            self.sync("item")
        elif name in VALUE_DEPENDENT and touches:
            self.kernel(name)
            self.sync(name)
        elif name in INDEXING and touches:
            self.kernel(name)
            indices = [index for index in args[1] if index is not None]
            fills = name != "aten.index" and args[2].numel() == 1
            masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
            for _ in [] if fills else masks:
                self.sync(f"{name} by a mask")
            if any(not isinstance(index, GpuTensor) for index in indices):
                self.sync(f"{name} by an index on the CPU")
        elif to_gpu and name not in NO_KERNEL:
            self.kernel(name)
            if touches and any(not isinstance(x, GpuTensor) and x.dim() > 0 for x in tensors):
                raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu! ({func})")

    def _note_copy(self, name: str, args: Any, kwargs: Any, to_gpu: bool) -> None:
        source, target, asynchronous = args[0], to_gpu, kwargs.get("non_blocking", False)
        if name == "aten.copy_":
            source, target = args[1], isinstance(args[0], GpuTensor)
            asynchronous = asynchronous or (len(args) > 2 and args[2])
        if isinstance(source, GpuTensor) and not target:
            into = args[0] if name == "aten.copy_" else None
            pinned = into is not None and into.untyped_storage()._cdata in self._pinned
            asynchronous = bool(asynchronous and pinned)
            self.record.copies.append(Copy("D2H", not asynchronous, source.held.nbytes, where()))
            if not asynchronous:
                self.sync("copy to the CPU")
        elif target and not isinstance(source, GpuTensor):
            kind = "H2D pinned" if source.untyped_storage()._cdata in self._pinned else "H2D pageable"
            self.record.copies.append(Copy(kind, not asynchronous, source.nbytes, where()))
            if not asynchronous or kind == "H2D pageable":
                self.sync(f"{kind} copy{'' if asynchronous else ', blocking'}")
        elif target:
            self.kernel(name)


@functools.cache
def _name_of(func: Any) -> str:
    return str(func._overloadpacket)


def _on_cpu(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    if name == "aten._pin_memory":
        return args[0].clone()
    return func(*_map(_unwrap, args), **{key: _map(_unwrap, value) for key, value in kwargs.items()})


def _unwrap(x: Any) -> Any:
    return x.held if isinstance(x, GpuTensor) else x


def _map(function: Callable[[Any], Any], x: Any) -> Any:
    """Of every value in tuples and lists, which is all that operators take and give; pytree's is ten times slower."""
    kind = type(x)
    return kind([_map(function, part) for part in x]) if kind is tuple or kind is list else function(x)


def _find_tensors(parts: Any, found: list[torch.Tensor]) -> None:
    for part in parts:
        if isinstance(part, torch.Tensor):
            found.append(part)
        elif isinstance(part, tuple | list):
            _find_tensors(part, found)


class _Lstm(torch.autograd.Function):
    """As cuDNN has it: one call each way, whose kernels are not seen."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Any:
        SimulatedGpu.current.kernel("aten._cudnn_rnn")  # type: ignore[union-attr]
        with _disable_current_modes(), torch.enable_grad():
            ctx.given = [x.held.detach().clone().requires_grad_() for x in given]
            x, h, c, *weights = ctx.given
            ctx.made = _REAL_LSTM(x, (h, c), weights, True, 1, 0.0, True, True, True)
            out = [x.detach().clone() for x in ctx.made]
        return tuple(GpuTensor(x) for x in out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        SimulatedGpu.current.kernel("aten._cudnn_rnn_backward")  # type: ignore[union-attr]
        with _disable_current_modes():
            back = torch.autograd.grad(ctx.made, ctx.given, [g.held for g in grads], allow_unused=True)
        return tuple(None if x is None else GpuTensor(x) for x in back)


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
        args, kwargs = _map(_with_index, args), {key: _with_index(value) for key, value in (kwargs or {}).items()}
        if func in self.PRODUCTS and torch.is_autocast_enabled("cuda"):
            args, kwargs = _map(_in_bf16, args), {key: _in_bf16(value) for key, value in kwargs.items()}
            SimulatedGpu.current.record.bf16_products += 1  # type: ignore[union-attr]
        return func(*args, **kwargs)


def _with_index(x: Any) -> Any:
    return CUDA if isinstance(x, str | torch.device) and str(x) == "cuda" else x


def _in_bf16(x: Any) -> Any:
    floats = isinstance(x, torch.Tensor) and x.is_floating_point()
    return x.to(torch.bfloat16) if floats else x


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
        "torch.cuda.synchronize": lambda *_: machine.sync("synchronize"),
        "torch.cuda.get_device_capability": lambda *_: (9, 0),
        "torch.cuda.mem_get_info": lambda *_: (1 << 34, 1 << 34),
        "torch.cuda.reset_peak_memory_stats": lambda *_: None,
        "torch.cuda.empty_cache": lambda: None,
        **{f"torch.cuda.{name}": lambda *_: 0 for name in MEMORY},
        "torch.cuda.nvtx.range_push": lambda *_: 0,
        "torch.cuda.nvtx.range_pop": lambda *_: 0,
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
