"""What a GPU did in a step, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

STEPS = 3


def gpu_figures(step: Callable[[], None], ms: float) -> dict[str, float]:
    """Run three steps, each of which takes `ms` milliseconds when nobody looks.

    Returns:
        h2d_ms: of copies to the GPU in a step; busy_share: the time of its kernels, those of several streams added,
        over `ms`; kernels: in a step, copies among them.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    events = [event for event in found.events() or [] if event.device_type.name == "CUDA"]
    # What a `record_function`, as DDP's and the optimizer's, encloses on the GPU is no work of its own.
    work = [(event.name, event.device_time) for event in events if not getattr(event, "is_user_annotation", False)]
    return figures_of(work, STEPS, ms)


def figures_of(events: Iterable[tuple[str, float]], steps: int, ms: float) -> dict[str, float]:
    """`gpu_figures` of what the GPU did in `steps` steps: names, and microseconds. NCCL's kernels, which wait for the
    other ranks while they run, do not compute."""
    events = [*events]
    copies = sum(us for name, us in events if "HtoD" in name)
    computing = sum(us for name, us in events if not name.startswith(("Mem", "nccl")))
    return {
        "h2d_ms": copies / steps / 1e3,
        "busy_share": computing / steps / 1e3 / ms,
        "kernels": len(events) / steps,
    }
