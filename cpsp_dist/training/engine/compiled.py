"""The network as one piece (`engine.compile`): by torch.compile, or as CUDA graphs of its forward and backward pass.

A GPU computes these small networks faster than a host launches their operators one by one.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cpsp_dist.config import Config
from cpsp_dist.models import Output
from cpsp_dist.models.layers import Network
from cpsp_dist.utils.errors import ConfigError, UserError
from cpsp_dist.utils.text import first_line

_PLAIN = (bool, int, float, str)
#: Passes before a capture, in which libraries choose their algorithms and take their memory.
WARM_UP = 3


def check_compile(config: Config, device: torch.device) -> None:
    """Raises ConfigError: CUDA graphs are asked for, and `device` is none of CUDA's."""
    if config.engine.compile == "graphs" and device.type != "cuda":
        raise ConfigError("engine.compile=graphs needs a GPU, and there is none here; set engine.compile=none")


def compile_network(network: nn.Module, config: Config) -> None:
    """Make `network`, in place, train as `config.engine.compile` says. Its parameters and their names stay."""
    if config.engine.compile == "inductor":
        # That TF32 would be faster is what train.tf32 decides.
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        network.compile(dynamic=False)
    elif config.engine.compile == "graphs":
        assert isinstance(network, Network)
        network.forward = GraphedForward(network)  # type: ignore[method-assign]


def release_network(network: nn.Module) -> None:
    """Undo `compile_network`, and give back the memory of the graphs."""
    vars(network).pop("forward", None)
    network._compiled_call_impl = None


class GraphedForward:
    """A network's `forward` while it trains; in evaluation it is the network's own.

    [B, T, H, W, C] or [B, T, C], [B, T, A] -> Output. Its tensors, and the gradients that come of them, are copies in
    memory of their own, as those of the network's own `forward` are: a replay changes none of an earlier one.
    """

    def __init__(self, network: Network) -> None:
        self.network, self.plain = network, network.forward
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self._parts = [vars(part) for part in network.modules()]
        self._graphs: _Graphs | None = None
        self._key: object = None  # what they are of

    def __call__(self, visual: Tensor, audio: Tensor) -> Output:
        if not self.network.training:
            return self.plain(visual, audio)
        key = self._captured_with(visual, audio)
        if self._graphs is None or key != self._key:
            self._graphs = None  # its memory is free before the next takes its own
            self._graphs, self._key = _captured(self._copy_on_the_same_weights(), visual, audio), key
        tensors = iter(_Replay.apply(self._graphs, visual, audio, *self.parameters))  # type: ignore[no-untyped-call]
        return Output._make(None if x is None else next(tensors) for x in self._graphs.output)

    def _captured_with(self, visual: Tensor, audio: Tensor) -> object:
        """All that a capture takes as it is, besides the values of its tensors."""
        tensors = [(x.shape, x.stride(), x.dtype) for x in (visual, audio)]
        places = [p.data_ptr() for p in self.parameters]
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        # What Python keeps of the network may change between steps: `Network.start_step`.
        plain = [value for part in self._parts for value in part.values() if type(value) in _PLAIN]
        return tensors, places, autocast, plain

    def _copy_on_the_same_weights(self) -> Network:
        """What is captured: of the network's own parameters DDP and DeepSpeed hold the nodes that take gradients. These
        belong to another stream, for which a capture must not wait."""
        copied = copy.deepcopy(self.network, {id(self): self})
        vars(copied).pop("forward")
        for own, parameter in zip(copied.parameters(), self.network.parameters(), strict=True):
            own.data = parameter.data
        return copied


@dataclass
class _Graphs:
    """One pass each way, and the tensors that each replay reads and writes."""

    forward: Any
    backward: Any
    inputs: list[Tensor]
    output: Output
    back: list[Tensor]  # gradients of those of `output` that have one
    gradients: tuple[Tensor | None, ...]  # of the parameters
    passes: int = 0  # made so far: a backward pass is of the last one alone

    @property
    def outputs(self) -> list[Tensor]:
        return [x for x in self.output if x is not None]


def _captured(network: Network, visual: Tensor, audio: Tensor) -> _Graphs:
    parameters = [p for p in network.parameters() if p.requires_grad]
    inputs = [visual.clone(), audio.clone()]

    def forward() -> tuple[Output, list[Tensor]]:
        # The cache would keep weights that were cast before the capture, for all replays.
        on, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        with torch.enable_grad(), torch.autocast("cuda", dtype, enabled=on, cache_enabled=False):
            output = network(*inputs)
        return output, [x for x in output if x is not None and x.requires_grad]

    def backward(outputs: list[Tensor], back: list[Tensor]) -> tuple[Tensor | None, ...]:
        with torch.autocast("cuda", enabled=False):  # as it is after the forward pass
            return torch.autograd.grad(outputs, parameters, back, allow_unused=True)

    device = visual.device
    random = torch.cuda.get_rng_state(device)
    side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            outputs = forward()[1]
            backward(outputs, [torch.zeros_like(x) for x in outputs])
    current.wait_stream(side)
    # Only this thread's calls are looked at: the reader's threads wait for events meanwhile.
    forward_graph, backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with _refused_in_one_line():
        with torch.cuda.graph(forward_graph, capture_error_mode="thread_local"):
            output, outputs = forward()
        back = [torch.zeros_like(x) for x in outputs]
        with torch.cuda.graph(backward_graph, pool=forward_graph.pool(), capture_error_mode="thread_local"):
            gradients = backward(outputs, back)
    torch.cuda.set_rng_state(random, device)
    return _Graphs(forward_graph, backward_graph, inputs, output, back, gradients)


@contextmanager
def _refused_in_one_line() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "captur" not in str(error):
            raise
        raise UserError(
            f"engine.compile=graphs: this network cannot be captured ({first_line(error)[:150]}), as where it waits "
            "for the GPU; set engine.compile=none"
        ) from error


class _Replay(torch.autograd.Function):
    """graphs, visual, audio, parameters -> the tensors of the output."""

    @staticmethod
    def forward(ctx: Any, graphs: _Graphs, *tensors: Tensor) -> tuple[Tensor, ...]:
        for own, given in zip(graphs.inputs, tensors, strict=False):
            own.copy_(given)
        graphs.forward.replay()
        graphs.passes += 1
        ctx.graphs, ctx.number = graphs, graphs.passes
        ctx.set_materialize_grads(False)
        copies = _copies(graphs.outputs)
        ctx.mark_non_differentiable(
            *(x for x, own in zip(copies, graphs.outputs, strict=True) if not own.requires_grad)
        )
        return tuple(copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        graphs = ctx.graphs
        if ctx.number != graphs.passes:
            raise RuntimeError("engine.compile=graphs: a backward pass is of the last forward pass, and once")
        graphs.passes += 1
        given = tuple(g for g, x in zip(given, graphs.outputs, strict=True) if x.requires_grad)
        pairs = [(own, g) for own, g in zip(graphs.back, given, strict=True) if g is not None]
        torch._foreach_zero_(graphs.back)
        torch._foreach_copy_([own for own, _ in pairs], [g for _, g in pairs])
        graphs.backward.replay()
        found = iter(_copies([g for g in graphs.gradients if g is not None]))
        return None, None, None, *(None if g is None else next(found) for g in graphs.gradients)


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """Bit for bit, by one kernel: torch has no function that copies many tensors into new ones."""
    with torch.no_grad():
        return list(torch._foreach_mul(tensors, 1.0))
