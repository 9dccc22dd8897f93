"""Predictions of a trained model for videos, files of features and folders of shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cpsp_dist.data.batch import Batch
from cpsp_dist.data.cache import Cache
from cpsp_dist.data.encoders import require_same
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.reader import EvalStream
from cpsp_dist.distributed.devices import named_device
from cpsp_dist.inference.inputs import FeatureFiles, resolve
from cpsp_dist.inference.model import TrainedModel
from cpsp_dist.inference.prediction import Prediction, Scores, Truth, make_prediction
from cpsp_dist.inference.truth import KnownVideos
from cpsp_dist.inference.videos import VideoReader
from cpsp_dist.inference.windows import score
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.redact import url_without_secrets
from cpsp_dist.utils.text import one_line

#: Videos of shards that are computed together.
BATCH = 32


@dataclass(frozen=True)
class PredictOptions:
    """
    Attributes:
        split: of shards.
        window, hop: segments of a window over longer videos (None: as many as the model was trained on), and from one
            window to the next (None: half a window).
        labels, csv: files with the labels and categories of videos and features, where they are known.
        visual_encoder, audio_encoder: names, for videos, where the model does not record its encoders.
        visual_weights, audio_weights: files of their weights; None: those in the cache.
        device: that computes, as "cuda"; None: a GPU where there is one.
    """

    split: str = "test"
    window: int | None = None
    hop: int | None = None
    labels: str | None = None
    csv: str | None = None
    visual_encoder: str | None = None
    audio_encoder: str | None = None
    visual_weights: str | None = None
    audio_weights: str | None = None
    device: str | None = None


def predict(
    model: TrainedModel,
    inputs: Iterable[str],
    options: PredictOptions = PredictOptions(),  # frozen
) -> Iterator[Prediction]:
    """A prediction for each video of each input, in order.

    For shards the numbers are those of an evaluation on them.

    Raises:
        UserError: an input that cannot be read, features of other encoders or sizes, an option that cannot be.
    """
    yield from _Predictor(model, options).run(inputs)


class _Predictor:
    def __init__(self, model: TrainedModel, options: PredictOptions):
        self.window = model.segments if options.window is None else options.window
        self.hop = max(1, self.window // 2) if options.hop is None else options.hop
        if self.window < 1:
            raise UserError(f"--window {self.window}: has to be 1 or more")
        if not 1 <= self.hop <= self.window:
            raise UserError(f"--hop {self.hop}: has to be from 1 to the window, {self.window}, or seconds are left out")
        self.device = str(named_device(options.device))
        self.model = model.to(self.device)
        if options.csv is not None and options.labels is None:
            raise UserError(
                f"--csv {options.csv}: names categories; --labels with the seconds of the events is missing"
            )
        self.known = KnownVideos(options.labels, options.csv)
        self.options, self.name = options, f"the model of {model.place}"
        self._reader: VideoReader | None = None

    def run(self, inputs: Iterable[str]) -> Iterator[Prediction]:
        found = [(given, resolved) for given in inputs for resolved in resolve(given)]  # mistakes first
        if all(kind == "shards" for _, (kind, _) in found):
            for flag, path in (("--labels", self.options.labels), ("--csv", self.options.csv)):
                if path is not None:
                    raise UserError(f"{flag} {path}: is about videos and features; shards have their own, leave it out")
        for given, (kind, what) in found:
            if kind == "shards":
                yield from self._of_shards(given)
            elif isinstance(what, FeatureFiles):
                yield self._of_features(given, what)
            else:
                yield self._of_video(str(what))

    def _of_shards(self, given: str) -> Iterator[Prediction]:
        manifest, shown = Manifest.load(given, Cache()), url_without_secrets(given)
        require_same(self.model.encoders, manifest.encoders, self.name, manifest.place)
        if manifest.categories != self.model.categories:
            raise UserError(f"{manifest.place}: its categories are not those of {self.name}")
        seconds = manifest.encoders.segment_seconds
        slots = min(BATCH, len(manifest.rows(self.options.split)))  # none is empty, and computed all the same
        with EvalStream(manifest, self.options.split, batch=slots) as stream:
            for batch in stream:
                scores = self._score(batch.visual, batch.audio, manifest.place)
                for slot in np.flatnonzero(batch.valid.numpy()).tolist():
                    key = manifest.samples[int(batch.index[slot])]["key"].decode()
                    truth = _truth(batch, slot, manifest.categories)
                    yield make_prediction(scores[slot], manifest.categories, (shown, key), seconds, truth)

    def _of_features(self, given: str, files: FeatureFiles) -> Prediction:
        encoders = files.encoders
        require_same(self.model.encoders, encoders, self.name, str(files.visual))
        visual, audio = (torch.from_numpy(array)[None] for array in files.load())
        scores = self._score(visual, audio, str(files.visual))[0]
        return self._prediction(scores, (given, files.video), encoders.segment_seconds)

    def _of_video(self, path: str) -> Prediction:
        if self._reader is None:
            self._reader = self._make_reader()
        visual, audio = (torch.from_numpy(array)[None] for array in self._reader.read(path, self.model.segments))
        scores = self._score(visual, audio, path)[0]
        return self._prediction(scores, (path, Path(path).stem), self._reader.seconds)

    def _prediction(self, scores: Scores, name: tuple[str, str], seconds: float) -> Prediction:
        truth = self.known.of(name[1], len(scores.event))
        return make_prediction(scores, self.model.categories, name, seconds, truth)

    def _make_reader(self) -> VideoReader:
        options = self.options
        names = {"visual": options.visual_encoder, "audio": options.audio_encoder}
        weights = {"visual": options.visual_weights, "audio": options.audio_weights}
        return VideoReader(self.model.encoders, self.model.place, names, weights, self.device)

    def _score(self, visual: Tensor, audio: Tensor, place: str) -> list[Scores]:
        try:
            visual, audio = visual.to(self.device, torch.float32), audio.to(self.device)
            return score(self.model, visual, audio, self.window, self.hop)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{place}: features of [{visual.shape[-1]}] visual and [{audio.shape[-1]}] audio channels do not fit "
                f"{self.name}: {one_line(error)[:150]}"
            ) from None


def _truth(batch: Batch, slot: int, categories: list[str]) -> Truth:
    category = int(batch.category[slot])
    return Truth(categories[category] if category >= 0 else None, batch.event[slot].int().tolist())
