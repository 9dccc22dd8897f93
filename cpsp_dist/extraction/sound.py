"""Decoded sound as one waveform: channels mixed, placed by its time stamps, resampled. Needs numpy alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

#: The window of resampy's kaiser_best, which VGGish's published code resamples with.
ZEROS, ROLLOFF, BETA = 64, 0.9475937167399596, 14.769656459379492
#: Seconds by which a frame's time stamp may differ from the end of the frame before: containers round their stamps.
JITTER = 0.02
#: Seconds by which a time stamp is rounded, at most.
ROUNDING = 0.0005
#: Weights of a channel in the mix, as ITU-R BS.775 has them; those of stereo are equal. Others count as 1.
_WEIGHTS = {"FC": math.sqrt(2), "LFE": 0.0, "LFE2": 0.0} | dict.fromkeys(
    ("BL", "BR", "SL", "SR", "BC", "FLC", "FRC"), math.sqrt(0.5)
)


def mix(samples: npt.NDArray[np.generic], channels: Sequence[str]) -> Floats:
    """[channels, n] of any sample type as mono [n] in [-1, 1]: a weighted mean of the channels."""
    kind = samples.dtype
    scaled: Floats
    if kind == np.uint8:
        scaled = (samples.astype(np.float32) - 128) / np.float32(128)
    elif kind.kind == "i":
        scaled = samples.astype(np.float32) / np.float32(2 ** (8 * kind.itemsize - 1))
    else:
        scaled = samples.astype(np.float32)
    if len(scaled) == 1:
        return np.asarray(scaled[0])
    weights = np.array([_WEIGHTS.get(name, 1.0) if len(channels) > 2 else 1.0 for name in channels])
    if not weights.any():
        weights[:] = 1
    return np.asarray(np.einsum("cn,c->n", scaled, (weights / weights.sum()).astype(np.float32)))


class Track:
    """The sound of a stretch of time, from frames with time stamps.

    Frames that follow each other form a run, which is placed by all of their stamps: some containers round them to a
    millisecond.

    Args:
        rate: samples a second. seconds: length of the stretch.
    """

    def __init__(self, rate: int, seconds: float):
        self.rate, self.length = rate, round(rate * seconds)
        self._margin = round(rate * 0.1)  # on both sides of the stretch, for the resampler
        self._runs: list[_Run] = []

    def add(self, time: float | None, samples: Floats) -> None:
        """Sound that begins at `time`, in seconds from the stretch's begin; None: behind what was there before."""
        run = self._runs[-1] if self._runs else None
        if run is not None and (time is None or abs(time * self.rate - run.end) <= JITTER * self.rate):
            run.add(None if time is None else time * self.rate, samples)
        else:
            self._runs.append(_Run((time or 0.0) * self.rate, samples, ROUNDING * self.rate))

    @property
    def is_full(self) -> bool:
        """Whether there is sound up to the end of the stretch and a little more."""
        return bool(self._runs) and self._runs[-1].end >= self.length + self._margin

    def missing_seconds(self) -> float:
        """Of the stretch, for which there was no sound."""
        heard = np.zeros(self.length, bool)
        for run in self._runs:
            heard[max(run.start, 0) : max(run.start + run.size, 0)] = True
        return float(np.count_nonzero(~heard)) / self.rate

    def waveform(self, rate: int, count: int) -> Floats:
        """[count] samples at `rate`, the first at the begin of the stretch."""
        samples = np.zeros(self.length + 2 * self._margin, np.float32)
        for run in self._runs:
            first = run.start + self._margin
            begin, end = max(first, 0), min(first + run.size, len(samples))
            if begin < end:
                samples[begin:end] = np.concatenate(run.parts)[begin - first : end - first]
        return resample(samples, self.rate, rate, self._margin, count)


class _Run:
    """Parts without a gap. Places are in samples from the stretch's begin."""

    def __init__(self, place: float, samples: Floats, rounding: float):
        self.parts, self.size, self._offsets, self._rounding = [samples], len(samples), [place], rounding

    def add(self, place: float | None, samples: Floats) -> None:
        if place is not None:
            self._offsets.append(place - self.size)
        self.parts.append(samples)
        self.size += len(samples)

    @property
    def start(self) -> int:
        least, most = min(self._offsets), max(self._offsets)
        if most - least <= 2 * self._rounding:
            return round((least + most) / 2)
        return round(sum(self._offsets) / len(self._offsets))  # the sound's clock runs a little fast or slow

    @property
    def end(self) -> float:
        return self._offsets[0] + self.size


def resample(samples: Floats, rate: int, new_rate: int, first: int, count: int) -> Floats:
    """[count] values at `new_rate`; value k lies where `samples` (at `rate`) has its index first + k·rate/new_rate.

    A band-limited interpolation: no delay, what lies above the lower of the two Nyquist frequencies is removed.
    """
    divisor = math.gcd(rate, new_rate)
    up, down = new_rate // divisor, rate // divisor
    if up == down:
        found = samples[first : first + count]
        return np.pad(found, (0, count - len(found)))
    phases, half = _filters(up, down)
    last = first + (count * down) // up + half
    padded = np.pad(samples, (half, max(0, last - len(samples)) + 1))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half)
    result = np.empty(count, np.float32)
    for phase in range(min(up, count)):
        begin = first + 1 + (phase * down) // up
        target = result[phase::up]
        target[:] = np.einsum("nk,k->n", windows[begin::down][: len(target)], phases[(phase * down) % up])
    return result


@functools.lru_cache(maxsize=4)
def _filters(up: int, down: int) -> tuple[Floats, int]:
    """([up, 2·half] weights of the samples around a place, by its fraction in steps of 1/up; half)."""
    scale = min(1.0, up / down)
    half = math.ceil(ZEROS / scale)
    distance = (np.arange(up)[:, None] / up - np.arange(1 - half, half + 1)[None]) * scale
    inside = np.clip(1 - (distance / ZEROS) ** 2, 0, None)
    window = np.where(inside > 0, np.i0(BETA * np.sqrt(inside)), 0) / np.i0(BETA)
    return (scale * ROLLOFF * np.sinc(ROLLOFF * distance) * window).astype(np.float32), half
