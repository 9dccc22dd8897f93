"""The console command `cpsp-dist`: one module for each group of subcommands.

Arguments and what is printed belong here; nothing heavy is imported at the top, for `--help` has to answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence

from cpsp_dist import __version__
from cpsp_dist.cli import (
    bench,
    compare,
    completion,
    configs,
    demo,
    doctor,
    evaluate,
    export,
    extract,
    gpu_check,
    import_checkpoint,
    launch,
    predict,
    report,
    shards,
    train,
)
from cpsp_dist.utils.command import run_command
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.redact import learn
from cpsp_dist.utils.streams import Parser

#: In the order of --help.
COMMANDS = (
    shards,
    extract,
    configs,
    train,
    launch,
    evaluate,
    export,
    predict,
    report,
    compare,
    import_checkpoint,
    bench,
    demo,
    doctor,
    gpu_check,
    completion,
)


def build_parser() -> argparse.ArgumentParser:
    return _build()[0]


def _build() -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser, and the names of its commands."""
    parser = Parser(
        prog="cpsp-dist",
        description="Train audio-visual event localization (CPSP) at scale: pack features, train, compare runs.",
        epilog="Under a launcher: torchrun ... -m cpsp_dist.train --config CONFIG [key=value ...]",
    )
    parser.add_argument("--version", action="version", version=f"cpsp-dist {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.register(commands)
    _add_debug(parser)
    return parser, [*commands.choices]


def _add_debug(parser: argparse.ArgumentParser) -> None:
    """`--debug` in front of a command and behind it."""
    if "--debug" not in parser._option_string_actions:
        text = "print debug lines, and the traceback of an error; as CPSP_DEBUG=1 does"
        parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=text)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in dict.fromkeys(action.choices.values()):
                _add_debug(command)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = [*(sys.argv[1:] if argv is None else argv)]
    learn(arguments)
    parser, names = _build()
    doing = next((text for text in arguments if text in names), "cpsp-dist")
    return run_command(lambda: _run(parser, names, arguments), debug="--debug" in arguments, doing=doing)


def _run(parser: argparse.ArgumentParser, names: list[str], arguments: list[str]) -> int | None:
    if arguments and not arguments[0].startswith("-") and arguments[0] not in names:
        _unknown(arguments[0], names)
    args, rest = parser.parse_known_args(_with_ids(arguments))
    # argparse takes `key=value` of a subcommand in one place only; people also give them behind flags.
    if rest and not (hasattr(args, "overrides") and all("=" in text and text[0] != "-" for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    code: int | None = args.handler(args)
    return code


def _with_ids(arguments: list[str]) -> list[str]:
    """`--key -ID` as `--key=-ID`: a quarter of AVE's ids begin with the sign that argparse takes for a flag's."""
    joined: list[str] = []
    for text in arguments:
        if joined and joined[-1] == "--key" and text.startswith("-"):
            joined[-1] = f"--key={text}"
        else:
            joined.append(text)
    return joined


def _unknown(name: str, names: list[str]) -> None:
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(names)}"
    raise UserError(f"no command '{name}'; {hint}")
