"""A pool over all parts of a global batch, exactly: GradCache (Gao et al., RepL4NLP 2021), for any objective.

First every part goes through the network without gradient; then the objectives are computed over the outputs of all
parts at once, and their gradient with respect to these outputs is kept; then each part goes through the network once
more, and takes its share of that gradient back. The second pass repeats the first to the bit (to rounding, compiled by
torch.compile): dropout is a function of (seed, step, part, rank).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpsp_dist.data.batch import Batch
from cpsp_dist.models import Output


def kept(batch: Batch) -> Batch:
    """`batch` in memory of its own: the reader uses a batch's memory again (on a GPU it is a copy already)."""
    if batch.valid.is_cuda:
        return batch
    return Batch(**{name: x.clone() for name, x in vars(batch).items()})


def joined(batches: Sequence[Batch]) -> Batch:
    """The labels of all parts' slots, one part after the other; the features, which no objective takes, are empty."""
    empty = {"visual", "audio"}
    return Batch(
        **{
            name: x.new_empty(0) if name in empty else torch.cat([getattr(batch, name) for batch in batches])
            for name, x in vars(batches[0]).items()
        }
    )


class CachedOutputs:
    """The outputs of all parts as if one pass had given them, and afterwards the gradient that each part is due."""

    def __init__(self, outputs: Sequence[Output]) -> None:
        """outputs: of each part [b, ...], without gradient."""
        self.parts = len(outputs)
        fields = zip(*outputs, strict=True)
        self.output = Output._make(None if None in part else torch.cat(part).requires_grad_() for part in fields)

    def surrogate(self, part: int, output: Output) -> Tensor:
        """A scalar whose gradient with respect to `output` is what the objectives' is for this part.

        output: of the part's second pass, with gradient. To be called after the backward pass from `self.output`.
        """
        total = output.event_logits.new_zeros((), dtype=torch.float64 if _is_double(output) else torch.float32)
        for cached, again in zip(self.output, output, strict=True):
            if cached is not None and again is not None and cached.grad is not None:
                total = total + (again.to(total.dtype) * cached.grad.chunk(self.parts)[part].to(total.dtype)).sum()
        return total


def _is_double(output: Output) -> bool:
    return output.event_logits.dtype == torch.float64
