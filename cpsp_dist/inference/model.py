"""A trained model, as `cpsp-dist export` writes it or as a run left it, ready to predict.

To load an exported folder takes torch and safetensors alone. The folder:

    model.safetensors   weights, float32
    config.json         the arguments of `cpsp_dist.models.build_model`, the inputs' shapes, the features' encoders
    categories.txt      class names, one a line, in the order of the logits
    README.md           the model card: what it is, how it was trained and how well it did
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cpsp_dist.data.encoders import Encoders
from cpsp_dist.models import Network, Output, build_model, load_weights
from cpsp_dist.models.weights import shapes_of
from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.hashing import file_sha256, text_sha256
from cpsp_dist.utils.json_lines import read_bytes

if TYPE_CHECKING:
    from cpsp_dist.inference.prediction import Prediction

FORMAT_VERSION = 2
#: Bytes of a text file of the folder, at most; the settings' keys; what damaged ones raise somewhere.
LARGEST = 1 << 24
KEYS = {"format", "model", "inputs", "encoders", "step", "sha256"}
OF_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError)
WEIGHTS, SETTINGS, CATEGORIES, CARD = "model.safetensors", "config.json", "categories.txt", "README.md"
#: Segments of a video, where the model's folder does not say.
SEGMENTS = 10


class TrainedModel(nn.Module):
    """A network with what its predictions need.

    `model(visual [B, T, H, W, C], audio [B, T, A])` gives an `Output`, bit for bit that of the trained network.

    Attributes:
        network: in evaluation mode, float32.
        place: the folder it was loaded from.
        categories: class names, in the order of the logits.
        encoders: which made the features that it was trained on, as far as recorded.
        segments: T of the videos it was trained on.
    """

    def __init__(
        self, network: Network, place: str, categories: list[str], encoders: Encoders, segments: int = SEGMENTS
    ) -> None:
        super().__init__()
        self.network = network
        self.place, self.categories, self.encoders, self.segments = place, categories, encoders, segments
        self.eval()

    def forward(self, visual: Tensor, audio: Tensor) -> Output:
        output: Output = self.network(visual, audio)
        return output

    def predict(self, *inputs: str | Path, **options: Any) -> list[Prediction]:
        """What it predicts for videos, files of features and folders of shards, in order.

        Args:
            options: the fields of `cpsp_dist.inference.predict.PredictOptions`, as split="val", window=10.

        Raises:
            UserError: an input that cannot be read, or features of other encoders than it was trained on.
        """
        from cpsp_dist.inference.predict import PredictOptions, predict

        return list(predict(self, [str(each) for each in inputs], PredictOptions(**options)))


def load_model(folder: str | Path) -> TrainedModel:
    """The model in a folder of `cpsp-dist export`, or of a training run (its best weights), on the CPU.

    `model(visual, audio)` gives an `Output`, `model.predict(path)` predictions; `model.categories` are the class names.

    Raises:
        DataError: no such folder, one of another format, or not complete.
        UserError: a run whose shards are gone: its class names come from them.
    """
    folder = Path(folder)
    if not (folder / SETTINGS).is_file() and (folder / "checkpoints").is_dir():
        from cpsp_dist.inference.export import load_run_model

        return load_run_model(folder)
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
        network = build_model(**settings["model"])
        encoders = Encoders.parse(settings.get("encoders"))
        segments = int(settings["inputs"].get("visual", ["B", SEGMENTS])[1])
    except (OSError, *OF_DAMAGE) as error:
        reason = str(error) or repr(error)
        remedy = "; give such a folder, or the output folder of a run" if not (folder / SETTINGS).exists() else ""
        raise DataError(f"{folder}: not a model of `cpsp-dist export` ({reason}){remedy}") from None
    load_weights(folder / WEIGHTS, network)
    return TrainedModel(network, str(folder), categories, encoders, segments)


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
        found = digest_of(settings) if name == SETTINGS else file_sha256(folder / name)
        if found != digest:
            raise ValueError(f"{name} is not as it was exported (sha256 differs)")


def digest_of(settings: dict[str, Any]) -> str:
    """Of all settings but the digests."""
    content = {key: value for key, value in settings.items() if key != "sha256"}
    return text_sha256(json.dumps(content, sort_keys=True))
