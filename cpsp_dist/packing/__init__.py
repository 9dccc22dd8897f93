"""Packing: features in a published layout become tar shards and a manifest.

What writes shards or works on finished ones belongs here. `source.py` is the interface between a layout and the packer,
and one file for each layout implements it. `plan.py` decides what goes where, `write.py` writes a shard, `index.py`
reads it back into table rows, `pack.py` runs it all. `verify.py` and `preview.py` look at finished shards, `rework.py`
makes others of them.

To add a layout: write a file with a class that takes `SourceOptions` and is a `source.Source`, and name it in the
table. If it has a csv of videos, it is a `per_video.PerVideo`, and all to write is an `ArrayStore`: where a video's
array is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpsp_dist.utils.registry import Registry

if TYPE_CHECKING:
    from cpsp_dist.packing.source import Source

LAYOUTS: Registry[type[Source]] = Registry(
    "cpsp_dist.packing",
    {
        "ave-h5": ("ave_h5:AveH5", "AVE: visual_feature.h5, audio_feature.h5, right_labels.h5, *_order.h5"),
        "ave-pickles": ("ave_pickles:AvePickles", "AVE with visual maps as {split}/{id}.pkl, the rest in h5 files"),
        "avel100k-zip": (
            "avel100k_zip:Avel100kZip",
            "VGGSound-AVEL100k: a csv, and a zipped pickle for each video",
        ),
        "npy": ("npy_files:NpyFiles", "a csv, and {id}.npy for each video in folders of visual, audio, labels"),
        "h5-by-id": ("h5_by_id:H5Files", "a csv, and h5 files keyed by video id"),
        "packed": ("packed:Packed", "a folder of shards, to pack it with other options"),
    },
)
