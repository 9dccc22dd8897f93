"""What `cpsp-dist extract` takes, and what an extraction did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cpsp_dist.extraction.decoders import DEADLINE

REPORT_NAME = "report.jsonl"


@dataclass(frozen=True)
class ExtractOptions:
    """See the command's help. `shards`: write shards (of `visual_dtype` and about `shard_mb`) instead of npy files."""

    videos: Path
    csv: Path
    out: Path
    visual: str
    audio: str
    labels: Path | None = None
    categories: Path | None = None
    visual_weights: Path | None = None
    audio_weights: Path | None = None
    device: str | None = None
    precision: Literal["float32", "float16"] = "float32"
    segments: int = 10
    segment_seconds: float = 1.0
    workers: int | None = None
    deadline: float = DEADLINE
    on_error: Literal["raise", "skip"] = "raise"
    portion: tuple[int, int] | None = None
    shards: bool = False
    visual_dtype: Literal["float16", "float32"] = "float16"
    shard_mb: float = 130.0


@dataclass
class Extracted:
    """What an extraction did. `seconds`, those spent `encoding`, `waiting` for clips, and `decoding` in all processes.

    kept: videos that were complete before. left_out: how many listed ones have no features.
    """

    made: int = 0
    kept: int = 0
    left_out: int = 0
    seconds: float = 0.0
    encoding: float = 0.0
    waiting: float = 0.0
    decoding: float = 0.0
    decoded: int = 0
    workers: int = 1

    @property
    def decoding_rate(self) -> float:
        """Videos a second that all decoding processes together decode."""
        return self.decoded * self.workers / max(self.decoding, 1e-9)

    @property
    def encoding_rate(self) -> float:
        """Videos a second that the encoders alone encode."""
        return self.made / max(self.encoding, 1e-9)

    def text(self) -> str:
        """`12 videos extracted, 3 kept, 1 left out; decoding 40/s (2 processes), …`"""
        parts = [f"{self.made:,} videos extracted"]
        parts += [f"{self.kept:,} kept"] if self.kept else []
        parts += [f"{self.left_out:,} left out ({REPORT_NAME})"] if self.left_out else []
        text = ", ".join(parts)
        if not self.made:
            return text
        share = 100 * self.waiting / max(self.seconds, 1e-9)
        return (
            f"{text}; decoding alone {self.decoding_rate:.2f} videos/s ({self.workers} processes), encoding alone "
            f"{self.encoding_rate:.2f} videos/s, waiting for clips {share:.0f}% of {self.seconds:.1f} s"
        )


def problems_text(problems: dict[int, str]) -> str:
    """The first of several, and how many more there are."""
    more = f" (and {len(problems) - 1:,} more problems)" if len(problems) > 1 else ""
    return f"{next(iter(problems.values()))}{more}; --on-error skip leaves such videos out"
