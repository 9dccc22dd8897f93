"""What a run reports of its steps while it trains: loss terms, rate, time left, and which samples each step used."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from cpsp_dist.config import Config
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.reader import TrainStream
from cpsp_dist.distributed import process_group
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.training.lr_schedule import TrainingSchedule
from cpsp_dist.training.system_metrics import SystemMeter
from cpsp_dist.utils.json_lines import JsonLines, truncate_after_step

logger = logging.getLogger(__name__)


class Meter:
    """Means of the loss terms, the rate and the time left, over the steps since it was last read."""

    def __init__(self, config: Config, schedule: TrainingSchedule, ranks: Ranks, stream: TrainStream, step: int):
        self.config, self.schedule, self.ranks, self.stream = config, schedule, ranks, stream
        self.system = SystemMeter(config, ranks)
        self._start(step)

    def _start(self, step: int) -> None:
        self.terms: dict[str, Tensor] = {}
        self.micro_batches, self.first_step = 0, step
        self.began, self.waited = time.monotonic(), self.stream.wait_seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluations and checkpoints are not part of the rate."""
        began = time.monotonic()
        yield
        self.began += time.monotonic() - began

    def add(self, micro_losses: list[dict[str, Tensor]]) -> None:
        """The loss terms of a step's micro-batches."""
        self.micro_batches += len(micro_losses)
        for terms in micro_losses:
            for name, value in terms.items():
                self.terms[name] = self.terms.get(name, 0) + value

    def read(self, step: int, norm: float, learning_rate: float) -> dict[str, float]:
        """Metrics after `step`, the loss terms averaged over ranks (all ranks call it); also a line to read."""
        means = average_losses(self.terms, self.micro_batches, self.ranks)
        seconds = max(time.monotonic() - self.began, 1e-9)
        done = step + 1 - self.first_step
        rate = done * self.config.train.global_batch / seconds
        wait = (self.stream.wait_seconds - self.waited) / seconds
        metrics = {f"loss/{name}": value for name, value in means.items()}
        if self.ranks.first and (step + 1) % self.config.tracking.every_steps == 0:
            loss = metrics.get("loss/total", math.nan)
            left = (self.schedule.steps - step - 1) * seconds / done
            logger.info(
                f"step {step + 1}/{self.schedule.steps}  loss {loss:.4f}  {rate:,.0f} videos/s  "
                f"waiting for data {100 * wait:.0f} %  {int(left) // 60}:{int(left) % 60:02d} left"
            )
        self._start(step + 1)
        return metrics | {
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "epoch": self.schedule.epoch(step),
            "videos_per_second": rate,
            "data_wait_share": wait,
            "skipped_samples": float(self.stream.skipped),
            **self.system.read(),
        }


def average_losses(sums: dict[str, Tensor], micro_batches: int, ranks: Ranks) -> dict[str, float]:
    """Means over all ranks of loss terms that were summed over `micro_batches`; all ranks call it together."""
    stacked = torch.stack([*sums.values()]) if sums else torch.zeros(0, device=ranks.device)
    means = process_group.sum_over_ranks(stacked) / (max(micro_batches, 1) * ranks.world)
    return dict(zip(sums, means.tolist(), strict=True))


class Audit:
    """`audit/rank*.jsonl`: the keys of the samples that each rank trained on, a line for each step."""

    def __init__(self, config: Config, manifest: Manifest, ranks: Ranks, step: int):
        """Resume after `step`: later lines of existing files, of any number of ranks, are removed."""
        self.file = Path(config.output) / "audit" / f"rank{ranks.rank}.jsonl" if config.data.log_samples else None
        self.samples = manifest.samples
        self._warned: set[str] = set()
        if self.file is None:
            return
        self.lines = JsonLines(self.file, self._warn)
        if ranks.first:
            self._remove_after(step)
        process_group.barrier()

    def _remove_after(self, step: int) -> None:
        """Of each file by itself: one that cannot be read keeps no other from being cut."""
        assert self.file is not None
        folder = self.file.parent
        with self._warning(folder):
            folder.mkdir(exist_ok=True)
        for file in sorted(folder.glob("rank*.jsonl")):
            with self._warning(file):
                self._warn(truncate_after_step(file, step))

    @contextmanager
    def _warning(self, place: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._warn(f"{place}: {error.strerror}; training continues")

    def _warn(self, text: str) -> None:
        if text and text not in self._warned:
            self._warned.add(text)
            logger.warning(text)

    def write_step(self, step: int, rows: list[int]) -> None:
        """rows: of the sample table, those that this rank trained on in `step`."""
        if self.file is not None:
            self.lines.append({"step": step, "keys": [self.samples[row]["key"].decode() for row in rows]})

    def close(self) -> None:
        """Write what a full disk has held up."""
        if self.file is not None:
            self._warn(self.lines.close())
