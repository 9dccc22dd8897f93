"""The configuration of a run: typed, strict, from YAML with `extends:` and dotted overrides.

Every mistake of a configuration is told at once, each with the nearest key. The published settings are the defaults.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, model_validator

from cpsp_dist.data.urls import is_url, without_secrets
from cpsp_dist.errors import ConfigError
from cpsp_dist.utils.shipped import find_config, suggestion


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelSettings(Section):
    """The network. Channel and category counts are no settings: they come from the shards."""

    name: Literal["psp", "avel", "avsdn", "cmran"] = Field("psp", description="psp is the network of CPSP and SSPSP")
    supervision: Literal["full", "weak"] = Field("full", description="full: a label for each second; weak: a video's")
    threshold: float = Field(0.099, ge=0, lt=1, description="similarity below which PSP prunes a segment pair")
    dropout: float = Field(0.1, ge=0, lt=1)
    sees: Literal["both", "audio", "visual"] = Field("both", description="the other modality is blanked")
    weights: str | None = Field(None, description="to start from: of `cpsp-dist import-checkpoint`, or a checkpoint's")


class DataSettings(Section):
    """Where the shards are and how they are read."""

    shards: str = Field(description="folder written by `cpsp-dist shards pack`, or a URL of one (https://, s3://, …)")
    cache: str | None = Field(
        None, description="folder that keeps what was fetched from a URL; by default that in CPSP_CACHE, or the user's"
    )
    cache_gb: float | None = Field(None, gt=0, description="what the cache may hold; null: what the disk has")
    order: Literal["full", "lanes"] = Field(
        "full",
        description="full: any sample at any time, the default for a folder; lanes: few shards at a time, for a URL",
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
    threads: int = Field(2, ge=1, le=64, description="reader threads of each rank")
    depth: int = Field(3, ge=1, le=64, description="batches read ahead")
    check_crc: bool = Field(True, description="check each sample's crc32c as it is read")
    on_error: Literal["raise", "skip"] = Field("raise", description="a damaged sample: stop, or skip it and count")
    skip_budget: int = Field(100, ge=0, description="damaged samples a rank may skip before it stops")
    audit: bool = Field(False, description="list in OUTPUT/audit which samples each rank trained on at each step")

    @model_validator(mode="before")
    @classmethod
    def _order_suits_shards(cls, content: Any) -> Any:
        """Settled here, so that a checkpoint tells in which order its position was reached."""
        if isinstance(content, dict) and content.get("order") is None and isinstance(content.get("shards"), str):
            return content | {"order": "lanes" if is_url(content["shards"]) else "full"}
        return content

    @field_serializer("shards")
    def _keep_secrets(self, shards: str) -> str:
        """A password in a URL is not written to checkpoints and tracked settings."""
        return without_secrets(shards)


class ObjectiveSettings(Section):
    """Weights (0 turns an objective off) and parameters of the objectives; published fully supervised defaults.

    The published code has mistakes that change results. They are mended here; the value `published` of the keys at the
    end brings each of them back, for comparison.
    """

    event: float = Field(1.0, ge=0)
    category: float = Field(1.0, ge=0)
    avps: float = Field(100.0, ge=0, description="audio-visual pair similarity (pair level)")
    psa_s: float = Field(0.01, ge=0, description="event against background segments of a video (segment level)")
    psa_v: float = Field(1.0, ge=0, description="a class's videos against the others (video level)")
    sspsp: float = Field(
        0.0,
        ge=0,
        description="self-supervised: an audio segment against all visual segments of the pool; they are gathered only "
        "where this is more than 0 (T times the bytes of embeddings), and with pool.scope=gather",
    )
    temperature: float = Field(0.6, gt=0, description="of PSA_S")
    margin: float = Field(0.2, ge=0, description="of PSA_V")
    negatives: int = Field(3, ge=1, description="negatives of PSA_V for each anchor")
    mining: Literal["published", "proportional", "semihard", "supcon"] = Field(
        "published",
        description="published: the nearest negatives; proportional: so many for each 64 videos in the pool; semihard: "
        "the nearest beyond the hardest positive; supcon: no margin, a reconstruction of the InfoNCE form",
    )
    supcon_temperature: float = Field(0.1, gt=0, description="of PSA_V with mining=supcon (published: eta)")
    sspsp_temperature: float = Field(0.1, gt=0)
    psa_s_form: Literal["rows", "published_rows", "published"] = Field(
        "rows", description="published: sums over the wrong axis, no gradient; published_rows: right, plus a constant"
    )
    background: Literal["masked", "published"] = Field(
        "masked", description="a video without event has no class; published: it has class 0 (full supervision)"
    )
    few_negatives: Literal["averaged", "published"] = Field(
        "averaged", description="an anchor with fewer negatives than asked for uses them; published: it adds 0"
    )
    weak_category: Literal["cross_entropy", "published"] = Field(
        "cross_entropy", description="published: multi-label margin loss of probabilities, as if they were logits"
    )


class PoolSettings(Section):
    """The pool of videos that PSA_V mines from (and SSPSP's segments)."""

    scope: Literal["gather", "local"] = Field("gather", description="videos of all ranks, or each rank's own")
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

    seed: int = Field(1, ge=0, lt=2**31)
    global_batch: int = Field(64, ge=1)
    accumulation: int = Field(1, ge=1, description="parts of a global batch, one after the other; pools do not grow")
    epochs: int = Field(45, ge=1)
    steps: int | None = Field(None, ge=1, description="stop after so many steps, before `epochs` are over")
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = Field(1e-3, gt=0)
    milestones: tuple[int, ...] = Field((10, 20, 30), description="epochs after which the learning rate falls")
    gamma: float = Field(0.5, gt=0, le=1, description="factor by which it falls")
    nonfinite_budget: int = Field(
        10, ge=0, description="steps left out for a loss or gradient that is not finite, before the run stops"
    )
    clip: float | None = Field(0.1, gt=0, description="largest gradient norm; null for none")
    precision: Literal["fp32", "bf16", "fp64"] = Field("fp32", description="fp64 with engine.kind=ddp only")

    @model_validator(mode="after")
    def _accumulation_divides(self) -> TrainSettings:
        if self.global_batch % self.accumulation:
            raise ValueError(f"global_batch {self.global_batch} is not a multiple of accumulation {self.accumulation}")
        return self


class EngineSettings(Section):
    kind: Literal["deepspeed", "ddp"] = "deepspeed"
    zero: int = Field(0, ge=0, le=3, description="DeepSpeed ZeRO stage; bf16 runs 0 as 1")
    deepspeed: str | None = Field(None, description="JSON file with further DeepSpeed settings, or a shipped one")
    timeout: int = Field(600, ge=10, description="seconds a rank waits for the others before it gives up")
    silence: int = Field(60, ge=5, description="seconds without a rank's heartbeat after which the others end")


class CheckpointSettings(Section):
    every_steps: int | None = Field(None, ge=1, description="also save each so many steps; always at an epoch's end")
    keep: int = Field(2, ge=1, description="newest checkpoints kept, beside the best one")


class EvaluationSettings(Section):
    every_epochs: int = Field(1, ge=1)
    batch: int = Field(64, ge=1, description="videos a step, over all ranks")


class TrackingSettings(Section):
    """MLflow. Its store is MLFLOW_TRACKING_URI where that is set, else the SQLite file beside the run folders."""

    enabled: bool = True
    experiment: str = "cpsp"
    run_name: str | None = None
    parent: str | None = Field(None, description="MLflow run under which this one is listed; a sweep sets it")
    every_steps: int = Field(10, ge=1, description="steps between two logged points")
    patience: float = Field(30.0, ge=0, description="seconds that the end of a run waits for MLflow to take the points")


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

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.train.precision == "fp64" and self.engine.kind != "ddp":
            raise ValueError("train.precision=fp64 needs engine.kind=ddp: DeepSpeed's ZeRO has no float64")
        by_segment = [f"objectives.{name}" for name in ("event", "avps", "psa_s") if getattr(self.objectives, name)]
        if self.model.supervision == "weak" and by_segment:
            raise ValueError(f"model.supervision=weak has no segment labels: set {', '.join(by_segment)} to 0")
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file (`find_config` finds it), its `extends:` chain below it and `overrides`
    (`key.key=value`) on top.

    Raises:
        ConfigError: with every mistake, a line each.
    """
    config, mistakes = check_config(path, overrides)
    if config is None or mistakes:
        raise ConfigError(f"{path}: " + ("\n  " if len(mistakes) > 1 else "") + "\n  ".join(mistakes))
    return config


def check_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config | None, list[str]]:
    """As `load_config`, with the mistakes returned.

    Raises:
        ConfigError: a file of the chain that cannot be read, or is no YAML mapping.
    """
    mistakes: list[str] = []
    merged = _read_chain(find_config(path), ())
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            mistakes.append(f"override '{text}': write it as section.key=value")
            continue
        try:
            _merge(merged, _nested(key.split("."), yaml.load(value, Loader=_Loader)))
        except yaml.YAMLError:
            mistakes.append(f"override '{text}': '{value}' is not a YAML value")
    config, found = _validate(merged)
    return config, mistakes + found


def _validate(content: dict[str, Any]) -> tuple[Config | None, list[str]]:
    """The configuration, or its mistakes. Checks between keys run only where the keys themselves are right, so once
    more without the wrong ones."""
    try:
        return Config.model_validate(content), []
    except ValidationError as error:
        errors = [dict(e) for e in error.errors()]
    wrong: list[Any] = [e["loc"] for e in errors if e["type"] not in ("missing", "value_error")]
    rest = _without(content, wrong)
    more = _validate(rest)[1] if rest != content else []
    told = [_explain(e) for e in errors]
    return None, told + [mistake for mistake in more if mistake not in told]


def _without(content: Any, paths: list[tuple[Any, ...]]) -> Any:
    """`content` less what stands at the end of each path (a path into a list drops the list)."""
    if not isinstance(content, dict):
        return content
    dropped = {p[0] for p in paths if len(p) == 1 or not isinstance(content.get(p[0]), dict)}
    return {k: _without(v, [p[1:] for p in paths if p[0] == k]) for k, v in content.items() if k not in dropped}


def flat(config: Config | dict[str, Any]) -> dict[str, Any]:
    """{'train.seed': 1, …}: a configuration, or its dump, with dotted keys, as tracked and compared."""
    return dict(_flatten(config.model_dump(mode="json") if isinstance(config, Config) else config, ""))


def _flatten(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def _explain(error: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _keys(Config)
        # A typo's neighbours: keys of the same section first, then any key that ends alike.
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.6) or [
            k for k in known if k.rpartition(".")[2] == str(error["loc"][-1])
        ]
        return f"unknown key '{key}'" + (f"; did you mean '{near[0]}'?" if near else "")
    if error["type"] == "missing":
        return f"'{key}' is missing; set it in the file or as {key}=…"
    if error["type"] == "value_error":
        return (f"{key}: " if key else "") + str(error["ctx"]["error"])
    return f"{key}={error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, info in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys += _keys(info.annotation, f"{prefix}{name}.")
    return keys


def _read_chain(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The mapping in `path`, merged over what it extends (relative to the file that names it, or a shipped one)."""
    if path.resolve() in above:
        raise ConfigError(f"{path}: extends itself, by way of {', '.join(str(p) for p in above)}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}
    except OSError as error:
        by = f" (extended by {above[-1]})" if above else ""
        raise ConfigError(f"{path}: cannot read this config file{by}: {error.strerror}{suggestion(path)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a config file holds sections (key: value), not {type(content).__name__}")
    base = content.pop("extends", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends: takes one file name, not {base!r}")
    return _merge(_read_chain(find_config(base, path.parent), (*above, path.resolve())), content)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            _merge(below[key], value)
        else:
            below[key] = value
    return below


def _nested(keys: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value


class _Loader(yaml.SafeLoader):
    """Safe YAML with two traps removed: `1e-3` is a number, and a key given twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    # YAML lists become tuples, so that frozen settings hold nothing mutable.
    def construct_tuple(self, node: yaml.SequenceNode) -> tuple[Any, ...]:
        return tuple(self.construct_sequence(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:seq", _Loader.construct_tuple)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)
