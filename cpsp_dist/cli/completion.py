"""`cpsp-dist completion`: what a shell needs to complete commands and options."""

from __future__ import annotations

import argparse

SHELLS = ("bash", "zsh", "tcsh")


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "completion",
        help="print a script that completes commands and options in a shell",
        description="Print the script that completes commands, options and their choices.",
        epilog='bash: eval "$(cpsp-dist completion bash)", in ~/.bashrc. zsh: cpsp-dist completion zsh > _cpsp-dist, in'
        " a folder of $fpath. tcsh: cpsp-dist completion tcsh > FILE, and source it in ~/.tcshrc.",
    )
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(handler=_completion)


def _completion(args: argparse.Namespace) -> None:
    import shtab

    from cpsp_dist.cli import build_parser
    from cpsp_dist.utils.console import echo

    echo(shtab.complete(build_parser(), args.shell))
