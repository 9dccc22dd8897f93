"""The files of `--plot` and `--overlay`, one for each video, named by it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from cpsp_dist.data.cache import Cache
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.inference.inputs import FeatureFiles, resolve
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.redact import url_without_secrets


def drawn_file(folder: Path, video: str, suffix: str) -> Path:
    """Of a video's id; the key of a sample may have slashes, and leads out of no folder."""
    return folder / f"{video.replace('/', '_')}{suffix}"


def require_distinct(inputs: Iterable[str], split: str, flag: str, folder: Path, suffix: str) -> None:
    """Refuse inputs of which two would be written to one file, before any of them is computed.

    Args:
        split: of shards. flag, folder, suffix: what writes the files, where, and their suffix.

    Raises:
        UserError: it names both; or an input cannot be read.
    """
    seen: dict[Path, tuple[str, str]] = {}
    for given in inputs:
        for video, shown, source in _videos(given, split):
            file = drawn_file(folder, video, suffix)
            first, same = seen.setdefault(file, (shown, source))
            if same != source:
                raise UserError(
                    f"{flag} {folder}: {first} and {shown} would both be written to {file}; rename one, or give them "
                    "in two commands, each with a folder of its own"
                )


def _videos(given: str, split: str) -> Iterator[tuple[str, str, str]]:
    """Of an input: id, how messages call it, and what is the same for the same video given twice."""
    for kind, what in resolve(given):
        if isinstance(what, FeatureFiles):
            yield what.video, str(what.visual), os.path.realpath(what.visual)
        elif kind == "video":
            yield Path(what).stem, what, os.path.realpath(what)
        else:
            manifest, shown = Manifest.load(given, Cache()), url_without_secrets(given)
            rows = manifest.rows(split)
            for key in manifest.samples["key"][rows.start : rows.stop].tolist():
                yield key.decode(), f"{shown} ({key.decode()})", f"{manifest.fingerprint} {key.decode()}"
