"""`cpsp-dist demo`: pack, train, evaluate and compare on the keypad corpus."""

from __future__ import annotations

import argparse

from cpsp_dist.cli.paths import local_path


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("demo", help="make, pack, train, evaluate and compare on the keypad corpus (minutes)")
    parser.add_argument("--config", default="keypad", metavar="CONFIG", help="(default: %(default)s)")
    parser.add_argument("--output", type=local_path, default="runs/demo", help="made anew (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--ranks", type=int, help="processes to train on (default: 2; 1 where there is one GPU)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top of the config file")
    parser.set_defaults(handler=_demo)


def _demo(args: argparse.Namespace) -> None:
    from cpsp_dist.demo.run import demo

    demo(args.config, str(args.output), seeds=args.seeds, ranks=args.ranks, overrides=args.overrides)
