"""A step whose loss or gradient is not finite: named, left out by all ranks together, counted, and too many stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cpsp_dist.config import ObjectiveSettings
from cpsp_dist.data.batch import Batch
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.reader import EvalStream
from cpsp_dist.losses import OBJECTIVES
from cpsp_dist.losses.objectives import TERMS_OF, Objectives
from cpsp_dist.models import Output
from cpsp_dist.training.checkpoint import Checkpoints
from cpsp_dist.training.nonfinite import NonFiniteDiagnostics, Replay
from cpsp_dist.utils.errors import EXIT_USER_ERROR
from tests.support.runs import arguments, audited, newest_state


def poison(rank: int, row: int) -> None:
    """What is heard in one video is nan, for whichever rank gets it."""
    from cpsp_dist.data.reader import TrainStream

    batches = TrainStream.batches

    def poisoned(self: TrainStream, *args: Any) -> Any:
        for batch in batches(self, *args):
            batch.audio[batch.index == row] = torch.nan
            yield batch

    TrainStream.batches = poisoned  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "engine",
    [
        "engine.zero=2",
        *(pytest.param(engine, marks=pytest.mark.long) for engine in ("engine.zero=0", "engine.kind=ddp")),
    ],
)
def test_a_bad_step_is_named_and_left_out(prefork: Any, keypad_shards: Path, tmp_path: Path, engine: str) -> None:
    """12 steps of 4 are one epoch of 48: the bad video is met once."""
    manifest = Manifest.load(keypad_shards)
    row = manifest.rows("train")[11]
    key = manifest.samples[row]["key"].decode()
    more = [
        engine,
        "pool.bank=16",
        "train.steps=12",
        "data.log_samples=true",
        "checkpoint.every_steps=1",
        "checkpoint.keep=99",
    ]
    run = arguments(keypad_shards, tmp_path / "run", *more)
    launch = prefork.start(run, 2, patch="tests.unit.training.test_nonfinite:poison", patch_args=[row])
    output = launch.finish()
    steps = audited(tmp_path / "run")
    (bad,) = [step for step, keys in steps.items() if key in keys]
    holder = 0 if key in rank_keys(tmp_path / "run", 0)[bad] else 1
    (message,) = [line for line in output.splitlines() if "not finite" in line]
    assert message.startswith(
        f"warning: step {bad}: the loss or its gradient is not finite: rank {holder}: loss terms "
    )
    assert "event" in message
    assert f"video {key}; step left out (1 of at most 10)" in message
    assert f"rank {1 - holder}" not in message

    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.steps() == list(range(1, 13))
    states = {step: checkpoints.load(step) for step in (bad - 1, bad, 12) if step}
    assert states[12][1].nonfinite == 1
    assert states[bad][1].position == 4 * bad, "the data move on"
    if bad > 1:
        before, after = states[bad - 1][0], states[bad][0]
        assert after.updates == before.updates
        assert all(torch.equal(after.weights[name], tensor) for name, tensor in before.weights.items())
        for moment, tensors in before.moments.items():
            assert all(torch.equal(after.moments[moment][name], tensor) for name, tensor in tensors.items())
    assert all(tensor.isfinite().all() for tensor in newest_state(tmp_path / "run").values())
    assert states[12][0].updates == 11


def rank_keys(output: Path, rank: int) -> dict[int, list[str]]:
    lines = (output / "audit" / f"rank{rank}.jsonl").read_text().splitlines()
    return {line["step"]: line["keys"] for line in map(json.loads, lines)}


def test_too_many_bad_steps_stop_the_run(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    row = Manifest.load(keypad_shards).rows("train")[11]
    run = arguments(keypad_shards, tmp_path / "run", "train.steps=12", "train.max_nonfinite_steps=0")
    launch = prefork.start(run, 2, patch="tests.unit.training.test_nonfinite:poison", patch_args=[row])
    assert launch.wait() == [EXIT_USER_ERROR] * 2, launch.outputs()
    last = launch.ranks[0].output.strip().splitlines()[-1]
    assert "this is step 1 of that kind, and train.max_nonfinite_steps is 0" in last
    assert "Traceback" not in launch.outputs()


def overflow_backwards(rank: int, heard: list[float]) -> None:
    """The category classifier of a video that begins with these sounds has a finite answer and an infinite slope.

    Also, where a bad step is explained, it is checked that it is done again as it was: dropout included."""
    from cpsp_dist.models.layers import Classifier, Network
    from cpsp_dist.training.nonfinite import NonFiniteDiagnostics

    marked = torch.zeros(0)

    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.marked = marked
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return torch.where(ctx.marked[:, None, None], gradient * 1e30 * 1e30, gradient)

    inputs, classify, explain = Network.inputs, Classifier.forward, NonFiniteDiagnostics.diagnose_backward

    def mark(self: Network, visual: torch.Tensor, audio: torch.Tensor) -> Any:
        nonlocal marked
        marked = (audio[:, 0, : len(heard)] == torch.tensor(heard)).all(1)
        return inputs(self, visual, audio)

    def steep(self: Classifier, fusion: torch.Tensor) -> Any:
        event, _, video = classify(self, fusion)
        return event, classify(self, Steep.apply(fusion))[1], video

    def compare(self: NonFiniteDiagnostics, replay: Replay, video: Any) -> str:
        for number, part in enumerate(self._micro_batches):
            again = replay.run(number, replay.read(part.index))._asdict()
            for name, x in part.outputs.items():
                torch.testing.assert_close(again[name], x, rtol=1e-5, atol=1e-6)
        return explain(self, replay, video)

    Network.inputs = mark  # type: ignore[method-assign]
    Classifier.forward = steep  # type: ignore[method-assign]
    NonFiniteDiagnostics.diagnose_backward = compare  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "more",
    [
        ["engine.zero=3"],
        pytest.param(["engine.zero=0", "train.accumulation=2"], marks=pytest.mark.long),
        pytest.param(["engine.zero=2", "train.seed=2147483647"], marks=pytest.mark.long),
        pytest.param(["engine.kind=ddp", "train.accumulation=2"], marks=pytest.mark.long),
    ],
    ids=",".join,
)
def test_an_overflow_on_the_way_back_is_named(
    prefork: Any, keypad_shards: Path, tmp_path: Path, more: list[str]
) -> None:
    """Loss, outputs and what comes back to them are finite: only the parameters' gradient is not."""
    manifest = Manifest.load(keypad_shards)
    row = next(row for row in manifest.rows("train") if manifest.samples[row]["category"] >= 0)
    key = manifest.samples[row]["key"].decode()
    with EvalStream(manifest, "train", batch=1) as stream:
        heard = stream.read(np.array([row])).audio[0, 0, :8].tolist()
    run = arguments(
        keypad_shards, tmp_path / "run", "train.steps=6", "train.global_batch=8", "data.log_samples=true", *more
    )
    output = prefork.start(
        run, 2, patch="tests.unit.training.test_nonfinite:overflow_backwards", patch_args=[heard]
    ).finish()
    (bad,) = [step for step, keys in audited(tmp_path / "run").items() if key in keys]
    holder = 0 if key in rank_keys(tmp_path / "run", 0)[bad] else 1
    (message,) = [line for line in output.splitlines() if "not finite" in line]
    expected = f"warning: step {bad}: the loss or its gradient is not finite: rank {holder}: gradient of loss term "
    assert message.startswith(f"{expected}category inside the network (")
    assert f"), video {key}; step left out (1 of at most 10)" in message
    assert f"rank {1 - holder}" not in message


