"""Tables in tiles: exactly what one table gives, forward and backward, and memory that does not grow with the pool."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cpsp_dist.bench.memory import peak_bytes
from cpsp_dist.losses import tiles
from cpsp_dist.losses.mining import mine
from cpsp_dist.losses.sspsp import sspsp
from cpsp_dist.losses.supcon import supcon
from cpsp_dist.models.layers import l2_normalize


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 7 columns."""
    monkeypatch.setattr(tiles, "TILE", 1)
    monkeypatch.setattr(tiles, "NARROWEST", 7)


def pool(count: int, width: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(count)
    rows = torch.randn(count, width, generator=g, dtype=torch.float64).to(dtype)
    return rows, torch.randint(0, 4, (count,), generator=g), torch.randint(0, count, (count,), generator=g)


def one_table(anchors: Tensor, own: Tensor, rows: Tensor, category: Tensor, video: Tensor, eta: float) -> Tensor:
    """SupCon with the complete table."""
    scaled = l2_normalize(anchors) @ l2_normalize(rows).t() / eta
    other = video[own].unsqueeze(1) != video
    positive = other & (category[own].unsqueeze(1) == category)
    log_share = scaled - scaled.masked_fill(~other, -torch.inf).logsumexp(1, keepdim=True)
    return -torch.where(positive, log_share, 0.0).sum(1) / positive.sum(1).clamp(min=1)


def compare(tiled: Any, plain: Any, *inputs: Tensor) -> None:
    """Values and the gradients of weighted values: 1e-12."""
    found = []
    for function in (tiled, plain):
        leaves = [x.clone().requires_grad_() for x in inputs]
        values = function(*leaves)
        (values * torch.arange(1.0, len(values) + 1, dtype=values.dtype)).sum().backward()
        found.append([values.detach(), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [2, 7, 8, 50])
def test_supcon_equals_one_table(narrow: None, count: int) -> None:
    rows, category, video = pool(count)
    own = torch.arange(0, count, 2)
    compare(
        lambda a, r: supcon(a, own, r, category, video, 0.1),
        lambda a, r: one_table(a, own, r, category, video, 0.1),
        rows[own],
        rows,
    )


@pytest.mark.parametrize("count", [1, 3, 20])
def test_sspsp_equals_one_table(narrow: None, count: int) -> None:
    g = torch.Generator().manual_seed(count)
    own, segments = torch.arange(0, count, 2), 3
    audio = torch.randn(len(own), segments, 5, generator=g, dtype=torch.float64)
    visual = torch.randn(count, segments, 5, generator=g, dtype=torch.float64)
    target = (own.unsqueeze(1) * segments + torch.arange(segments)).flatten()

    def plain(audio: Tensor, visual: Tensor) -> Tensor:
        scaled = l2_normalize(audio).flatten(0, 1) @ l2_normalize(visual).flatten(0, 1).t() / 0.1
        return F.cross_entropy(scaled, target, reduction="none").view(len(own), segments).mean(1)

    compare(lambda a, v: sspsp(a, own, v, 0.1), plain, audio, visual)


@pytest.mark.parametrize("semihard", [False, True])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_mined_rows_do_not_depend_on_tiles(monkeypatch: pytest.MonkeyPatch, k: int, semihard: bool) -> None:
    """On a grid, where many distances are equal: ties go to the earlier row across tiles too."""
    g = torch.Generator().manual_seed(k)
    rows = torch.randint(0, 3, (60, 3), generator=g).double()
    _, category, video = pool(60)
    own = torch.randperm(60, generator=g)[:20]
    one_tile = mine(rows[own], own, rows, category, video, k, semihard=semihard)
    monkeypatch.setattr(tiles, "TILE", 1)
    for width in (1, 4, 7, 59):
        monkeypatch.setattr(tiles, "NARROWEST", width)
        parts = mine(rows[own], own, rows, category, video, k, semihard=semihard)
        assert torch.equal(parts.positive, one_tile.positive)
        assert torch.equal(parts.mask, one_tile.mask)
        assert torch.equal(parts.negatives, one_tile.negatives)


@pytest.mark.parametrize(
    ("way", "count", "width"),
    [("supcon", 4096, 256), ("sspsp", 32768, 16), ("mine", 8192, 256)],
)
def test_memory_does_not_grow_with_the_pool(way: str, count: int, width: int) -> None:
    """Beyond the pool's rows and their gradient: the same at 4 times the pool, where one table is larger than that."""
    peaks, anchors = {}, 64
    for size in (count, 4 * count):
        rows, category, video = pool(size, width, torch.float32)
        own = torch.arange(anchors)
        if way == "mine":
            peaks[size] = peak_bytes(lambda: mine(rows[own], own, rows, category, video, 3))  # noqa: B023
            continue
        leaf = rows.view(-1, 4, width).requires_grad_() if way == "sspsp" else rows.requires_grad_()

        def both(leaf: Tensor = leaf, labels: Any = (category, video), own: Tensor = own) -> None:
            if way == "sspsp":
                sspsp(leaf[:16].detach(), torch.arange(16), leaf, 0.1).sum().backward()
            else:
                supcon(leaf[:anchors].detach(), own, leaf, *labels, 0.1).sum().backward()

        peaks[size] = peak_bytes(both) - size * width * 4
    assert peaks[4 * count] < 1.1 * peaks[count] + (1 << 20)
    assert peaks[4 * count] < 4 * count * max(anchors, width) * 4 * 4


def test_tiles_are_larger_on_a_gpu() -> None:
    """A tile's kernels cost some 20 µs each to launch there: 200 tiles of SSPSP took 183 ms on an H200, 13 take 34."""
    widths = [tiles.tile_width(640, torch.device(kind)) for kind in ("cpu", "cuda")]
    assert widths == [1638, 26214]
    assert len([*tiles.columns(640, 327_680, torch.device("cuda"))]) == 13
