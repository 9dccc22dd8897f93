"""What is known of videos that shards do not hold: labels in a json file, categories in a csv with header.

`cpsp-dist extract` takes these forms and others.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from cpsp_dist.inference.prediction import Truth
from cpsp_dist.packing.text import as_mask, read_csv, read_label_file
from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.text import quoted

logger = logging.getLogger(__name__)


class KnownVideos:
    """The labels of a json file `{id: {"label": [0, 1, …]}}`, and the categories of a csv `category,video_id,split`.

    Raises:
        DataError: a file that cannot be read, or has another form.
    """

    def __init__(self, labels: str | None, csv: str | None):
        self._file = labels
        self._labels: dict[str, Any] = {} if labels is None else read_label_file(Path(labels))
        rows = [] if csv is None else [row for _, row in read_csv(Path(csv))]
        self._categories = {row["video_id"]: row["category"] for row in rows}

    def of(self, video: str, segments: int) -> Truth | None:
        """Of a video of n segments; None where it has no label. Raises DataError where that is of another length."""
        if self._file is None:
            return None
        if video not in self._labels:
            logger.warning("%s: video %s is not in it, so nothing is known of it", self._file, quoted(video))
            return None
        event = as_mask(self._labels[video], Path(self._file)).ravel()
        if event.shape != (segments,) or not np.isin(event, (0, 1)).all():
            raise DataError(f"{self._file}: video {quoted(video)}: a label of {segments} numbers 0 and 1 is expected")
        return Truth(self._categories.get(video) if event.any() else None, event.astype(int).tolist())
