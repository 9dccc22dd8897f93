"""`cpsp-dist predict`: what a trained model says of videos, features and shards."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cpsp_dist.cli.paths import local_path, require_replaceable
from cpsp_dist.utils.console import echo
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.numbers import integer

if TYPE_CHECKING:
    from cpsp_dist.inference.prediction import Prediction


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "predict",
        help="which event a video shows, and from which second to which",
        description="Predict the category, the event probability of each second and the events' spans in seconds.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder of `cpsp-dist export`, or of a training run")
    parser.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="+",
        help="video, folder of videos, features (visual/ID.npy, ID.visual.npy, their folder), folder or URL of shards",
    )
    parser.add_argument("--format", choices=("table", "jsonl", "csv"), help="(default: by --out's suffix, else table)")
    parser.add_argument("--out", type=local_path, metavar="FILE", help="file to write (default: print)")
    parser.add_argument(
        "--plot",
        type=local_path,
        metavar="DIR",
        help="draw VIDEO.png of each into this folder; or all into a page NAME.html",
    )
    parser.add_argument(
        "--overlay", type=local_path, metavar="DIR", help="write VIDEO.mp4 of each, events drawn in, into this folder"
    )
    known = parser.add_argument_group("what is known of videos and features, to show beside (shards have it)")
    known.add_argument("--labels", metavar="JSON", help='seconds of events, {"ID": {"label": [0, 1, …]}}')
    known.add_argument("--csv", metavar="FILE", help="categories: category,video_id,split")
    parser.add_argument("--split", default="test", help="of shards (default: %(default)s)")
    windows = parser.add_argument_group("videos that are longer than those of the training")
    windows.add_argument(
        "--window", type=integer, metavar="N", help="segments the model sees at once (default: as trained)"
    )
    windows.add_argument(
        "--hop", type=integer, metavar="N", help="segments from a window to the next (default: half of one)"
    )
    encoders = parser.add_argument_group("encoders, for videos")
    for modality in ("visual", "audio"):
        encoders.add_argument(f"--{modality}-weights", metavar="FILE", help=f"weights of the {modality} encoder")
        text = f"name of the {modality} encoder, where the model does not record it"
        encoders.add_argument(f"--{modality}-encoder", metavar="NAME", help=text)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU where there is one)")
    parser.set_defaults(handler=_predict)


def _predict(args: argparse.Namespace) -> None:
    import dataclasses

    from cpsp_dist.distributed.launchers import require_one_process

    require_one_process("predict")
    from cpsp_dist.inference.drawn_files import require_distinct
    from cpsp_dist.inference.model import load_model
    from cpsp_dist.inference.plot import is_page
    from cpsp_dist.inference.predict import PredictOptions, predict
    from cpsp_dist.inference.prediction import FORMATS
    from cpsp_dist.utils import files
    from cpsp_dist.utils.extras import require

    suffix = args.out.suffix[1:] if args.out else ""
    form = args.format or (suffix if suffix in FORMATS else "table")
    if args.out is not None:
        require_replaceable("--out", args.out, (".jsonl", ".csv", ".txt"), [*args.inputs, args.csv, args.labels])
    options = PredictOptions(**{f.name: getattr(args, f.name) for f in dataclasses.fields(PredictOptions)})
    if args.overlay is not None:
        require("PIL", "report", "--overlay")
        require_distinct(args.inputs, args.split, "--overlay", args.overlay, ".mp4")
    if args.plot is not None and not is_page(args.plot):
        require_distinct(args.inputs, args.split, "--plot", args.plot, ".png")
    found = predict(load_model(args.model), args.inputs, options)
    lines = FORMATS[form](_drawn(found, args.plot, args.overlay))
    if args.out is None:
        for line in lines:
            echo(line)
        return
    text = "".join(f"{line}\n" for line in lines)
    try:
        files.write_text(args.out, text)
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written ({error.strerror})") from None
    echo(f"{args.out}: written")


def _drawn(found: Iterator[Prediction], plots: Path | None, overlays: Path | None) -> Iterator[Prediction]:
    """The predictions, each after its picture and its video are written."""
    from cpsp_dist.inference.plot import pictures

    with contextlib.ExitStack() as stack:
        draw = None if plots is None else stack.enter_context(pictures(plots))
        for each in found:
            if draw is not None:
                draw(each)
            if overlays is not None:
                from cpsp_dist.inference.overlay import overlay

                overlay(each, overlays)
            yield each
