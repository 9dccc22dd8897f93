"""The networks: one interface, any size, any dtype, and nothing a distributed engine would stumble over."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpsp_dist.config import ObjectiveSettings
from cpsp_dist.data.batch import Batch
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.models import MODELS as TABLE
from cpsp_dist.models import Output, build_model

ALL = [*TABLE]
#: CACE-Net is CMBS and more; CMBS by itself is for the long tier, where a test is not quick.
MODELS = [pytest.param(name, marks=pytest.mark.long) if name == "cmbs" else name for name in ALL]
K = 5


def network(name: str = "psp", supervision: str = "full", visual: int = 16, audio: int = 12, **extra):
    torch.manual_seed(0)
    sizes = {"categories": K, "threshold": 0.099, "dropout": 0.0} | extra
    return build_model(name, supervision=supervision, visual_channels=visual, audio_channels=audio, **sizes)


def features(videos: int, segments: int, visual: int = 16, audio: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(videos * 100 + segments)
    maps = torch.rand(videos, segments, 7, 7, visual, generator=generator)
    return maps.half(), torch.randn(videos, segments, audio, generator=generator)


@pytest.mark.parametrize("supervision", ["full", "weak"])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("videos", "segments"), [(1, 10), (1, 1), (3, 4), (2, 13)])
def test_shapes_at_any_size(name: str, supervision: str, videos: int, segments: int) -> None:
    output = network(name, supervision)(*features(videos, segments))
    assert output.event_logits.shape == (videos, segments)
    assert output.category_logits.shape == (videos, K)
    assert output.similarity.shape == (videos, segments)
    for field in (output.fusion, output.audio, output.visual):
        assert field.shape == (videos, segments, 256)
    if supervision == "weak":
        assert output.video_logits is not None
        # One more, background, where the network has it.
        assert output.video_logits.shape == (videos, K + (name in ("cmbs", "cace")))
    else:
        assert output.video_logits is None
    if output.attention is not None:
        assert output.attention.shape == (videos, segments, 49)
        torch.testing.assert_close(output.attention.sum(-1), torch.ones(videos, segments))


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_has_a_gradient(name: str) -> None:
    """DDP and ZeRO wait for the gradient of each parameter."""
    for supervision in ("full", "weak"):
        model = network(name, supervision)
        output = model(*features(2, 10))
        (output.event_logits.square().sum() + output.category_logits.square().sum()).backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.abs().max() > 0, key


@functools.cache
def fixed(name: str, supervision: str):
    return network(name, supervision).double().eval()


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=6, deadline=None)
@given(order=st.permutations(range(4)), weak=st.booleans())
def test_permuting_the_batch_permutes_the_output(name: str, order: list[int], weak: bool) -> None:
    model = fixed(name, "weak" if weak else "full")
    visual, audio = features(4, 3)
    for field, permuted in zip(model(visual, audio), model(visual[order], audio[order]), strict=True):
        if field is not None:
            torch.testing.assert_close(permuted, field[order], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("supervision", ["full", "weak"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seconds", [0, 1, 10])
def test_a_batch_of_one_trains(name: str, supervision: str, seconds: int) -> None:
    """Background throughout, an event of one second, event throughout; alone in its class in any case."""
    model = network(name, supervision)
    visual, audio = features(1, 10)
    one = torch.zeros(1, dtype=torch.int64)
    batch = Batch(visual, audio, torch.arange(10).unsqueeze(0) < seconds, one, one == 0, one, one)
    by_segment = {} if supervision == "full" else {"event": 0.0, "avps": 0.0, "psa_s": 0.0}
    weights = ObjectiveSettings(sspsp=1.0, **by_segment)
    loss, terms = Objectives(weights, pool="gather", supervision=supervision)(model(visual, audio), batch)
    loss.backward()
    assert all(value.isfinite() for value in terms.values()), terms
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_dtypes(name: str) -> None:
    """float64, bf16 weights, and bf16 autocast all stay near float32; outputs keep the parameters' dtype."""
    model = network(name).eval()
    inputs = features(2, 10)
    single = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(*inputs)
    double = network(name).double().eval()(*inputs)
    half = network(name).bfloat16().eval()(*inputs)
    for output, dtype, tolerance in (
        (double, torch.float64, 1e-4),
        (mixed, torch.float32, 0.1),
        (half, torch.bfloat16, 0.3),
    ):
        assert {field.dtype for field in output if field is not None} == {dtype}
        assert (output.category_logits.float() - single.category_logits).abs().max() < tolerance


