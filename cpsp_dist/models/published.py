"""Checkpoints of the published code: their parameters under the names they have here.

Each network defines how names are replaced: see `Network.published_names`.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch
from torch import Tensor, nn

from cpsp_dist.models import MODELS
from cpsp_dist.models.weights import require_fit
from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.input_files import open_input

#: Keys under which training loops save the parameters beside an epoch and an optimizer.
STATES = ("state_dict", "model_state_dict", "model")
#: Pickles that torch wrote one after the other, in front of the numbers, before version 1.6; characters of a name.
LEGACY_PICKLES, LONGEST_TEXT = 5, 10_000


def translate(state: Mapping[str, Tensor], model: str) -> dict[str, Tensor]:
    """A published state dict of `model` with the names of ours; parameters that are of no use are left out.

    Takes the prefixes `module.` (DataParallel) and `_orig_mod.` (torch.compile) away, and the `psp.` that the published
    ResNet variant puts around PSP. Unknown names stay as they are, so that loading reports them.

    Raises:
        ValueError: two names become one.
    """
    state = _renamed(state, lambda name: re.sub(r"^((module|_orig_mod)\.)+", "", name))
    if any(name.startswith("psp.psp.") for name in state):
        state = _renamed(state, lambda name: name.removeprefix("psp."))
    network = MODELS[model]
    ours: dict[str, Tensor] = {}
    for name, value in state.items():
        if re.match(network.published_unused, name):
            continue
        for pattern, replacement in network.published_names:
            name = re.sub(pattern, replacement, name)
        converted = dict(network.convert_published(name, value))
        if twice := sorted(ours.keys() & converted.keys()):
            raise ValueError(f"parameter {twice[0]} is there under two names")
        ours |= converted
    return ours


def _renamed(state: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    renamed = {rename(name): value for name, value in state.items()}
    if len(renamed) < len(state):
        raise ValueError("a parameter is there under two names, with and without a prefix")
    return renamed


def load_published(path: str | Path, name: str, model: nn.Module) -> dict[str, Tensor]:
    """The weights in a published checkpoint, as a state dict of `model` (built as network `name`).

    Only tensors are read; a file that would run code when unpickled is refused.

    Raises:
        DataError: not such a file, or its parameters are not exactly those of `model`; each of them is listed.
    """
    try:
        ours = translate(_read(Path(path)), name)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    require_fit(ours, model, path)
    return {key: value.detach().contiguous().clone() for key, value in ours.items()}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with open_input(path) as file:
            _require_undamaged(file)
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except Exception as error:  # a damaged file makes torch.load raise all sorts
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise DataError(
                f"{path}: refused: it holds '{asked[1][:100]}' beside tensors, which could run code"
            ) from None
        raise DataError(f"{path}: not a checkpoint that torch can read, or a damaged one") from None
    for key in STATES:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: holds no parameters by name")
    for key, value in content.items():
        if not isinstance(key, str) or not _is_plain(value):
            raise DataError(f"{path}: entry {repr(key)[:100]} is not a parameter")
    return content


def _require_undamaged(file: BinaryIO) -> None:
    """Raises an error where a checksum of the zip that torch writes is wrong, which torch itself does not look at, or
    a name is so long that torch would take minutes to print it."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members) or archive.testzip():
                raise ValueError("damaged, or not written by torch")
            for member in members:
                if member.filename.endswith("/data.pkl"):
                    with archive.open(member) as pickled:
                        _require_short_texts(pickled)
    else:
        file.seek(0)
        for _ in range(LEGACY_PICKLES):
            _require_short_texts(file)
    file.seek(0)


def _require_short_texts(pickled: IO[bytes]) -> None:
    for _, argument, _ in pickletools.genops(pickled):
        if isinstance(argument, str | bytes) and len(argument) > LONGEST_TEXT:
            raise ValueError("a text that is too long")


def _is_plain(value: Any) -> bool:
    """A tensor of floating point numbers that lie in memory: neither sparse, nor nested, nor without content."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return value.layout == torch.strided and not value.is_nested and value.device.type == "cpu"
