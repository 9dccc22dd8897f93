"""`cpsp-dist configs`, `cpsp-dist slurm`: the files that come with the package, listed or written out to edit."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpsp_dist.cli.paths import local_path
from cpsp_dist.utils import shipped
from cpsp_dist.utils.console import echo


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    _register(
        commands,
        "configs",
        shipped.CONFIGS,
        "list the shipped configs, or write them to a folder",
        "Configs that come with the package. `--config ave_full` takes, of these names, the first that is there: "
        "ave_full, ave_full.yaml, configs/ave_full.yaml in this folder, the shipped one. So a copy in ./configs comes "
        "before the shipped file.",
    )
    _register(
        commands,
        "slurm",
        shipped.SLURM,
        "list the shipped sbatch scripts, or write them to a folder",
        "Scripts for sbatch that come with the package. `cpsp-dist launch` needs none of them.",
    )


def _register(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, folder: Path, brief: str, text: str
) -> None:
    parser = commands.add_parser(name, help=brief, description=text, epilog=f"Example: cpsp-dist {name} --copy {name}")
    parser.add_argument(
        "--copy", type=local_path, metavar="DIR", help="write them here; an existing file is not overwritten"
    )
    parser.set_defaults(handler=lambda args: _list_or_copy(folder, args.copy))


def _list_or_copy(folder: Path, target: Path | None) -> None:
    if target is not None:
        echo(f"{target}: {len(shipped.copy_out(folder, target))} files")
        return
    names = {path: path.relative_to(folder).as_posix().removesuffix(".yaml") for path in shipped.listed(folder)}
    width = max(map(len, names.values()), default=0)
    echo("\n".join(f"{name:{width}}  {shipped.description(path)}" for path, name in names.items()))