def test_autocast_trains_the_same_parameters() -> None:
    model = network()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(*features(2, 10))
    (output.event_logits.sum() + output.category_logits.sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_linear_layer_only_in_front_of_other_sizes() -> None:
    def front(visual: int, audio: int) -> set[str]:
        return {key.split(".")[0] for key, _ in network(visual=visual, audio=audio).named_parameters()} & {
            "visual_in",
            "audio_in",
        }

    assert front(512, 128) == front(1024, 128) == set()
    assert front(64, 128) == {"visual_in"}
    assert front(512, 1024) == {"audio_in"}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sees", ["audio", "visual"])
def test_a_blanked_modality_changes_nothing(name: str, sees: str) -> None:
    model = network(name, modality=sees).eval()
    visual, audio = features(2, 10)
    both = model(visual, audio)
    without_visual, without_audio = model(visual.flip(0), audio), model(visual, audio.flip(0))
    same, other = (without_visual, without_audio) if sees == "audio" else (without_audio, without_visual)
    assert torch.equal(same.event_logits, both.event_logits)
    assert not torch.equal(other.event_logits, both.event_logits)


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    model = network(dropout=0.5)
    inputs = features(2, 10)
    assert not torch.equal(model(*inputs).fusion, model(*inputs).fusion)
    model.eval()
    assert torch.equal(model(*inputs).fusion, model(*inputs).fusion)


def test_threshold_prunes() -> None:
    """Above any share nothing is propagated: a modality then ignores the other."""
    audio, visual = torch.rand(2, 10, 256), torch.rand(2, 10, 256)
    pruned, kept = network(threshold=0.999).propagation, network(threshold=0.0).propagation
    assert torch.equal(pruned(audio, visual)[1], pruned(audio + 1, visual)[1])
    assert not torch.equal(kept(audio, visual)[1], kept(audio + 1, visual)[1])


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no model named 'pps'"):
        network("pps")
    with pytest.raises(
        ValueError,
        match="visual features are maps of 6 by 7 positions; this network takes maps of 49 positions, as 7 by 7",
    ):
        network()(torch.rand(1, 10, 6, 7, 16), torch.rand(1, 10, 12))


def test_output_is_a_tuple_of_tensors() -> None:
    """DeepSpeed's ZeRO-3 hooks look for tensors in tuples; a dataclass would be passed by."""
    assert issubclass(Output, tuple)


@pytest.mark.parametrize("name", ["psp", "avel", "avsdn"])
def test_layer_in_front_is_folded_exactly(name):
    """The attention multiplies two layers into one; applying one after the other to each position is the oracle."""
    torch.manual_seed(1)
    model = build_model(name, visual_channels=24, audio_channels=128, categories=5, dropout=0).double()
    visual, audio = torch.randn(2, 4, 7, 7, 24, dtype=torch.float64), torch.randn(2, 4, 128, dtype=torch.float64)

    def gradients(visual, front):
        model.zero_grad()
        model.visual_in, kept = front, model.visual_in
        sum(t.square().sum() for t in model(visual, audio) if t is not None).backward()
        model.visual_in = kept
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    folded = gradients(visual, model.visual_in)
    apart = gradients(model.visual_in(visual), None)
    for key, value in apart.items():
        torch.testing.assert_close(folded[key], value, rtol=1e-10, atol=1e-10)


def test_layers_in_front_bring_features_to_unit_scale():
    model = build_model("psp", visual_channels=192, audio_channels=1024, categories=5)
    visual, audio = 3.4 * torch.randn(2, 10, 7, 7, 192), 0.02 * torch.randn(2, 10, 1024)
    model.calibrate(3.4, 0.02)
    model.requires_grad_(False)
    assert model.visual_in(visual).square().mean().sqrt() == pytest.approx(1, rel=0.02)
    assert model.audio_in(audio).square().mean().sqrt() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("supervision", ["full", pytest.param("weak", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("grid", [(), (3, 5)])
def test_any_grid(name: str, supervision: str, grid: tuple[int, ...]) -> None:
    """Attention weighs as many positions as there are; of one, or a vector, there is nothing to weigh, so no layer."""
    count = math.prod(grid)
    model = network(name, supervision, positions=count)
    visual, audio = torch.rand(2, 6, *grid, 16), torch.rand(2, 6, 12)
    output = model(visual, audio)
    if count == 1:
        assert output.attention is None
        assert torch.equal(model.eval()(visual, audio).fusion, model(visual.reshape(2, 6, 16), audio).fusion)
        model.train()
    else:
        assert output.attention.shape == (2, 6, count)
        torch.testing.assert_close(output.attention.sum(-1), torch.ones(2, 6))
    (output.event_logits.square().sum() + output.category_logits.square().sum()).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key
    with pytest.raises(ValueError, match="maps of 7 by 7 positions; this network takes"):
        model(*features(1, 6))
