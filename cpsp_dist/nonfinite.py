"""Which rank, loss term and videos a value that is not finite comes from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cpsp_dist.batch import Batch
from cpsp_dist.distributed import gather
from cpsp_dist.models.parts import Output

#: Videos named for a rank, at most.
NAMED = 5


class Witness:
    """What is to be kept of one step of this rank, in case it has to be explained: references, nothing is computed."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]] = []

    def see(self, output: Output, batch: Batch, terms: dict[str, Tensor]) -> None:
        """Before the backward pass of a micro-batch: the gradients of its outputs are seen too."""
        outputs = {name: x for name, x in output._asdict().items() if x is not None}
        gradients: dict[str, Tensor] = {}
        for name, x in outputs.items():
            if x.requires_grad:
                x.register_hook(partial(_keep, gradients, name))
        index = torch.where(batch.valid, batch.index, -1).clone()  # the batch's own memory is used again
        self._parts.append((index, {name: x.detach() for name, x in outputs.items()}, gradients, terms))

    def explain(self, video: Callable[[int], str]) -> str:
        """`rank 1: loss terms event, total; outputs event_logits of video abc`. All ranks call it together, and get the
        same text. `video` names the video of a row of the sample table."""
        terms: set[str] = set()
        outputs: set[str] = set()
        gradients: set[str] = set()
        rows: dict[str, set[int]] = {"outputs": set(), "gradients": set()}
        for index, seen, backward, values in self._parts:
            terms |= {name for name, value in values.items() if not torch.isfinite(value)}
            for tensors, names, of in ((seen, outputs, "outputs"), (backward, gradients, "gradients")):
                for name, x in tensors.items():
                    bad = ~torch.isfinite(x).flatten(1).all(1) & (index >= 0).to(x.device)
                    if bad.any():
                        names.add(name)
                        rows[of] |= {*index[bad.to(index.device)].tolist()}
        videos = {of: [video(row) for row in sorted(numbers)] for of, numbers in rows.items()}
        found: list[Any] = gather((sorted(terms), sorted(outputs), sorted(gradients), videos))
        # A loss that is not finite reaches the gradients of every video, and through the shared pool every rank: where
        # an output of the network was bad already, that is behind it.
        of = "outputs" if any(names for _, names, *_ in found) else "gradients"
        told = [_describe(rank, t, o, g, rows[of]) for rank, (t, o, g, rows) in enumerate(found) if rows[of]]
        return "; ".join(told) or "a gradient inside the network, of no single video"


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
        parts.append(f"gradient of {', '.join(gradients)}")
    more = f" and {len(videos) - NAMED} more" if len(videos) > NAMED else ""
    parts.append(f"{'video' if len(videos) == 1 else 'videos'} {', '.join(videos[:NAMED])}{more}")
    return f"rank {rank}: " + ", ".join(parts)
