"""The same samples read by this package and by its peers, each in an environment of its own; one table."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np

from cpsp_dist.bench.loader import bench_loader, noise_shards
from cpsp_dist.data.manifest import ARRAY_FIELDS, Manifest
from cpsp_dist.data.reader import EvalStream
from cpsp_dist.utils.errors import UserError

logger = logging.getLogger(__name__)

#: peer -> what its environment installs; None: this environment serves.
PEERS: dict[str, list[str] | None] = {
    "webdataset": None,
    "mosaicml": ["mosaicml-streaming==0.13.0"],
    "litdata": ["litdata==0.2.76"],
    "published": None,
}
INSTALL_SECONDS, RUN_SECONDS = 3600, 1800


def bench_peers(environments: Path, samples: int, peers: list[str]) -> dict[str, dict[str, Any]]:
    """Rows by name, ours first: `memcpy_ratio`, `samples_per_second`, `cpu_ms_per_sample`; or `error`, in one line."""
    rows: dict[str, dict[str, Any]] = {}
    with noise_shards(samples) as shards:
        ours = bench_loader(shards, samples=samples)
        for count, row in ours["threads"].items():
            rows[f"cpsp-dist, {count} thread{'s' if count > 1 else ''}"] = row
        _save_arrays(shards)
        for peer in peers:
            try:
                python = _environment(environments / peer, PEERS[peer])
                rows[peer] = _run(python, peer, shards.parent)
            except UserError as error:
                rows[peer] = {"error": str(error)}
    return rows


def _save_arrays(shards: Path) -> None:
    """The samples as plain arrays beside the shards: what the peers write their own files from."""
    manifest = Manifest.load(shards)
    with EvalStream(manifest, "train", batch=64) as stream:
        saved = {
            name: np.lib.format.open_memmap(
                shards.parent / f"{name}.npy",
                mode="w+",
                dtype=manifest.fields[name].dtype,
                shape=(stream.samples, *manifest.fields[name].shape),
            )
            for name in ARRAY_FIELDS
        }
        for batch in stream:
            rows = batch.index[batch.valid]
            for name, tensor in (("visual", batch.visual), ("audio", batch.audio), ("label", batch.event)):
                saved[name][rows] = tensor[batch.valid].numpy()
    for array in saved.values():
        array.flush()


def _environment(folder: Path, requirements: list[str] | None) -> Path:
    """The interpreter of an environment with `requirements`, made at the first call."""
    if requirements is None:
        return Path(sys.executable)
    done, python = folder / ".installed", folder / "bin" / "python"
    if not done.is_file() or done.read_text() != "\n".join(requirements):
        logger.info(f"installing {', '.join(requirements)} into {folder}")
        venv.create(folder, with_pip=True, clear=True)
        _call(
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements],
            INSTALL_SECONDS,
        )
        done.write_text("\n".join(requirements))
    return python


def _run(python: Path, peer: str, folder: Path) -> dict[str, Any]:
    output = _call([str(python), str(Path(__file__).with_name("peer.py")), peer, str(folder)], RUN_SECONDS)
    row: dict[str, Any] = json.loads(output.splitlines()[-1])
    return row


def _call(command: list[str], limit: float) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{' '.join(command[:4])}: {error}") from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise UserError(f"{' '.join(command[:4])}: {last}")
    return done.stdout
