"""Checkpoints of a run: full tensors by name, so any world size, ZeRO stage or engine can continue from them.

A checkpoint is a folder `step-00000123` that appears by one rename after everything in it is on disk; `commit.json`
holds the format's version and the hash of each of its files. `latest`, written last, names the newest for people and
tools; loading does not trust it and looks for the newest that is complete. There is nothing to save of the random
states: each step seeds itself from (seed, step, rank), and the order of samples is a function of (seed, position).
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cpsp_dist.config import Config
from cpsp_dist.data.encoders import Encoders, require_same
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.models.weights import has_its_length, save_tensors
from cpsp_dist.training.engine import TrainingState
from cpsp_dist.utils import files
from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.hashing import file_sha256, text_sha256
from cpsp_dist.utils.json_lines import read_bytes

logger = logging.getLogger(__name__)

#: Of the files of a checkpoint and what is in them; a checkpoint of another one is refused.
FORMAT_VERSION = 1
LATEST = "latest"
COMMIT = "commit.json"
WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
PROGRESS = "progress.json"
#: Bytes; it holds a configuration, which is read from files of less.
LONGEST_PROGRESS = 1 << 26
REMEDY = "remove it to use the one before"


@dataclass
class TrainingProgress:
    """Where a run stands, apart from its tensors.

    Attributes:
        step: optimizer steps done. position: samples delivered, over all ranks and epochs.
        best_accuracy, best_step: best accuracy (percent) on val so far, and the step of that checkpoint.
        nonfinite: steps left out so far because a loss or gradient was not finite.
        run_id: the MLflow run. config: the resolved configuration. fingerprint: the shards'. world: ranks that wrote.
        encoders: those of the features, as the shards' manifest records them; None: written before they were recorded.
    """

    step: int = 0
    position: int = 0
    best_accuracy: float | None = None
    best_step: int | None = None
    nonfinite: int = 0
    run_id: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    world: int = 1
    finished: bool = False
    encoders: dict[str, Any] | None = None


class Checkpoints:
    """The checkpoints below a run's output folder. One process writes; any may read."""

    def __init__(self, output: str | Path):
        self.folder = Path(output) / "checkpoints"

    def save(self, state: TrainingState, progress: TrainingProgress, keep: int) -> Path:
        """Write a checkpoint and remove all but the `keep` newest and the best one.

        Raises:
            OSError, SafetensorError: it could not be written; earlier checkpoints are intact.
        """
        files.make_folder(self.folder)
        target = self.path(progress.step)
        part = self.folder / f".{target.name}.part"
        self._remove_leftovers()
        try:
            self._write(part, state, progress)
            _remove(target)  # the same step again: this one was damaged, and the run resumed before it
            files.rename(part, target)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)  # of a full disk, give back what it took
            raise
        try:
            files.write_text(self.folder / LATEST, target.name + "\n")
        except IsADirectoryError:  # nothing reads it but people
            logger.warning("%s: a folder; it does not name the newest checkpoint", self.folder / LATEST)
        for old in self.steps()[:-keep]:
            if old != progress.best_step:
                # Out of sight by one rename: whatever ends the removal leaves no half checkpoint behind.
                files.rename(self.path(old), gone := self.folder / f".{self.path(old).name}.part")
                shutil.rmtree(gone, ignore_errors=True)
        return target

    def _remove_leftovers(self) -> None:
        for left in self.folder.glob(".*.part"):
            _remove(left)

    def _write(self, part: Path, state: TrainingState, progress: TrainingProgress) -> None:
        """Everything of a checkpoint, on disk, in a folder that does not count as one yet."""
        part.mkdir()
        save_tensors(state.weights, part / WEIGHTS)
        moments = {f"{moment}/{name}": t for moment, tensors in state.moments.items() for name, t in tensors.items()}
        save_tensors(moments | {f"objectives/{name}": t for name, t in state.objectives.items()}, part / OPTIMIZER)
        described = asdict(progress) | {"updates": state.updates}
        (part / PROGRESS).write_text(json.dumps(described, indent=1), encoding="utf-8")
        hashes = {path.name: file_sha256(path) for path in sorted(part.iterdir())}
        commit = {"format": FORMAT_VERSION, "files": hashes, "own": _digest_of(hashes)}
        (part / COMMIT).write_text(json.dumps(commit, indent=1), encoding="utf-8")
        for path in part.iterdir():
            files.sync(path)
        files.sync(part)

    @staticmethod
    def bytes_needed(model: nn.Module, config: Config) -> tuple[int, int]:
        """Of one checkpoint of this model (its parameters may be 'meta'), and of all that a run has at a time: those
        it keeps, the best one, and the one that is being written."""
        weights = sum(p.numel() for p in model.parameters()) * (8 if config.train.precision == "fp64" else 4)
        one = weights * (3 if config.train.optimizer == "adam" else 1)
        return one, one * (config.checkpoint.keep + 2)

    def steps(self) -> list[int]:
        """Steps of all checkpoints, rising; not yet verified. Whatever else lies there is no checkpoint.

        Raises:
            DataError: the folder cannot be listed.
        """
        try:
            names = os.listdir(self.folder)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be listed: {error.strerror}") from None
        found = [int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-[0-9]{8,15}", name)]
        return sorted(step for step in found if self.path(step).name in names and self.path(step).is_dir())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def newest_valid(self) -> tuple[int | None, list[str]]:
        """The newest step whose files are all as they were written, and a line about each newer one passed over.

        Raises:
            DataError: one that it comes to has another format.
        """
        passed_over: list[str] = []
        for step in reversed(self.steps()):
            problems = list(self.verify(step))
            if not problems:
                return step, passed_over
            passed_over.append(f"{self.path(step)}: passed over: {'; '.join(problems)}")
        return None, passed_over

    def verify(self, step: int) -> Iterable[str]:
        """What is wrong with a checkpoint; nothing when every file is there and unchanged.

        Raises:
            DataError: it has another format.
        """
        folder = self.path(step)
        try:
            commit = _read_commit(folder)
            expected = commit["files"]
            if commit["own"] != _digest_of(expected) or not isinstance(expected, dict):
                raise ValueError("changed")
        except FileNotFoundError:
            yield f"{COMMIT} is missing"
            return
        except (ValueError, KeyError, TypeError, RecursionError):
            yield f"{COMMIT} is damaged"
            return
        except OSError as error:
            yield f"{COMMIT} cannot be read: {error.strerror}"
            return
        complete = True
        for name in (WEIGHTS, OPTIMIZER, PROGRESS):
            problem = _problem(folder / name, expected.get(name))
            if problem:
                complete = False
                yield f"{name} {problem}"
        if complete and (found := json.loads(read_bytes(folder / PROGRESS))["step"]) != step:
            yield f"this is a copy of the checkpoint of step {found}"

    def load(self, step: int) -> tuple[TrainingState, TrainingProgress]:
        """The state and progress of a checkpoint, every byte as it was written.

        Raises:
            DataError: it is missing or damaged, or has another format.
        """
        folder = self.path(step)
        if problems := list(self.verify(step)):
            raise DataError(f"{folder}: not a complete checkpoint ({'; '.join(problems)}); {REMEDY}")
        try:
            weights = _read(folder / WEIGHTS)
            moments: dict[str, dict[str, Any]] = {}
            for key, tensor in _read(folder / OPTIMIZER).items():
                moment, name = key.split("/", 1)
                moments.setdefault(moment, {})[name] = tensor
            described = json.loads(read_bytes(folder / PROGRESS))
            updates = described.pop("updates")
            objectives = moments.pop("objectives", {})
            return TrainingState(weights, moments, updates, objectives), TrainingProgress(**described)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise DataError(f"{folder}: not a readable checkpoint ({error}); {REMEDY}") from None

    def load_best(self, progress: TrainingProgress) -> tuple[TrainingState, int, str]:
        """The weights that were best on val (the last ones without a val split), their step, and a warning or ''.

        Where somebody has removed their checkpoint, it is the last ones.

        Raises:
            DataError: that checkpoint is damaged.
        """
        best = progress.step if progress.best_step is None else progress.best_step
        if best == progress.step or self.path(best).exists():
            return self.load(best)[0], best, ""
        warning = f"{self.path(best)}, the best weights on val, is not there; those of step {progress.step} are used"
        return self.load(progress.step)[0], progress.step, warning


def require_encoders(progress: TrainingProgress, manifest: Manifest, model: str, *, warn: bool = True) -> None:
    """Refuse shards whose features other encoders made than those that a run was trained on.

    Args:
        model: how the message calls the run.
        warn: also about encoders that only one of both records.

    Raises:
        UserError: it names both.
    """
    trained = Encoders.parse(progress.encoders)
    if progress.fingerprint != manifest.fingerprint or trained.known:
        require_same(trained, manifest.encoders, model, manifest.place, warn=warn)


def _problem(path: Path, expected: Any) -> str:
    """What is wrong with a file of a checkpoint, or ''."""
    if not path.is_file():
        return "is missing"
    try:  # one that grew may take hours to read
        possible = path.stat().st_size <= LONGEST_PROGRESS if path.name == PROGRESS else has_its_length(path)
        return "" if possible and file_sha256(path) == expected else "is damaged"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _remove(path: Path) -> None:
    """A file, link or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _read_commit(folder: Path) -> dict[str, Any]:
    """`commit.json`; raises DataError where it is of another format, OSError or ValueError where it cannot be read."""
    if not (folder / COMMIT).exists():
        raise FileNotFoundError(folder / COMMIT)
    commit = json.loads(read_bytes(folder / COMMIT, limit=1 << 20))
    if not isinstance(commit, dict):
        raise ValueError("no object")
    version = commit.get("format")
    if version != FORMAT_VERSION:
        raise DataError(
            f"{folder}: checkpoint of format {version}, this program reads format {FORMAT_VERSION}; use the "
            "program that wrote it, or train anew into another folder; where it is damaged, remove it"
        )
    return commit


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, in memory: safetensors alone maps the file, which may be removed or written anew."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _digest_of(hashes: dict[str, str]) -> str:
    return text_sha256(json.dumps(hashes, sort_keys=True))
