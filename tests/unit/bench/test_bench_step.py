"""`cpsp-dist bench step` and `scaling`: what they compare with is the same computation, and ours is not slower."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from cpsp_dist.bench.published import published_forward, published_loss
from cpsp_dist.bench.step import bench_step, random_batch, step_flops
from cpsp_dist.config import ObjectiveSettings
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.models import build_model
from tests.support.environment import environment


def test_the_published_step_computes_what_ours_does() -> None:
    """In float64, without dropout, with the published forms; no class has a single video or too few others."""
    torch.manual_seed(0)
    network = build_model("psp", visual_channels=512, audio_channels=128, categories=28, dropout=0.0).double()
    batch = random_batch(8, 512)
    batch.category = torch.arange(8) % 2
    visual, audio = batch.visual.double(), batch.audio.double()
    ours, theirs = network(visual, audio), published_forward(network, visual, audio)
    for name in ("event_logits", "category_logits", "fusion", "similarity"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    forms = {"psa_s_form": "published", "background": "published", "few_negatives": "published"}
    objectives = Objectives(ObjectiveSettings(**forms), pool="gather")
    torch.testing.assert_close(objectives(ours, batch)[0], published_loss(theirs, batch))


def test_flops_are_those_of_the_published_sizes() -> None:
    """37.6 GFLOP for 64 videos: two passes over maps of 512 channels, three over their scores."""
    assert step_flops(64, 512) / 64 == 490 * 512 * 512 * 2 * 2 + 490 * 512 * 49 * 2 * 3


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["step", "--batch", "4", "--rounds", "1"], {"ways", "ratios", "matmul_gflops", "peak_bytes", "end_to_end"}),
        (["scaling", "--batch", "2", "--rounds", "1", "--ranks", "1", "2"], {"ranks", "cores"}),
    ],
)
def test_command_prints_json(arguments: list[str], keys: set[str]) -> None:
    command = [sys.executable, "-m", "cpsp_dist", "bench", *arguments, "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "find_unused_parameters" not in done.stderr
    result = json.loads(done.stdout)
    assert keys <= result.keys()
    if "ranks" in result:
        one, two = result["ranks"]["1"], result["ranks"]["2"]
        assert one["pool_bytes"] == one["gradient_bytes"] == 0
        assert two["pool_bytes"] == 2 * 2 * 256 * 4  # embeddings of the other rank's 2 videos, and gradients back
        assert one["efficiency"] == 1


@pytest.mark.timing
def test_a_step_in_float32_is_as_quick_as_the_published_network_in_float32() -> None:
    """By the ratio within each round; quiet machines gave 0.95 and more, so that 30 % slower is found."""
    result = bench_step(rounds=7, samples=0, ways=("ours fp32", "published network, fp32"))
    print(result)
    assert result["ratios"]["ours fp32"] > 0.8
