"""Which rank, loss term and videos a value that is not finite comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cpsp_dist.data.batch import Batch
from cpsp_dist.distributed.process_group import gather
from cpsp_dist.losses.objectives import TERMS_OF
from cpsp_dist.models.layers import Output

#: Videos named for a rank, at most.
NAMED = 5


@dataclass
class _MicroBatch:
    """One micro-batch: rows of the sample table (-1: an empty slot), outputs, what came back to them, loss terms."""

    index: Tensor
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Replay:
    """What it takes to do a step's micro-batches again, on each rank by itself.

    read: rows of the sample table [B], -1 for an empty slot -> their batch. run: number of the micro-batch, batch ->
    what `network` makes of it with that micro-batch's dropout, slot by slot.
    """

    network: nn.Module
    read: Callable[[Tensor], Batch]
    run: Callable[[int, Batch], Output]


class NonFiniteDiagnostics:
    """What is kept of one step of this rank, in case its cause is asked for: references, nothing is computed."""

    def __init__(self) -> None:
        self._micro_batches: list[_MicroBatch] = []

    def record_outputs(self, output: Output, rows: Tensor) -> Output:
        """A micro-batch's outputs, for the objectives: views, so that what comes back is seen before the network adds
        to it. rows: [B] of the sample table, on the CPU; -1 for an empty slot."""
        views = Output(*[None if x is None else x.view_as(x) for x in output])  # type: ignore[arg-type]
        seen = {name: x for name, x in views._asdict().items() if x is not None}
        micro_batch = _MicroBatch(rows, {name: x.detach() for name, x in seen.items()})
        for name, x in seen.items():
            if x.requires_grad:
                x.register_hook(partial(_keep, micro_batch.gradients, name))
        self._micro_batches.append(micro_batch)
        return views

    def rows(self) -> list[int]:
        """Of the sample table: the samples seen, in order."""
        return [row for micro_batch in self._micro_batches for row in micro_batch.index.tolist() if row >= 0]

    def record_losses(self, terms: dict[str, Tensor]) -> None:
        """The loss terms of the micro-batch that was seen last."""
        self._micro_batches[-1].terms = terms

    def diagnose_loss(self, video: Callable[[int], str]) -> str:
        """`rank 1: loss terms event, total; outputs event_logits of video abc`; empty where all of these are finite.
        All ranks call it together, and get the same text. `video` names the video of a row of the sample table."""
        terms: set[str] = set()
        outputs: set[str] = set()
        gradients: set[str] = set()  # terms whose gradient is not
        rows: dict[str, set[int]] = {"outputs": set(), "gradients": set()}
        for micro_batch in self._micro_batches:
            terms |= {name for name, value in micro_batch.terms.items() if not torch.isfinite(value)}
            for tensors, names, of in (
                (micro_batch.outputs, outputs, "outputs"),
                (micro_batch.gradients, gradients, "gradients"),
            ):
                for name, x in tensors.items():
                    bad = ~torch.isfinite(x).flatten(1).all(1).cpu() & (micro_batch.index >= 0)
                    if bad.any():
                        names |= {name} if of == "outputs" else {*_behind([name], micro_batch.terms)}
                        rows[of] |= {*micro_batch.index[bad].tolist()}
        videos = {of: [video(row) for row in sorted(numbers)] for of, numbers in rows.items()}
        found: list[Any] = gather((sorted(terms), sorted(outputs), sorted(gradients), videos))
        # A loss that is not finite reaches the gradients of every video, and through the shared pool every rank: where
        # an output of the network was bad already, that is behind it.
        of = "outputs" if any(names for _, names, *_ in found) else "gradients"
        causes = [_describe(rank, t, o, g, rows[of]) for rank, (t, o, g, rows) in enumerate(found) if rows[of]]
        return "; ".join(causes)

    def diagnose_backward(self, replay: Replay, video: Callable[[int], str]) -> str:
        """The same where all that `diagnose_loss` looks at is finite: the gradient of some parameter is not.

        Each rank takes its own micro-batches through the network and back once more, then halves of them, down to the
        videos whose own gradient is not finite.
        """
        causes = [
            _Backward(replay, number, micro_batch).explain(video)
            for number, micro_batch in enumerate(self._micro_batches)
            if (micro_batch.index >= 0).any()
        ]
        by_rank: list[list[str]] = gather([text for text in causes if text])
        texts = [f"rank {rank}: {text}" for rank, texts in enumerate(by_rank) for text in texts]
        if texts:
            return "; ".join(texts)
        batches = gather([video(row) for row in self.rows()])
        return "the gradients of each rank are finite, their sum is not: " + "; ".join(
            f"rank {rank}: {_videos(videos)}" for rank, videos in enumerate(batches) if videos
        )


class _Backward:
    """The way back through the network of one micro-batch, for some of its videos."""

    def __init__(self, replay: Replay, number: int, micro_batch: _MicroBatch):
        self.replay, self.number, self.micro_batch = replay, number, micro_batch
        self.batch = replay.read(micro_batch.index)
        self.parameters = dict(replay.network.named_parameters())

    def explain(self, video: Callable[[int], str]) -> str:
        """`gradient of loss term event inside the network (…), video abc`; empty where it is finite."""
        slots = (self.micro_batch.index >= 0).nonzero().flatten().tolist()
        outputs = [*self.micro_batch.gradients]
        parameters = self.bad(slots, outputs)
        if not parameters:
            return ""
        alone = self.find_slots(slots, outputs)
        slots_at_fault = alone or slots
        through = [name for name in outputs if self.bad(slots_at_fault, [name])] or outputs
        where = f"{parameters[-1]}{f' and {len(parameters) - 1} more' if len(parameters) > 1 else ''}"
        videos = _videos([video(int(row)) for row in self.micro_batch.index[slots_at_fault].tolist()])
        of = _gradient(_behind(through, self.micro_batch.terms))
        return f"{of} inside the network ({where}), {'' if alone else 'of no single video: the sum over '}{videos}"

    def bad(self, slots: list[int], outputs: list[str]) -> list[str]:
        """Names of the parameters whose gradient is not finite, if it comes through these outputs of these slots alone.

        All other slots hold copies of one of them: 0 times the infinite derivative of another video would be nan.
        """
        source = torch.arange(len(self.batch))
        source[[slot for slot in source.tolist() if slot not in slots]] = slots[0]
        copies = Batch(**{name: x[source] for name, x in vars(self.batch).items()})
        found = self.replay.run(self.number, copies)._asdict()
        heads, back = [], []
        for name in outputs:
            kept = torch.zeros_like(found[name])
            kept[slots] = self.micro_batch.gradients[name][slots].to(kept)
            heads.append(found[name])
            back.append(kept)
        gradients = torch.autograd.grad(heads, [*self.parameters.values()], back, allow_unused=True)
        return [
            name
            for name, gradient in zip(self.parameters, gradients, strict=True)
            if gradient is not None and not gradient.isfinite().all()
        ]

    def find_slots(self, slots: list[int], outputs: list[str]) -> list[int]:
        """Those of `slots`, whose gradient together is not finite, that have none by themselves."""
        if len(slots) == 1:
            return slots
        half = len(slots) // 2
        return [
            slot
            for part in (slots[:half], slots[half:])
            if self.bad(part, outputs)
            for slot in self.find_slots(part, outputs)
        ]


def _keep(gradients: dict[str, Tensor], name: str, gradient: Tensor | None) -> None:
    if gradient is not None:  # DDP passes on that there is none
        gradients[name] = gradient


def _describe(rank: int, terms: list[str], outputs: list[str], gradients: list[str], videos: list[str]) -> str:
    parts = []
    if terms:
        parts.append(f"loss {'term' if len(terms) == 1 else 'terms'} {', '.join(terms)}")
    if outputs:
        parts.append(f"network output {', '.join(outputs)}")
    if gradients and not (terms or outputs):
        parts.append(_gradient(gradients))
    parts.append(_videos(videos))
    return f"rank {rank}: " + ", ".join(parts)


def _behind(outputs: Sequence[str], terms: dict[str, Tensor]) -> list[str]:
    """Those of a micro-batch's loss terms that take one of these outputs of the network."""
    return sorted({term for name in outputs for term in TERMS_OF.get(name, ())} & {*terms})


def _gradient(terms: Sequence[str]) -> str:
    return f"gradient of loss {'term' if len(terms) == 1 else 'terms'} {', '.join(terms)}"


def _videos(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{'video' if len(names) == 1 else 'videos'} {', '.join(names[:NAMED])}{more}"
