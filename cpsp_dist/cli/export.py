"""`cpsp-dist export`: a trained model as a folder of its own."""

from __future__ import annotations

import argparse

from cpsp_dist.cli.paths import local_path
from cpsp_dist.utils.console import echo


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "export",
        help="write a run's best model to a folder of its own",
        description="Write the best weights of a run, with class names and a model card, to a folder that "
        "cpsp_dist.load_model loads with torch and safetensors alone.",
    )
    parser.add_argument("run", metavar="RUN", help="output folder of a training run")
    parser.add_argument("--out", type=local_path, required=True, metavar="DIR", help="folder to make")
    parser.set_defaults(handler=_export)


def _export(args: argparse.Namespace) -> None:
    from cpsp_dist.distributed.launchers import require_one_process

    require_one_process("export")
    from cpsp_dist.inference.export import export

    out = export(args.run, args.out)
    echo(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
