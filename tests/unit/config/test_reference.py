"""The page of all settings: generated, complete, with a meaning for each."""

from __future__ import annotations

from cpsp_dist.config import Config, flat
from cpsp_dist.config.reference import reference
from tests.support.environment import REPO


def rows() -> dict[str, list[str]]:
    """key -> the other cells of its line."""
    lines = [line.replace("\\|", "/") for line in reference().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_the_committed_page_is_the_generated_one() -> None:
    """Otherwise: python -m cpsp_dist.config.reference > docs/configuration.md"""
    assert (REPO / "docs" / "configuration.md").read_text(encoding="utf-8") == reference()


def test_every_setting_is_listed_with_a_meaning() -> None:
    settings = flat(Config.model_validate({"data": {"shards": "x"}}))
    assert rows().keys() == settings.keys()
    assert [key for key, cells in rows().items() if not (len(cells) == 3 and all(cells))] == []


def test_types_bounds_and_defaults() -> None:
    assert rows()["train.milestones"][:2] == ["list of integers", "`[10, 20, 30]`"]
    assert rows()["train.grad_clip_norm"][:2] == ["number or null, > 0", "`0.1`"]
    assert rows()["model.threshold"][:2] == ["number, ≥ 0, < 1", "`0.099`"]
    assert rows()["pool.scope"][:2] == ["`gather`, `local`", '`"gather"`']
    assert rows()["data.shards"][1] == "required"
