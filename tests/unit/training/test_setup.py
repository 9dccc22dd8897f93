"""What a training is put together from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cpsp_dist.config import Config
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.training.setup import open_eval_stream
from tests.support.tiny_shards import write_shards


@pytest.mark.parametrize(("world", "slots"), [(1, 5), (2, 3)])
def test_a_small_split_is_evaluated_without_empty_slots(tmp_path: Path, world: int, slots: int) -> None:
    """What is padded is computed: 59 of the 64 slots of a batch."""
    manifest = write_shards(tmp_path / "shards", {"train": [4], "val": [5]}).manifest
    config = Config.model_validate({"data": {"shards": "-"}})
    with open_eval_stream(config, manifest, "val", Ranks(0, world, 0, torch.device("cpu"))) as stream:
        assert [len(batch) for batch in stream] == [slots]
