"""An exported model as `mlflow.pyfunc.load_model(uri)` loads it, to `predict({"visual": …, "audio": …})`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpsp_dist.inference.model import TrainedModel, load_model

#: Inputs and outputs of a model, as MLflow's signature has them.
INPUTS, OUTPUTS = ("visual", "audio"), ("event_probability", "category_probability")


class PyfuncModel:
    """What `predict` of MLflow calls."""

    def __init__(self, model: TrainedModel):
        self.model = model

    def predict(self, inputs: Mapping[str, Any], params: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
        """inputs: visual [B, T, 7, 7, C] and audio [B, T, A], float32. Returns event_probability [B, T] and
        category_probability [B, K], float32."""
        visual, audio = (torch.from_numpy(np.asarray(inputs[name], np.float32)) for name in INPUTS)
        with torch.no_grad():
            output = self.model(visual, audio)
        found = (output.event_logits.sigmoid(), output.category_logits.softmax(1))
        return {name: value.float().numpy() for name, value in zip(OUTPUTS, found, strict=True)}


def _load_pyfunc(path: str) -> PyfuncModel:
    """MLflow calls it by this name, with the folder of the exported model."""
    return PyfuncModel(load_model(Path(path)))
