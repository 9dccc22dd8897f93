"""A trained model as a folder that needs neither this program's settings nor its shards, and how to load one.

`load_model` imports torch and safetensors alone. The folder:

    model.safetensors   weights, float32
    config.json         the arguments of `cpsp_dist.models.build_model`, and the shapes of the inputs
    categories.txt      class names, one a line, in the order of the logits
    README.md           the model card: what it is, how it was trained and how well it did
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpsp_dist.errors import DataError, UserError
from cpsp_dist.utils.hashing import file_sha256, text_sha256
from cpsp_dist.utils.json_lines import read_bytes

if TYPE_CHECKING:
    from cpsp_dist.config import Config
    from cpsp_dist.data.manifest import Manifest
    from cpsp_dist.models import Network
    from cpsp_dist.training.checkpoint import TrainingProgress

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
#: Bytes of a text file of the folder, at most; the settings' keys; what damaged ones raise somewhere.
LARGEST = 1 << 24
KEYS = {"format", "model", "inputs", "step", "sha256"}
_OF_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError)
WEIGHTS, SETTINGS, CATEGORIES, CARD = "model.safetensors", "config.json", "categories.txt", "README.md"


def load_model(folder: str | Path) -> Network:
    """The exported network, in evaluation mode on the CPU. Its `categories` are the class names.

    `model(visual [B, T, 7, 7, C], audio [B, T, A])` gives an `Output`, bit for bit that of the trained model.

    Raises:
        DataError: not an exported folder, one of another format, or not complete.
    """
    import torch

    from cpsp_dist.models import build_model, load_weights
    from cpsp_dist.models.weights import shapes_of

    folder = Path(folder)
    try:
        settings = json.loads(_read(folder / SETTINGS))
        categories = _read(folder / CATEGORIES).decode().splitlines()
        if (version := settings.get("format")) != FORMAT_VERSION:
            raise DataError(
                f"{folder}: exported model of format {version}, this program reads format {FORMAT_VERSION}; use the "
                "program that wrote it, or export its run again"
            )
        shapes = shapes_of(folder / WEIGHTS)
        _require_unchanged(folder, settings)
        if len(categories) != settings["model"]["categories"]:
            raise ValueError(f"{CATEGORIES} has {len(categories)} names")
        with torch.device("meta"):  # what is described may be of any size
            described = build_model(**settings["model"]).state_dict()
        if {name: tuple(x.shape) for name, x in described.items()} != shapes:
            raise ValueError(f"{SETTINGS} describes other weights than {WEIGHTS} holds")
        model = build_model(**settings["model"])
    except (OSError, *_OF_DAMAGE) as error:
        raise DataError(f"{folder}: not a model of `cpsp-dist export` ({str(error) or error!r})") from None
    load_weights(folder / WEIGHTS, model)
    model.categories = categories  # type: ignore[assignment]  # nn.Module is annotated for tensors and modules
    return model.eval()


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is missing")
    return read_bytes(path, limit=LARGEST)


def _require_unchanged(folder: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError where a file is not as it was written; exports of 0.1 have no digests."""
    digests = settings.get("sha256")
    if unknown := settings.keys() - KEYS:
        raise ValueError(f"{SETTINGS} has keys {', '.join(sorted(unknown))}")
    if digests is None:
        return
    for name, digest in digests.items():
        found = _digest_of(settings) if name == SETTINGS else file_sha256(folder / name)
        if found != digest:
            raise ValueError(f"{name} is not as it was exported (sha256 differs)")


def _digest_of(settings: dict[str, Any]) -> str:
    """Of all settings but the digests."""
    content = {key: value for key, value in settings.items() if key != "sha256"}
    return text_sha256(json.dumps(content, sort_keys=True))


def export(run: str | Path, out: str | Path) -> Path:
    """Write the best weights of a run (its last ones without a val split) to the new folder `out`.

    Raises:
        UserError: no complete checkpoint in `run`, its shards are gone, or `out` is there already or cannot be written.
    """
    import torch
    from safetensors import SafetensorError

    from cpsp_dist.models import MODELS
    from cpsp_dist.models.weights import save_tensors
    from cpsp_dist.training.setup import load_run, open_manifest
    from cpsp_dist.utils import files
    from cpsp_dist.utils.registry import settings_from

    out = Path(out)
    if out.exists():
        raise UserError(f"--out {out}: exists already; remove it, or choose another name")
    trained = load_run(run)
    config, progress, state, step = trained.config, trained.progress, trained.state, trained.step
    manifest = open_manifest(config)
    if manifest.fingerprint != progress.fingerprint:
        raise UserError(
            f"{config.data.shards}: not the shards that {run} was trained on; the class names come from them"
        )
    settings = {
        "format": FORMAT_VERSION,
        "model": {
            "name": config.model.name,
            "supervision": config.model.supervision,
            "visual_channels": manifest.fields["visual"].shape[-1],
            "audio_channels": manifest.fields["audio"].shape[-1],
            "categories": len(manifest.categories),
            "modality": config.model.modality,
            **vars(settings_from(MODELS[config.model.name].Settings, config.model)),
        },
        "inputs": {name: ["B", *manifest.fields[name].shape] for name in ("visual", "audio")},
        "step": step,
    }
    part = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)  # what a killed export left
        part.mkdir(parents=True)
        save_tensors({name: tensor.to(torch.float32) for name, tensor in state.weights.items()}, part / WEIGHTS)
        (part / CATEGORIES).write_text("".join(f"{name}\n" for name in manifest.categories), encoding="utf-8")
        digests = {name: file_sha256(part / name) for name in (WEIGHTS, CATEGORIES)}
        settings["sha256"] = digests | {SETTINGS: _digest_of(settings)}
        (part / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        (part / CARD).write_text(_card(Path(run), config, manifest, progress, step), encoding="utf-8")
        load_model(part)  # what cannot be loaded is not handed out
        files.rename(part, out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"--out {out}: cannot write: {getattr(error, 'strerror', None) or error}") from None
    return out


def _card(run: Path, config: Config, manifest: Manifest, progress: TrainingProgress, step: int) -> str:
    from cpsp_dist.losses import OBJECTIVES

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
from cpsp_dist.export import load_model

model = load_model("this folder")  # needs torch and safetensors
output = model(visual, audio)  # float32 {_shape(fields["visual"].shape)} and {_shape(fields["audio"].shape)}
event = output.event_logits > 0  # [B, T]
category = output.{"video" if config.model.supervision == "weak" else "category"}_logits.argmax(1)  # [B]
names = [model.categories[c] for c in category]
```

The features have to come from the encoders that made the training data.

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


def _results(file: Path) -> dict[str, float]:
    """Percentages by name; none of a run that has not finished, or whose file is damaged."""
    try:
        content = json.loads(read_bytes(file, limit=LARGEST) or "{}")
        return {name: float(f"{value:.9g}") for name, value in content.items()}
    except (OSError, *_OF_DAMAGE) as error:
        logger.warning("%s: damaged, so the card has no results: %s", file, error)
        return {}


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(["B", *map(str, shape)]) + "]"
