"""`cpsp-dist demo`: pack, train, evaluate and compare on the keypad corpus."""

from __future__ import annotations

import argparse

from cpsp_dist.cli.paths import local_path
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.numbers import integer


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("demo", help="make, pack, train, evaluate and compare on the keypad corpus (minutes)")
    parser.add_argument("--videos", action="store_true", help="from mp4 files to predicted events instead, one model")
    parser.add_argument("--config", default="keypad", metavar="CONFIG", help="(default: %(default)s)")
    parser.add_argument(
        "--output", type=local_path, help="made anew (default: runs/demo, of --videos runs/demo-videos)"
    )
    parser.add_argument("--seeds", type=integer, help="runs of each kind (default: 2)")
    parser.add_argument("--ranks", type=integer, help="processes to train on (default: 2; 1 where there is one GPU)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top of the config file")
    parser.set_defaults(handler=_demo)


def _demo(args: argparse.Namespace) -> None:
    output = str(args.output or ("runs/demo-videos" if args.videos else "runs/demo"))
    if args.videos:
        for flag in ("seeds", "ranks"):
            if getattr(args, flag) is not None:
                raise UserError(f"--{flag}: --videos trains one model on one rank; leave it out")
        from cpsp_dist.demo.run_videos import demo_videos

        demo_videos(args.config, output, args.overrides)
        return
    from cpsp_dist.demo.run import demo

    demo(args.config, output, seeds=2 if args.seeds is None else args.seeds, ranks=args.ranks, overrides=args.overrides)
