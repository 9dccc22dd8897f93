"""The files that come with the package: configs, Slurm scripts, tested versions. Found from any folder."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

from cpsp_dist.utils import files
from cpsp_dist.utils.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]
#: An installed package holds them (setup.py puts them there); in a checkout they lie beside the package.
_ROOT = _PACKAGE / "shipped" if (_PACKAGE / "shipped").is_dir() else _PACKAGE.parent
CONFIGS = _ROOT / "configs"
SLURM = _ROOT / "slurm"
#: Versions that were tested together.
CONSTRAINTS = _ROOT / "constraints.txt"


def find_config(name: str | Path, folder: Path = Path()) -> Path:
    """The file that a config's name means. `ave_full`, `ave_full.yaml` and `configs/ave_full.yaml` name the same.

    A file in `folder`, or in its `configs`, is taken before a shipped one. Where there is neither, the result is
    `folder / name`, which does not exist.
    """
    names = [Path(name)] if Path(name).suffix in (".yaml", ".yml", ".json") else [Path(name), Path(f"{name}.yaml")]
    own = [folder / each for each in names]
    if len(names[0].parts) == 1:
        own += [folder / CONFIGS.name / each for each in names]
    shipped = [] if names[0].is_absolute() or ".." in names[0].parts else [CONFIGS / _short(each) for each in names]
    return next((path for path in own + shipped if path.is_file()), own[0])


def suggestion(path: Path) -> str:
    """What to add to the message that `path` cannot be read: the shipped config that was meant, or nothing."""
    if path.exists():
        return ""
    known = {_stem(shipped.relative_to(CONFIGS)): shipped for shipped in listed(CONFIGS)}
    near = [*difflib.get_close_matches(_stem(path), known, n=1), *difflib.get_close_matches(path.stem, known, n=1)]
    if not near:
        return ""
    found = known[near[0]].relative_to(CONFIGS).as_posix().removesuffix(".yaml")
    return f"; did you mean the shipped '{found}'?"


def _stem(name: Path) -> str:
    return _short(name).with_suffix("").as_posix()


def _short(name: Path) -> Path:
    """Without the folder's own name in front."""
    return Path(*name.parts[1:]) if name.parts[:1] == (CONFIGS.name,) else name


def listed(folder: Path) -> list[Path]:
    """The files in CONFIGS or SLURM, less their READMEs."""
    found = [path for path in sorted(folder.rglob("[!.]*")) if path.is_file() and path.suffix != ".md"]
    return sorted(found, key=lambda path: (len(path.relative_to(folder).parts), path))


def description(path: Path) -> str:
    """The first comment of a shipped file, a line. JSON has no comments."""
    if path.suffix == ".json":
        return f"DeepSpeed settings: engine.deepspeed={CONFIGS.name}/{path.relative_to(CONFIGS).as_posix()}"
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            return line.removeprefix("# ").rstrip(":")
    return ""


def copy_out(folder: Path, target: str | Path) -> list[Path]:
    """Write the files of CONFIGS or SLURM to `target`, which is made where it does not exist.

    Raises:
        UserError: another file of that name there already, or one that cannot be written. In the first case nothing is
            written.
    """
    copies = {path: Path(target) / path.relative_to(folder) for path in listed(folder)}
    try:
        for path, copy in copies.items():
            if copy.exists() and not _is_copy(path, copy):
                raise UserError(f"--copy {target}: {copy} exists already; remove it, or choose another folder")
        for path, copy in copies.items():
            files.make_folder(copy.parent)
            with files.replacing(copy) as part:
                shutil.copy(path, part)  # with its mode: scripts stay executable
    except OSError as error:
        raise UserError(f"--copy {target}: cannot write: {error.strerror or error}") from None
    return [*copies.values()]


def _is_copy(path: Path, copy: Path) -> bool:
    """Also of a command that was killed, whose files are complete."""
    return copy.is_file() and copy.stat().st_size == path.stat().st_size and copy.read_bytes() == path.read_bytes()
