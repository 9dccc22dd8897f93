"""The scale of the features, from which a network begins, where some values are not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpsp_dist.training.setup import _scale


def test_scale_of_finite_values() -> None:
    x = np.random.default_rng(0).standard_normal((8, 10, 5)).astype(np.float32)
    tensor = torch.from_numpy(x.copy())
    assert _scale(tensor) == (tensor.square().mean().sqrt().item(), True)
    tensor[3, 2, 1], tensor[5, 0, 0] = torch.nan, -torch.inf
    kept = np.delete(x.ravel().astype(np.float64), [(3 * 10 + 2) * 5 + 1, 5 * 50])
    assert _scale(tensor) == (pytest.approx(np.sqrt(np.mean(kept**2))), False)
    assert _scale(torch.full((2, 3), torch.nan)) == (1.0, False)
