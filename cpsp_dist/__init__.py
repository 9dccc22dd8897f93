"""CPSP-dist: distributed training for audio-visual event localization.

The names in `__all__` are imported when first used (PEP 562); `import cpsp_dist` alone imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpsp_dist.api import TrainResult, evaluate, open_shards, train
    from cpsp_dist.config import Config, load_config
    from cpsp_dist.data.reader import EvalStream, ReaderOptions, TrainStream
    from cpsp_dist.data.torch_dataset import ShardsDataset
    from cpsp_dist.inference.model import load_model
    from cpsp_dist.losses.objectives import Objectives
    from cpsp_dist.models import build_model
    from cpsp_dist.utils.errors import LostRank, UserError

__version__ = "0.2.0"

_HOME = {
    "Config": "config",
    "EvalStream": "data.reader",
    "LostRank": "utils.errors",
    "Objectives": "losses.objectives",
    "ReaderOptions": "data.reader",
    "ShardsDataset": "data.torch_dataset",
    "TrainResult": "api",
    "TrainStream": "data.reader",
    "UserError": "utils.errors",
    "build_model": "models",
    "evaluate": "api",
    "load_config": "config",
    "load_model": "inference.model",
    "open_shards": "api",
}

__all__ = [
    "Config",
    "EvalStream",
    "LostRank",
    "Objectives",
    "ReaderOptions",
    "ShardsDataset",
    "TrainResult",
    "TrainStream",
    "UserError",
    "build_model",
    "evaluate",
    "load_config",
    "load_model",
    "open_shards",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "train":  # the module of the command, which is callable: its import sets this very name
        return import_module("cpsp_dist.train")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
