"""`cpsp-dist import-checkpoint`: weights of the published code, for a run of ours to start from."""

from __future__ import annotations

import argparse

from cpsp_dist.cli.paths import local_path
from cpsp_dist.models import MODELS
from cpsp_dist.utils.console import echo
from cpsp_dist.utils.errors import UserError


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "import-checkpoint",
        help="turn a published checkpoint into weights that a run can start from",
        description="Turn a checkpoint of the published code (a .pth.tar of parameters by name) into weights of ours. "
        "The config says which network, and its shards which sizes; every parameter has to fit. Only tensors are read.",
    )
    parser.add_argument("file", type=local_path, metavar="FILE", help="the published checkpoint")
    parser.add_argument("--model", required=True, choices=tuple(MODELS), help="its network (cpsp and sspsp are psp)")
    parser.add_argument("--config", metavar="CONFIG", required=True, help="configuration of the run that is to use it")
    parser.add_argument("--out", type=local_path, required=True, help="file to write (.safetensors)")
    parser.set_defaults(handler=_import)


def _import(args: argparse.Namespace) -> None:
    from safetensors.torch import save

    from cpsp_dist.config import load_config
    from cpsp_dist.models import model_for
    from cpsp_dist.models.published import load_published
    from cpsp_dist.training.setup import open_manifest
    from cpsp_dist.utils import files

    config = load_config(args.config)
    if config.model.name != args.model:
        raise UserError(f"--model {args.model}, but {args.config} has model.name={config.model.name}: they must agree")
    if args.out.suffix != ".safetensors":
        raise UserError(f"--out {args.out}: the name must end in .safetensors")
    if args.out.exists():
        raise UserError(f"--out {args.out}: exists already; remove it, or choose another name")
    manifest = open_manifest(config)
    weights = load_published(args.file, args.model, model_for(config.model, manifest))
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(args.out) as part:
            part.write_bytes(save(weights))  # save_file would write to another file beside it
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot write: {error.strerror or error}") from None
    total = sum(value.numel() for value in weights.values())
    echo(f"{args.out}: {len(weights)} parameters, {total:,} values")
