"""Is the mean of a run's last weights better than the weights that were best on val?

    python -m tests.tools.averaged_weights RUN… [--last 5]

For each run, which kept at least so many checkpoints (checkpoint.keep): segment accuracy (%) on val and test of the
weights best on val, of the last ones, and of the mean of the last `--last` checkpoints (Izmailov et al. 2018, one
checkpoint an epoch); then the differences to the best ones on test, paired by run, with their 95 % intervals.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from cpsp_dist.config import Config
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.distributed.process_group import Ranks, discover
from cpsp_dist.models import model_for
from cpsp_dist.training.checkpoint import Checkpoints
from cpsp_dist.training.engine import PlainModel
from cpsp_dist.training.evaluate import evaluate
from cpsp_dist.training.setup import load_run, open_manifest
from tests.tools.paired_experiment import interval

KINDS = ("best on val", "last", "mean")


def mean_of(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of floating-point tensors in float64; of all others (counters) the last."""
    mean = {name: torch.stack([state[name].double() for state in states]).mean(0) for name in states[-1]}
    return {name: mean[name].to(last.dtype) if last.is_floating_point() else last for name, last in states[-1].items()}


def accuracies(config: Config, manifest: Manifest, ranks: Ranks, weights: dict[str, Tensor]) -> list[float]:
    """On val and on test, in percent."""
    model = PlainModel(model_for(config.model, manifest), weights, ranks.device)
    return [100 * evaluate(model, manifest, split, config, ranks)["accuracy"] for split in ("val", "test")]


def compare(output: Path, last: int, ranks: Ranks) -> dict[str, list[float]]:
    run, checkpoints = load_run(output), Checkpoints(output)
    newest = checkpoints.steps()[-last:]
    if len(newest) < last:
        raise SystemExit(f"{output}: {len(newest)} checkpoints of {last}; train with checkpoint.keep={last}")
    manifest = open_manifest(run.config)
    states = [checkpoints.load(step)[0].weights for step in newest]
    weights = (run.state.weights, states[-1], mean_of(states))
    return {kind: accuracies(run.config, manifest, ranks, each) for kind, each in zip(KINDS, weights, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--last", type=int, default=5, metavar="K")
    given = parser.parse_args()
    ranks, found = discover(), []
    for run in given.runs:
        found.append(compare(run, given.last, ranks))
        shown = ", ".join(f"{kind} {val:.2f} / {test:.2f}" for kind, (val, test) in found[-1].items())
        print(f"{run.name}: {shown}", flush=True)
    print(f"{len(found)} runs, test, 95 %:")
    tests = {kind: [each[kind][1] for each in found] for kind in KINDS}
    for kind in KINDS:
        mean, half = interval(tests[kind])
        ahead, spread = interval([a - b for a, b in zip(tests[kind], tests[KINDS[0]], strict=True)])
        difference = "" if kind == KINDS[0] else f", difference {ahead:+.2f} ± {spread:.2f}"
        print(f"{kind}: {mean:.2f} ± {half:.2f}{difference}")


if __name__ == "__main__":
    main()