class Toy(nn.Module):
    """Event logits √(w·x), category logits v·x; x [B, 1] is given as the sound."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> Output:
        return Output((x * self.w).sqrt(), x * self.v, None, x, x, x, x, None)


def toy_step(x: list[float], back: dict[str, list[float]], valid: int) -> str:
    """What is reported of a micro-batch of `x`, to whose outputs `back` came back; slots from `valid` on are empty."""
    network, slots = Toy(), torch.arange(len(x))

    def batch(rows: torch.Tensor) -> Batch:
        sound = torch.tensor(x)[:, None]
        return Batch(sound, sound, sound > 0, rows, slots < valid, rows, rows)

    diagnostics = NonFiniteDiagnostics()
    output = diagnostics.record_outputs(network(batch(slots).audio), torch.where(slots < valid, slots, -1))
    zero = torch.zeros(())
    diagnostics.record_losses({"event": zero, "category": zero, "total": zero})
    heads = {name: getattr(output, name) for name in back}
    loss = sum((heads[name] * torch.tensor(values)[:, None]).sum() for name, values in back.items())
    loss.backward()
    assert diagnostics.diagnose_loss(str) == ""
    return diagnostics.diagnose_backward(Replay(network, batch, lambda _, b: network(b.audio)), str)


def test_the_cause_is_named_alone() -> None:
    steep = toy_step([4.0, 0.0, 1.0, 0.0, 9.0], {"event_logits": [1.0] * 5, "category_logits": [1.0] * 5}, valid=5)
    assert steep == "rank 0: gradient of loss term event inside the network (w), videos 1, 3"
    steep = toy_step([4.0, 0.0, 1.0, 0.0], {"event_logits": [1.0] * 4}, valid=3)
    assert steep == "rank 0: gradient of loss term event inside the network (w), video 1", "padding is nobody"
    large = toy_step([1.0, 1.0, 1.0], {"category_logits": [2e38, 1.0, 2e38]}, valid=3)
    nobody = "of no single video: the sum over videos 0, 1, 2"
    assert large == f"rank 0: gradient of loss term category inside the network (v), {nobody}"
    fine = toy_step([1.0, 1.0], {"category_logits": [1.0, 1.0]}, valid=2)
    assert fine == "the gradients of each rank are finite, their sum is not: rank 0: videos 0, 1"


@pytest.mark.parametrize("supervision", ["full", "weak"])
def test_each_term_comes_back_to_the_outputs_it_is_declared_to_take(supervision: str) -> None:
    terms = [*OBJECTIVES]
    torch.manual_seed(0)
    event = torch.rand(4, 10) < 0.5
    numbers = torch.arange(4)
    batch = Batch(event, event, event, torch.tensor([0, 0, 1, 1]), numbers >= 0, numbers, numbers)
    shapes = {"event_logits": (4, 10), "category_logits": (4, 5), "similarity": (4, 10)}
    shapes |= {name: (4, 10, 8) for name in ("fusion", "audio", "visual")}
    shapes |= {"gate": (4, 10), "modality_logits": (4, 5), "views": (4, 2, 10, 8)}
    if supervision == "weak":
        shapes["video_logits"] = (4, 5)
    for term in terms:
        outputs = {name: torch.rand(shape, requires_grad=True) for name, shape in shapes.items()}
        settings = ObjectiveSettings.model_validate({name: 0 for name in terms} | {term: 1.0})
        objectives = Objectives(settings, pool="gather", supervision=supervision)  # type: ignore[arg-type]
        given = Output(**({"video_logits": None, "attention": None} | outputs))  # type: ignore[arg-type]
        objectives(given, batch)[0].backward()
        reached = {name for name, x in outputs.items() if x.grad is not None and x.grad.any()}
        assert reached, term
        assert reached == {
            name
            for name, of in TERMS_OF.items()
            if term in of and name in shapes and not (supervision == "weak" and name == "category_logits")
        }, term
