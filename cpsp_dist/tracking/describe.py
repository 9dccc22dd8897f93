"""What MLflow's pages show of a run beside its points: who started what, from which sources, on which data."""

from __future__ import annotations

import contextlib
import getpass
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cpsp_dist import __version__
from cpsp_dist.config import Config
from cpsp_dist.data.encoders import MODALITIES, encoder_text
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.shard_index import fingerprint
from cpsp_dist.losses import OBJECTIVES
from cpsp_dist.tracking.git import git_source, git_state
from cpsp_dist.tracking.models import ModelFolder
from cpsp_dist.tracking.store import NOTE
from cpsp_dist.utils.redact import without_secrets

_PACKAGES = ("torch", "deepspeed", "numpy", "webdataset")
#: Split -> what MLflow's inputs call its use.
CONTEXTS = {"train": "training", "val": "val", "test": "test"}


#: Writes the model of a run's folder below another folder.
Export = Callable[[str, Path], ModelFolder]
#: Writes what shows how a run went into the run's folder; gives the files.
Report = Callable[[Path], Sequence[Path]]


@dataclass(frozen=True)
class Start:
    """This start of a run. began: seconds since the epoch; tags: where it runs, as host, launcher, device."""

    began: float = field(default_factory=time.time)
    tags: Mapping[str, str] = field(default_factory=dict)
    export: Export | None = None
    report: Report | None = None


def run_tags(config: Config, manifest: Manifest, world: int) -> dict[str, str]:
    """Of a run that begins: MLflow's own tags, versions, sources, command, note."""
    tags = {f"version.{name}": version(name) for name in _PACKAGES}
    tags |= {"version.cpsp_dist": __version__, "version.python": platform.python_version()}
    command = repeat_command(world)
    tags |= {"command": without_secrets(" ".join(sys.argv))} | git_state()
    tags |= started_tags(command) | {NOTE: run_note(config, manifest, world, command)}
    tags |= {"data.fingerprint": manifest.fingerprint}
    if manifest.encoders.known:
        tags["data.encoders"] = ", ".join(encoder_text(manifest.encoders[name]) for name in MODALITIES)
    return tags


def started_tags(command: str) -> dict[str, str]:
    """Who started it, with which command, from which sources, as MLflow's own tags have it."""
    kind = "JOB" if "SLURM_JOB_ID" in os.environ else "LOCAL"
    tags = {"mlflow.source.name": command, "mlflow.source.type": kind} | git_source()
    with contextlib.suppress(Exception):  # a user id without a name
        tags["mlflow.user"] = getpass.getuser()
    return tags


def repeat_command(world: int) -> str:
    """The command that trains this run again."""
    program, *arguments = sys.argv or [""]
    path = Path(program)
    if path.parts[-2:] == ("cpsp_dist", "train.py") or path.name in ("cpsp_dist.train", "train.py"):
        start = ["torchrun", f"--nproc-per-node={world}"] if world > 1 else ["python"]
        words = [*start, "-m", "cpsp_dist.train", *arguments]
    else:
        words = [path.name or "python", *arguments]
    return without_secrets(shlex.join(words))


def run_note(config: Config, manifest: Manifest, world: int, command: str) -> str:
    """In Markdown: what the run is, and the command to repeat it."""
    used = [f"{name} × {weight:g}" for name in OBJECTIVES if (weight := getattr(config.objectives, name))]
    videos = ", ".join(f"{len(rows):,} {split}" for split, rows in manifest.splits.items())
    train = config.train
    length = f"{train.steps:,} steps" if train.steps is not None else f"{train.epochs} epochs"
    return (
        f"**{config.model.name}**, {config.model.supervision} supervision, with {', '.join(used)} (pool: "
        f"{config.pool.scope}); {length} of global batch {train.global_batch}, seed {train.seed}, {world} "
        f"rank{'s' * (world > 1)}.\n\n"
        f"Data: {without_secrets(manifest.place)}, {videos} videos, {len(manifest.categories)} categories, fingerprint "
        f"`{manifest.fingerprint[:12]}`.\n\n"
        f"To repeat it (the settings are in `config.json`):\n\n```\n{command}\n```\n"
    )


def dataset_of(manifest: Manifest, split: str) -> dict[str, str]:
    """The arguments of MLflow's `Dataset` for one split: name, digest, source, schema and profile.

    The digest is the fingerprint of the split: of schema, categories, encoders and its shards.
    """
    shards = manifest.place if manifest.remote else str(manifest.folder.resolve())
    kind = shards.partition("://")[0] if manifest.remote else "local"
    own = [shard for shard in manifest.shards if shard.split == split]
    digest = fingerprint(manifest.fields, manifest.categories, own, manifest.encoders)
    samples = manifest.samples[manifest.splits[split].start : manifest.splits[split].stop]
    segments, event = len(samples) * manifest.fields["label"].shape[0], int(samples["events"].sum(dtype=int))
    profile: dict[str, Any] = {
        "num_rows": len(samples),
        "num_elements": sum(map(_elements, _specs(manifest))) * len(samples),
    }
    profile |= {"videos": len(samples), "segments": segments, "event_segments": event}
    profile |= {"categories": len(manifest.categories), "shards": len(own), "fingerprint": digest}
    features, targets = _specs(manifest)[:2], _specs(manifest)[2:]
    # Of tensors alone MLflow's page shows no schema; of columns it shows names and types.
    columns = [{"name": each["name"], "type": _type_text(each)} for each in _specs(manifest)]
    schema: dict[str, Any] = {"mlflow_colspec": columns}
    schema |= {"mlflow_tensorspec": {"features": json.dumps(features), "targets": json.dumps(targets)}}
    return {
        "name": f"{Path(shards).name} {split}"[:500],
        "digest": digest[:32],
        "source_type": kind,
        "source": json.dumps({"uri": without_secrets(shards)}),
        "schema": json.dumps(schema),
        "profile": json.dumps(profile),
    }


def _specs(manifest: Manifest) -> list[dict[str, Any]]:
    """As MLflow's tensor schemas have them: visual, audio, label."""
    return [
        {"name": name, "type": "tensor", "tensor-spec": {"dtype": field_.dtype, "shape": [-1, *field_.shape]}}
        for name, field_ in ((name, manifest.fields[name]) for name in ("visual", "audio", "label"))
    ]


def _type_text(spec: Mapping[str, Any]) -> str:
    """`float16 [10, 7, 7, 512]`, of one video."""
    tensor = spec["tensor-spec"]
    return f"{np.dtype(tensor['dtype']).name} {tensor['shape'][1:]}"


def _elements(spec: Mapping[str, Any]) -> int:
    return -int(math.prod(spec["tensor-spec"]["shape"]))
