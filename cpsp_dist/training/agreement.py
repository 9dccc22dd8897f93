"""What all ranks of a start have to agree on before the first step."""

from __future__ import annotations

from typing import Any

from cpsp_dist.config import Config, flat
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.distributed import process_group
from cpsp_dist.utils.errors import UserError

#: Where a machine keeps its copy is its own affair; the data itself is compared by its fingerprint.
OF_A_MACHINE = ("data.shards", "data.cache", "data.cache_gb")


def facts(config: Config, **flags: Any) -> dict[str, Any]:
    """Settings, output folder and flags of a start, by key: compared when the ranks meet."""
    return {key: value for key, value in (flat(config) | flags).items() if key not in OF_A_MACHINE}


def require_same_data(manifest: Manifest) -> None:
    """All ranks call it together.

    Raises:
        UserError: they opened different shards.
    """
    found = process_group.gather((manifest.fingerprint, manifest.place))
    for rank, (fingerprint, place) in enumerate(found):
        if fingerprint != found[0][0]:
            raise UserError(
                f"data.shards: rank {rank} opened other shards ({place}, fingerprint {fingerprint[:12]}) than rank 0 "
                f"({found[0][1]}, {found[0][0][:12]}); copy the same ones to all machines"
            )
