"""What a rank is: where it runs, on which device, with which versions; and whether ranks can train together."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from cpsp_dist.distributed.devices import gpu_name
from cpsp_dist.distributed.store import hostname
from cpsp_dist.utils.hashing import text_sha256


@dataclass(frozen=True)
class Card:
    """One rank. device: "cpu" or "cuda"; gpu, uuid: "" on a CPU; gpus: visible to it."""

    host: str
    device: str
    gpu: str = ""
    uuid: str = ""
    gpus: int = 0
    versions: str = ""


def own_card(device: torch.device) -> Card:
    gpu, uuid = gpu_name(device)
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    return Card(hostname(), device.type, gpu, uuid, gpus, _versions())


@cache
def _versions() -> str:
    """Of torch, DeepSpeed and this program, its own by the text of its modules."""
    found = {"torch": torch.__version__, "deepspeed": "none"}
    with contextlib.suppress(PackageNotFoundError):
        found["deepspeed"] = version("deepspeed")
    package = Path(__file__).parents[1]
    modules = sorted(package.rglob("*.py"))
    code = text_sha256("".join(f"{path.relative_to(package)}\n{path.read_text('utf-8')}" for path in modules))
    return ", ".join(f"{name} {number}" for name, number in found.items()) + f", cpsp_dist {code[:12]}"


def judge(cards: Sequence[Card]) -> tuple[str, list[int]] | None:
    """Why these ranks, by rank, cannot train together, and which of them it is about; None where they can."""

    def at(rank: int) -> str:
        return f"rank {rank} ({cards[rank].host})"

    for rank, card in enumerate(cards):
        if card.device != cards[0].device:
            without, with_ = (rank, 0) if card.device == "cpu" else (0, rank)
            text = f"{at(without)} has no GPU, {at(with_)} has one ({cards[with_].gpu}); see `nvidia-smi` on "
            return f"{text}{cards[without].host}, or start without GPUs: CUDA_VISIBLE_DEVICES=", [without]
        if card.versions != cards[0].versions:
            text = f"{at(rank)} runs {card.versions}, {at(0)} runs {cards[0].versions}; install the same on all nodes"
            return text, [rank]
    users: dict[tuple[str, str], list[int]] = defaultdict(list)
    for rank, card in enumerate(cards):
        if card.uuid:
            users[card.host, card.uuid].append(rank)
    for (host, uuid), ranks in users.items():
        if len(ranks) > 1:
            text = f"{numbers(ranks)} share one GPU of {host} ({uuid}): start at most one rank for each"
            return f"{text}; under Slurm use --gpus-per-node, with as many tasks as GPUs", ranks[:1]
    return None


def idle_gpus(cards: Sequence[Card]) -> dict[str, int]:
    """Machine -> GPUs there that are visible but have no rank."""
    used: dict[str, set[str]] = defaultdict(set)
    for card in cards:
        used[card.host].add(card.uuid)
    visible = {card.host: card.gpus for card in cards}
    return {host: visible[host] - len(used[host]) for host in used if visible[host] > len(used[host])}


def numbers(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    summary = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return ("ranks " if len(ranks) > 1 else "rank ") + summary
