"""The device of a simulated GPU (`simulated_gpu`): tensors that report `cuda:0` and hold CPU data.

`SimulatedGpu` is a dispatch mode. It sees every operator, computes it on the CPU, and records what that is on a GPU:
launch a kernel, copy between host and device, or make the host wait for the device (a host sync), with file and line.
It raises where CUDA would: operands on different devices.
"""

from __future__ import annotations

import collections
import functools
import linecache
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, ClassVar, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        made = torch.nn.Parameter(GpuTensor(self.held.clone()), self.requires_grad)
        memo[id(self)] = made
        return made

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def numpy(self, *_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")


class SimulatedGpu(TorchDispatchMode):
    current: ClassVar[SimulatedGpu | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.record = Record()
        self.waits = 0  # of the host for the device, ever
        self._pinned: dict[int, torch.UntypedStorage] = {}
        self.capturing: Any = None  # a `simulated_graph.Graph`

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and its guard costs as much as an operator

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count this CPU tensor as pinned."""
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = storage
        return tensor

    def kernel(self, name: str) -> None:
        if self.capturing is None:
            self.record.kernels[name] += 1

    def sync(self, what: str) -> None:
        if self.capturing is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what}: {where()})")
        self.waits += 1
        self.record.syncs.append(Sync(what, where()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = _name_of(func)
        tensors: list[torch.Tensor] = []
        find_tensors((*args, *kwargs.values()), tensors)
        on_gpu = [x for x in tensors if isinstance(x, GpuTensor)]
        asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        to_gpu = bool(on_gpu) if asked is None else asked.type in ("cuda", "meta")
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        pinning = name == "aten._pin_memory" or kwargs.pop("pin_memory", False)
        self._note(func, name, args, kwargs, to_gpu, tensors)
        out = _on_cpu(func, name, args, kwargs)
        if self.capturing is not None and to_gpu and name not in NO_KERNEL:
            self.capturing.add(functools.partial(_on_cpu, func, name, args, kwargs), out, tensors)
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
        return map_values(lambda x: GpuTensor(x) if isinstance(x, torch.Tensor) else x, out)

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
    return func(*map_values(held_of, args), **{key: map_values(held_of, value) for key, value in kwargs.items()})


def held_of(x: Any) -> Any:
    return x.held if isinstance(x, GpuTensor) else x


def map_values(function: Callable[[Any], Any], x: Any) -> Any:
    """Of every value in tuples and lists, which is all that operators take and give; pytree's is ten times slower."""
    kind = type(x)
    return kind([map_values(function, part) for part in x]) if kind is tuple or kind is list else function(x)


def find_tensors(parts: Any, found: list[torch.Tensor]) -> None:
    for part in parts:
        if isinstance(part, torch.Tensor):
            found.append(part)
        elif isinstance(part, tuple | list):
            find_tensors(part, found)
