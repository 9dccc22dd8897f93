"""How long a run takes from the end of its imports to the end of its first step.

    python -m tests.tools.first_step OUTPUT --config keypad data.shards=SHARDS [key=value …]

Imports all that the training imports, MLflow among it, then trains 3 steps into OUTPUT.
"""

from __future__ import annotations

import sys
import time

from cpsp_dist.cli import main


def measure(output: str, arguments: list[str]) -> tuple[float, float]:
    """Seconds of the imports, and from their end to the end of the first step.

    Raises:
        SystemExit: the training failed.
    """
    began = time.perf_counter()
    import torch

    import cpsp_dist.train  # noqa: F401
    from cpsp_dist.tracking.library import import_mlflow
    from cpsp_dist.training import trainer
    from cpsp_dist.training.engine import import_deepspeed

    import_deepspeed(torch.device("cpu"))
    import_mlflow("sqlite:///runs.db")
    imported, ends = time.perf_counter(), list[float]()
    run = trainer.Trainer.run_micro_batches

    def timed(self: trainer.Trainer, step: int) -> trainer.StepResult:
        result = run(self, step)
        ends.append(time.perf_counter())
        return result

    trainer.Trainer.run_micro_batches = timed  # type: ignore[method-assign]
    if code := main(["train", *arguments, f"output={output}", "train.steps=3"]):
        raise SystemExit(code)
    return imported - began, ends[0] - imported


if __name__ == "__main__":
    imports, first = measure(sys.argv[1], sys.argv[2:])
    print(f"imports {imports:.1f} s, the first step's end {first:.1f} s after", file=sys.stderr)
