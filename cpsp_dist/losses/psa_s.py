"""PSA_S: the event segments of a video against its background (segment level)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cpsp_dist.losses.global_batch import take
from cpsp_dist.losses.objective import Context, Objective, Step
from cpsp_dist.models.layers import l2_normalize
from cpsp_dist.utils.registry import setting


def psa_s(fusion: Tensor, event: Tensor, temperature: float) -> Tensor:
    """Segment level: the event segments of a video are alike, and unlike its background.

    With c_ij the cosine of segments i and j, E the event and R the background segments of a video:
    mean over i in E of −log( P_i / (P_i + N_i) ), P_i = Σ_{j∈E} exp(c_ij/τ), N_i = mean_{j∈R} exp(c_ij/τ).
    0 for a video without event, or without background. fusion [B, T, D], event [B, T] bool -> [B].

    The published code sums over i in place of j, which leaves no gradient: see `psa_s_published`.
    """
    segments = l2_normalize(fusion)
    scaled = torch.bmm(segments, segments.transpose(1, 2)) / temperature  # [B, T, T]
    # Not -inf: a row of nothing but -inf has a gradient of NaN.
    lowest = torch.finfo(scaled.dtype).min / 4
    columns = event.unsqueeze(1)
    background = (~event).sum(1)
    log_p = torch.where(columns, scaled, lowest).logsumexp(2)
    log_n = torch.where(columns, lowest, scaled).logsumexp(2) - background.clamp(min=1).to(
        scaled.dtype
    ).log().unsqueeze(1)
    counted = event & (background > 0).unsqueeze(1)
    each = torch.where(counted, F.softplus(log_n - log_p), 0.0)  # −log(P/(P+N)) = log(1 + N/P)
    return each.sum(1) / event.sum(1).clamp(min=1)


def psa_s_published(fusion: Tensor, event: Tensor, temperature: float, *, rows: bool) -> Tensor:
    """PSA_S as the published code computes it, or, with `rows`, the same with the sums over the right axis.

    Either adds the constant −ln(1e-12) for each background segment. For comparison only. Shapes as in `psa_s`.
    """
    segments = l2_normalize(fusion)
    scaled = torch.bmm(segments, segments.transpose(1, 2)) / temperature
    inside = event.unsqueeze(1) & event.unsqueeze(2)
    across = ~event.unsqueeze(1) & event.unsqueeze(2)  # row: event, column: background
    axis = 2 if rows else 1
    background = (~event).sum(1, keepdim=True).clamp(min=1)
    p = torch.where(inside, scaled.exp(), 0.0).sum(axis)
    n = torch.where(across, scaled.exp(), 0.0).sum(axis) / background
    each = -(p / (p + n + 1e-12) + 1e-12).log()
    return torch.where(event.any(1), each.sum(1) / event.sum(1).clamp(min=1), 0.0)


@dataclass(frozen=True)
class PSASSettings:
    temperature: float = setting(0.6, "of PSA_S", gt=0)
    psa_s_form: Literal["rows", "published_rows", "published"] = setting(
        "rows", "published: sums over the wrong axis, no gradient; published_rows: right, plus a constant"
    )


class PSAS(Objective):
    weight = 0.01
    contrastive = True
    inputs = ("fusion",)
    segment_labels = True
    Settings = PSASSettings

    def __init__(self, settings: PSASSettings, context: Context) -> None:
        super().__init__(settings, context)
        self.settings = settings

    def __call__(self, step: Step) -> tuple[Tensor, Tensor]:
        form, temperature = self.settings.psa_s_form, self.settings.temperature
        fusion = take(step.output.fusion, step.rows)
        if form == "rows":
            values = psa_s(fusion, step.event, temperature)
        else:
            values = psa_s_published(fusion, step.event, temperature, rows=form == "published_rows")
        return values, step.batch.valid & step.batch.has_event
