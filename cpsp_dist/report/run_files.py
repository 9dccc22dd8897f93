"""What a training leaves at its end to show how it went: its page, and figures for those who want pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from cpsp_dist.metrics.predictions import Predictions
from cpsp_dist.report.collect import collect
from cpsp_dist.report.page import write
from cpsp_dist.report.pictures import draw_pictures
from cpsp_dist.report.run_page import run_page
from cpsp_dist.tracking.predictions import predictions_file
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.extras import require

logger = logging.getLogger(__name__)

#: Of the page, in the run's folder; of the folder of pictures in there.
PAGE, PICTURES = "report.html", "figures"
#: Videos that are predicted once more for the page, on this rank alone: seconds on a CPU.
MOST = 500


def run_files(folder: Path) -> list[Path]:
    """Write the page about the run in `folder`, and pictures of its answers where matplotlib is installed; the files.

    What cannot be written is only reported: the run has ended well.
    """
    return [*_attempt("page", folder, _page), *_attempt("pictures", folder, _pictures)]


def _attempt(what: str, folder: Path, make: Callable[[Path], list[Path]]) -> list[Path]:
    try:
        return make(folder)
    except Exception as error:  # a finished training must not fail for it
        logger.warning(f"{folder}: no {what} of the run: {error}; `cpsp-dist report {folder}` writes the page")
        return []


def _page(folder: Path) -> list[Path]:
    write(run_page(collect(folder, most=MOST)), folder / PAGE)
    return [folder / PAGE]


def _pictures(folder: Path) -> list[Path]:
    split = next((split for split in ("test", "val") if (folder / predictions_file(split)).is_file()), None)
    if split is None:
        return []
    try:
        require("matplotlib", "report", f"{folder / PICTURES}: the run's figures as pictures")
    except UserError as error:
        logger.info(str(error))
        return []
    return draw_pictures(Predictions.load(folder / predictions_file(split)), folder / PICTURES)
