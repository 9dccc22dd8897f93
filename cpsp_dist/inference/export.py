"""`cpsp-dist export`: a run's best model as a folder that needs neither this program's settings nor its shards."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from cpsp_dist.config import Config
from cpsp_dist.data.encoders import Encoders, encoder_text
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.reader import EvalStream
from cpsp_dist.inference.model import (
    CARD,
    CATEGORIES,
    FORMAT_VERSION,
    LARGEST,
    OF_DAMAGE,
    SETTINGS,
    WEIGHTS,
    TrainedModel,
    digest_of,
    load_model,
)
from cpsp_dist.inference.pyfunc import INPUTS, OUTPUTS
from cpsp_dist.losses import OBJECTIVES
from cpsp_dist.models import MODELS, model_for, sizes_for
from cpsp_dist.models.weights import save_tensors
from cpsp_dist.tracking.models import ModelFolder
from cpsp_dist.training.checkpoint import TrainingProgress, require_encoders
from cpsp_dist.training.setup import TrainedRun, load_run, open_manifest
from cpsp_dist.utils import files
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.hashing import file_sha256
from cpsp_dist.utils.json_lines import read_bytes
from cpsp_dist.utils.registry import settings_from

logger = logging.getLogger(__name__)


def load_run_model(run: str | Path) -> TrainedModel:
    """The best weights of a run (its last ones without a val split).

    Raises:
        UserError: no complete checkpoint in `run`, or its shards are gone or others.
    """
    trained = load_run(run)
    manifest = _shards_of(run, trained)
    network = model_for(trained.config.model, manifest)
    network.load_state_dict({name: tensor.to(torch.float32) for name, tensor in trained.state.weights.items()})
    segments = manifest.fields["label"].shape[0]
    return TrainedModel(network, str(run), manifest.categories, manifest.encoders, segments)


def _shards_of(run: str | Path, trained: TrainedRun) -> Manifest:
    """The shards that a run was trained on."""
    manifest = open_manifest(trained.config)
    require_encoders(trained.progress, manifest, f"the model of {run}")
    if manifest.fingerprint != trained.progress.fingerprint:
        raise UserError(
            f"{trained.config.data.shards}: not the shards that {run} was trained on; the class names come from them"
        )
    return manifest


def export(run: str | Path, out: str | Path) -> Path:
    """Write the best weights of a run (its last ones without a val split) to the new folder `out`.

    Raises:
        UserError: no complete checkpoint in `run`, its shards are gone, or `out` is there already or cannot be written.
    """
    out = Path(out)
    _require_new(out)
    trained = load_run(run)
    config, progress, state, step = trained.config, trained.progress, trained.state, trained.step
    manifest = _shards_of(run, trained)
    settings = {
        "format": FORMAT_VERSION,
        "model": {
            "name": config.model.name,
            "supervision": config.model.supervision,
            **sizes_for(manifest),
            "modality": config.model.modality,
            **vars(settings_from(MODELS[config.model.name].Settings, config.model)),
        },
        "inputs": {name: ["B", *manifest.fields[name].shape] for name in ("visual", "audio")},
        "encoders": manifest.encoders.as_json(),
        "step": step,
    }
    part = out.with_name(f".{out.name}.part")
    try:
        files.make_folder(part.parent)
        with files.alone(part, folder=True):
            try:
                _require_new(out)  # another export may just have ended
                for rest in part.iterdir():  # of one that was killed: safetensors' own hidden file among them
                    rest.unlink()
                save_tensors({name: tensor.to(torch.float32) for name, tensor in state.weights.items()}, part / WEIGHTS)
                (part / CATEGORIES).write_text("".join(f"{name}\n" for name in manifest.categories), encoding="utf-8")
                digests = {name: file_sha256(part / name) for name in (WEIGHTS, CATEGORIES)}
                settings["sha256"] = digests | {SETTINGS: digest_of(settings)}
                (part / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
                (part / CARD).write_text(_card(Path(run), config, manifest, progress, step), encoding="utf-8")
                load_model(part)  # what cannot be loaded is not handed out
                files.rename(part, out)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {out}: cannot write: {getattr(error, 'strerror', None) or error}") from None
    return out


def _require_new(out: Path) -> None:
    if out.exists():
        raise UserError(f"--out {out}: exists already; remove it, or choose another name")


def tracked_model(run: str, folder: Path) -> ModelFolder:
    """A run's model exported to `folder`/model, and what MLflow shows of it.

    Raises:
        UserError: see `export`.
    """
    trained = load_run(run)
    manifest = open_manifest(trained.config)
    shapes = {name: manifest.fields[name].shape for name in INPUTS}
    segments, split = manifest.fields["label"].shape[0], next(iter(manifest.splits))
    with EvalStream(manifest, split, batch=1) as stream:
        batch = next(iter(stream))
        example = {name: getattr(batch, name).float().numpy().round(4).tolist() for name in INPUTS}
    outputs = dict(zip(OUTPUTS, ((segments,), (len(manifest.categories),)), strict=True))
    name, register = trained.config.model.name, trained.config.tracking.register
    return ModelFolder(export(run, folder / "model"), name, shapes, outputs, example, register)


def _card(run: Path, config: Config, manifest: Manifest, progress: TrainingProgress, step: int) -> str:
    fields, train = manifest.fields, config.train
    results = _results(run / "results.json")
    rows = "\n".join(f"| {name} | {value:.2f} |" for name, value in results.items()) or "| (run not finished) | |"
    used = [f"{name} × {weight:g}" for name in OBJECTIVES if (weight := getattr(config.objectives, name))]
    sizes = ", ".join(f"{len(rows):,} {split}" for split, rows in manifest.splits.items())
    epochs = progress.position / max(1, len(manifest.splits.get("train", ())))
    return f"""# {run.name}: {config.model.name}, {config.model.supervision} supervision

