"""One peer's reading speed, measured in that peer's own environment: `python peer.py NAME FOLDER`.

Runs without this package: it needs NumPy and the peer alone. FOLDER holds `visual.npy` [N, …], `audio.npy` and
`label.npy` (and `shards`, our tars, for webdataset). The peer's own files are written beside them, then read in random
order, as batches of 64, by one process, as its documentation shows; memcpy of the same bytes is measured in between.
Prints one line of JSON.
"""

from __future__ import annotations

import itertools
import json
import pickle
import statistics
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH, ROUNDS = 64, 5
Sample = dict[str, np.ndarray]
Batches = Iterator[dict[str, Any]]


def samples(folder: Path) -> Iterator[Sample]:
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("visual", "audio", "label")}
    for row in range(len(arrays["label"])):
        yield {name: np.array(array[row]) for name, array in arrays.items()}


def stacked(stream: Iterator[Sample]) -> Batches:
    while batch := list(itertools.islice(stream, BATCH)):
        yield {name: np.stack([sample[name] for sample in batch]) for name in batch[0]}


def webdataset(folder: Path) -> Callable[[], Batches]:
    return plain_webdataset(sorted(str(path) for path in (folder / "shards").glob("*.tar")))


def plain_webdataset(urls: list[str]) -> Callable[[], Batches]:
    import webdataset as wds

    def read() -> Batches:
        data = wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).decode()
        return stacked({n: s[f"{n}.npy"] for n in ("visual", "audio", "label")} for s in data)

    return read


def published(folder: Path) -> Callable[[], Batches]:
    """VGGSound-AVEL100k's layout: for each video a zip of a pickled float64 array."""
    paths = []
    for number, sample in enumerate(samples(folder)):
        paths.append(folder / "published" / f"{number}.zip")
        paths[-1].parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(paths[-1], "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
            file.writestr("features.pkl", pickle.dumps({n: a.astype(np.float64) for n, a in sample.items()}))

    def load(path: Path) -> Sample:
        with zipfile.ZipFile(path) as file:
            sample: Sample = pickle.loads(file.read("features.pkl"))  # ours, from above
            return sample

    return lambda: stacked(load(path) for path in np.random.default_rng().permutation(np.array(paths)))


def mosaicml(folder: Path) -> Callable[[], Batches]:
    import streaming

    columns = {}
    with (folder / "mds-columns.json").open("w") as file:
        for name, array in next(samples(folder)).items():
            columns[name] = f"ndarray:{array.dtype}:{','.join(map(str, array.shape))}"
        json.dump(columns, file)
    with streaming.MDSWriter(out=str(folder / "mds"), columns=columns) as writer:
        for sample in samples(folder):
            writer.write(sample)
    data = streaming.StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=BATCH)
    return lambda: stacked(sample for sample in data)


def litdata(folder: Path) -> Callable[[], Batches]:
    import litdata

    litdata.optimize(
        fn=_litdata_sample,
        inputs=[(str(folder), row) for row in range(len(np.load(folder / "label.npy")))],
        output_dir=str(folder / "litdata"),
        chunk_bytes="64MB",
        num_workers=1,
    )
    data = litdata.StreamingDataset(str(folder / "litdata"), shuffle=True)
    return lambda: stacked(sample for sample in data)


def _litdata_sample(item: tuple[str, int]) -> Sample:
    folder, row = item
    return {n: np.array(np.load(Path(folder, f"{n}.npy"), mmap_mode="r")[row]) for n in ("visual", "audio", "label")}


PEERS = {"webdataset": webdataset, "published": published, "mosaicml": mosaicml, "litdata": litdata}


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    read = PEERS[name](folder)
    shapes = [np.load(folder / f"{n}.npy", mmap_mode="r") for n in ("visual", "audio", "label")]
    count, size = len(shapes[0]), sum(array[0].nbytes for array in shapes)
    source = np.random.default_rng(0).integers(0, 256, (count, size), np.uint8)
    target = np.zeros((4 * BATCH, size), np.uint8)
    ratios, rates, cpus = [], [], []
    for number in range(ROUNDS + 1):
        began = time.perf_counter()
        for row, slot in zip(source, itertools.cycle(target), strict=False):
            np.copyto(slot, row)
        memcpy = time.perf_counter() - began
        began, cpu = time.perf_counter(), time.process_time()
        got = sum(len(batch["label"]) for batch in read())
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        assert got == count, f"{name} delivered {got} of {count} samples"
        if number:
            ratios.append(memcpy / wall)
            rates.append(count / wall)
            cpus.append(1e3 * cpu / count)
    median = statistics.median
    row = {"memcpy_ratio": median(ratios), "samples_per_second": median(rates), "cpu_ms_per_sample": median(cpus)}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
