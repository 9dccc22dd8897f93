"""The settings of a run: one class for each section. The published settings are the defaults.

The sections `model` and `objectives` are made of the settings of the registered networks and objectives, which stand
beside these.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cpsp_dist.losses import OBJECTIVES
from cpsp_dist.losses.settings import ObjectiveSettings
from cpsp_dist.models import MODELS
from cpsp_dist.models.layers import EXTRA_OUTPUTS
from cpsp_dist.models.settings import ModelSettings
from cpsp_dist.utils.sections import Section
from cpsp_dist.utils.urls import expanded, is_url, local_path


class DataSettings(Section):
    """Where the shards are and how they are read."""

    shards: str = Field(description="folder written by `cpsp-dist shards pack`, or a URL of one (https://, s3://, …)")
    cache: str | None = Field(
        None, description="folder that keeps what was fetched from a URL; by default that in CPSP_CACHE, or the user's"
    )
    cache_gb: float | None = Field(None, gt=0, description="what the cache may hold; null: what the disk has")
    order: Literal["full", "interleaved"] = Field(
        "full",
        description="full: any sample at any time, the default for a folder; interleaved: few shards at a time, the "
        "default for a URL",
    )
    epoch_end: Literal["carry", "drop", "pad"] = Field(
        "carry",
        description="what an epoch leaves over, less than a global batch. carry: it begins the next epoch's batches; "
        "drop: it is left out; pad: it is filled up with slots that count for nothing",
    )
    access: Literal["auto", "map", "read"] = Field(
        "auto",
        description="map: shards are mapped into memory, the fastest; read: by system calls, which survive a disk that "
        "fails; auto: map on this machine's own file systems, read on any other (NFS, Lustre, …)",
    )
    reader_threads: int = Field(2, ge=1, le=64, description="reader threads of each rank")
    prefetch_batches: int = Field(3, ge=1, le=64, description="batches read ahead")
    check_crc: bool = Field(True, description="check each sample's crc32c as it is read")
    on_error: Literal["raise", "skip"] = Field("raise", description="a damaged sample: stop, or skip it and count")
    max_skipped_samples: int = Field(100, ge=0, description="damaged samples a rank may skip before it stops")
    log_samples: bool = Field(False, description="list in OUTPUT/audit which samples each rank trained on at each step")

    @model_validator(mode="before")
    @classmethod
    def _order_suits_shards(cls, content: Any) -> Any:
        """Decided here, so that a checkpoint records in which order its position was reached."""
        if isinstance(content, dict) and content.get("order") is None and isinstance(content.get("shards"), str):
            return content | {"order": "interleaved" if is_url(content["shards"]) else "full"}
        return content

    @field_validator("shards")
    @classmethod
    def _shards_expanded(cls, shards: str) -> str:
        return expanded(shards)

    @field_validator("cache")
    @classmethod
    def _cache_is_local(cls, cache: str | None) -> str | None:
        return None if cache is None else expanded(str(local_path(cache)) if cache else cache)


class PoolSettings(Section):
    """The pool of videos that PSA_V mines from (and SSPSP's segments)."""

    scope: Literal["gather", "local"] = Field("gather", description="videos of all ranks, or each rank's own")
    over: Literal["part", "parts"] = Field(
        "part",
        description="the videos of one part of a global batch (train.accumulation), or of all its parts, for a second "
        "forward pass: GradCache",
    )
    bank: int = Field(
        0,
        ge=0,
        description="videos of earlier steps that PSA_V's pool has besides, without gradient; fewer than an epoch's, "
        "for a video is remembered each time it is seen",
    )

    @model_validator(mode="after")
    def _bank_is_gathered(self) -> PoolSettings:
        if self.bank and self.scope == "local":
            raise ValueError(f"bank={self.bank} needs scope=gather: every rank remembers the same videos")
        return self


class TrainSettings(Section):
    """Optimisation. The global batch is what one optimizer step sees, over all ranks and accumulation steps."""

    seed: int = Field(1, ge=0, lt=2**31, description="of the first weights, the order of samples and dropout")
    global_batch: int = Field(64, ge=1, description="samples of an optimizer step, over all ranks")
    accumulation: int = Field(1, ge=1, description="parts of a global batch, one after the other; see pool.over")
    epochs: int = Field(45, ge=1, description="passes over the training split")
    steps: int | None = Field(None, ge=1, description="stop after so many steps, before `epochs` are over")
    optimizer: Literal["adam", "sgd"] = Field("adam", description="sgd is without momentum")
    learning_rate: float = Field(1e-3, gt=0, description="before the first milestone")
    milestones: tuple[int, ...] = Field((10, 20, 30), description="epochs after which the learning rate falls")
    gamma: float = Field(0.5, gt=0, le=1, description="factor by which it falls")
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises, linearly, from 0")
    max_nonfinite_steps: int = Field(
        10, ge=0, description="steps left out for a loss or gradient that is not finite, before the run stops"
    )
    grad_clip_norm: float | None = Field(0.1, gt=0, description="largest gradient norm; null for none")
    precision: Literal["auto", "fp32", "bf16", "fp64"] = Field(
        "auto",
        description="auto: bf16 where the GPUs or CPUs of all ranks have it in hardware, else fp32; a resumed run keeps"
        " its checkpoint's. fp64 with engine.kind=ddp only",
    )
    deterministic: bool = Field(
        True, description="on a GPU, too, the same run on the same number and model of GPUs is the same bit for bit"
    )
    tf32: bool = Field(False, description="GPUs compute fp32 in TF32, faster and with an error of 1e-3")

    @model_validator(mode="after")
    def _accumulation_divides(self) -> TrainSettings:
        if self.global_batch % self.accumulation:
            raise ValueError(f"global_batch {self.global_batch} is not a multiple of accumulation {self.accumulation}")
        return self


class EngineSettings(Section):
    """How the ranks train together."""

    kind: Literal["deepspeed", "ddp"] = Field(
        "deepspeed", description="ddp: torch's DistributedDataParallel, without ZeRO"
    )
    zero: int = Field(0, ge=0, le=3, description="DeepSpeed ZeRO stage; bf16 runs 0 as 1")
    deepspeed: str | None = Field(None, description="JSON file with further DeepSpeed settings, or a shipped one")
    compile: Literal["none", "inductor", "graphs"] = Field(
        "none",
        description="the network as one piece. graphs: CUDA graphs of its forward and backward pass, with which a GPU "
        "need not wait for its host, without a change to any bit; inductor: torch.compile, with other dropout masks",
    )
    ignore_conflicts: bool = Field(
        False, description="train although the launcher, or engine.deepspeed, asks for other settings than these"
    )
    timeout: int = Field(600, ge=10, le=1_000_000, description="seconds a rank waits for the others before it gives up")
    heartbeat_timeout: int = Field(
        60, ge=5, description="seconds without a rank's heartbeat after which the others end"
    )

    @field_validator("deepspeed")
    @classmethod
    def _file_expanded(cls, file: str | None) -> str | None:
        return None if file is None else expanded(file)


class CheckpointSettings(Section):
    """When a run is saved."""

    every_steps: int | None = Field(None, ge=1, description="also save each so many steps; always at an epoch's end")
    keep: int = Field(2, ge=1, description="newest checkpoints kept, beside the best one")


class EvaluationSettings(Section):
    """Evaluation on the val split during training."""

    every_epochs: int = Field(1, ge=1, description="epochs between two evaluations; also after the last one")
    global_batch: int = Field(64, ge=1, description="videos a step, over all ranks")


# What it shadows is a class method of ABCMeta, which nothing calls here.
warnings.filterwarnings("ignore", message='Field name "register" in "TrackingSettings" shadows')


class TrackingSettings(Section):
    """MLflow."""

    enabled: bool = Field(True, description="whether MLflow is used; metrics.jsonl is written in any case")
    uri: str | None = Field(
        None,
        description="MLflow's store; null: MLFLOW_TRACKING_URI, else the SQLite file mlflow.db in the nearest folder "
        "`runs` above the output, where `cpsp-dist compare` looks, or beside the output; a sweep sets it",
    )
    experiment: str = Field("cpsp", description="MLflow experiment")
    run_name: str | None = Field(None, description="MLflow run; by default the name of the output folder")
    parent: str | None = Field(None, description="MLflow run under which this one is listed; a sweep sets it")
    every_steps: int = Field(10, ge=1, description="steps between two logged points")
    system_metrics: bool = Field(
        True,
        description="log CPU, memory, network and GPUs of each node at these points; "
        "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING counts where it is set",
    )
    register: str | None = Field(
        None, description="MLflow's registered model of which the best weights become a version at the run's end"
    )
    report: bool = Field(
        True, description="write the run's page and pictures of its answers at its end, seconds of work, and log them"
    )
    flush_timeout: float = Field(
        30.0, ge=0, description="seconds that the end of a run waits for MLflow to take the points"
    )


class Config(Section):
    """One run."""

    output: str = Field("runs/cpsp", description="folder of checkpoints, log and results")
    model: ModelSettings = ModelSettings()
    data: DataSettings
    objectives: ObjectiveSettings = ObjectiveSettings()
    pool: PoolSettings = PoolSettings()
    train: TrainSettings = TrainSettings()
    engine: EngineSettings = EngineSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    tracking: TrackingSettings = TrackingSettings()

    @field_validator("output")
    @classmethod
    def _output_is_local(cls, output: str) -> str:
        local_path(output)
        return expanded(output)

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.train.precision == "fp64" and self.engine.kind != "ddp":
            raise ValueError("train.precision=fp64 needs engine.kind=ddp: DeepSpeed's ZeRO has no float64")
        if self.engine.kind == "ddp" and (self.engine.zero or self.engine.deepspeed is not None):
            raise ValueError("engine.kind=ddp has no ZeRO: set engine.zero=0 and engine.deepspeed=null")
        if self.engine.zero == 3 and self.engine.compile != "none":
            raise ValueError("engine.compile needs complete weights, which engine.zero=3 has not: set one of them")
        by_segment = [
            f"objectives.{name}"
            for name, objective in OBJECTIVES.items()
            if objective.segment_labels and getattr(self.objectives, name)
        ]
        if self.model.supervision == "weak" and by_segment:
            raise ValueError(f"model.supervision=weak has no segment labels: set {', '.join(by_segment)} to 0")
        self._require_outputs()
        return self

    def _require_outputs(self) -> None:
        """Each objective gets what it takes: some outputs are those of a few networks."""
        full = self.model.supervision == "full"
        given = set(MODELS[self.model.name].extra_outputs if full else ())
        for name, objective in OBJECTIVES.items():
            if getattr(self.objectives, name) and (lacking := EXTRA_OUTPUTS.intersection(objective.inputs) - given):
                having = [model for model, network in MODELS.items() if lacking <= set(network.extra_outputs)]
                raise ValueError(
                    f"objectives.{name} needs a network that gives it '{', '.join(sorted(lacking))}': set it to 0, or "
                    f"model.supervision=full and model.name to {' or '.join(having)}"
                )


def flat(config: Config | dict[str, Any]) -> dict[str, Any]:
    """{'train.seed': 1, …}: a configuration, or its dump, with dotted keys, as tracked and compared."""
    return dict(_flatten(config.model_dump(mode="json") if isinstance(config, Config) else config, ""))


def _flatten(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value