Audio-visual event localization: for each second of a video, whether an event is both seen and heard, and which of
{len(manifest.categories)} categories it is. Trained with CPSP-dist, after "Contrastive Positive Sample Propagation
along the Audio-Visual Event Line" (TPAMI 2022).

## Use

```python
from cpsp_dist import load_model

model = load_model("this folder")  # needs torch and safetensors
output = model(visual, audio)  # float32 {_shape(fields["visual"].shape)} and {_shape(fields["audio"].shape)}
event = output.event_logits > 0  # [B, T]
category = output.category_logits.argmax(1)  # [B]
names = [model.categories[c] for c in category]
```

Of videos, features or shards: `cpsp-dist predict FOLDER INPUT ...`, or `model.predict(path)`.

{_encoders(manifest.encoders)}

## Results (percent)

| measure | value |
|---|---|
{rows}

## Training

- data: {sizes} videos; fingerprint `{manifest.fingerprint}`
- objectives: {", ".join(used)}; pool {config.pool.scope}{f", bank of {config.pool.bank}" if config.pool.bank else ""}
- step {step} of {progress.step} done ({epochs:.1f} epochs), global batch {train.global_batch}, {train.optimizer},
  learning rate {train.learning_rate:g}, {train.precision}, seed {train.seed}, {progress.world} ranks
- MLflow run: {progress.run_id or "none"}
"""


def _encoders(encoders: Encoders) -> str:
    if not encoders.known:
        return "The features have to come from the encoders that made the training data, which are not recorded."
    lines = ["The features have to come from the encoders that made the training data:", ""]
    for name, record in encoders.as_json().items():
        if name == "segment_seconds":
            lines.append(f"- a segment lasts {record:g} s")
            continue
        details = json.dumps(record["preprocessing"]) if record and record["preprocessing"] else "not recorded"
        lines.append(f"- {name}: {encoder_text(record)}; preprocessing: {details}")
    return "\n".join(lines)


def _results(file: Path) -> dict[str, float]:
    """Percentages by name; none of a run that has not finished, or whose file is damaged."""
    try:
        content = json.loads(read_bytes(file, limit=LARGEST) or "{}")
        return {name: float(f"{value:.9g}") for name, value in content.items()}
    except (OSError, *OF_DAMAGE) as error:
        logger.warning("%s: damaged, so the card has no results: %s", file, error)
        return {}


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(["B", *map(str, shape)]) + "]"
