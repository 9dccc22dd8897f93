"""Models in folders as the Hugging Face hub has them (config.json, model.safetensors), by the library transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.extras import require
from cpsp_dist.utils.hashing import file_sha256
from cpsp_dist.utils.input_files import open_input
from cpsp_dist.utils.text import one_line


@dataclass(frozen=True)
class Pretrained:
    """A model, its folder, and the hashes of its weights and of its configuration."""

    model: Any
    folder: Path
    sha256: str
    config_sha256: str


def load_pretrained(folder: Path | None, kind: str, encoder: str, example: str) -> Pretrained:
    """The model of the class `kind` of transformers in a folder; nothing is fetched and no code in it is run.

    Raises:
        UserError: transformers is missing; no folder is given, it lacks a file, or holds another model's weights.
    """
    require("transformers", "encoders", f"the encoder {encoder}")
    if folder is None:
        modality = "audio" if "Audio" in kind else "visual"
        raise UserError(
            f"the encoder {encoder} needs a folder of weights: put config.json and model.safetensors of "
            f"https://huggingface.co/{example} into one, and give it with --{modality}-weights"
        )
    config, weights = folder / "config.json", folder / "model.safetensors"
    for path in (config, weights):
        open_input(path).close()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, report = getattr(transformers, kind).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # it raises nearly any type
        raise UserError(f"{folder}: not a model for the encoder {encoder} ({one_line(error)[:150]})") from None
    if missing := sorted(map(str, report["missing_keys"])) + sorted(map(str, report["mismatched_keys"])):
        raise UserError(
            f"{weights}: not weights for the encoder {encoder}: {missing[0]} is missing or of another shape"
        )
    return Pretrained(model, folder, file_sha256(weights), file_sha256(config))
