"""The objectives, and their exact sum over ranks.

Each objective is a small function that gives one value a video (or an anchor), so that `Objectives` can add them up
over the real rows of this rank and divide by the count over all ranks:

    rank loss = W · (sum over this rank's rows) / (count over all ranks)

The mean over ranks of these losses, and of their gradients (what DDP and DeepSpeed compute), is the loss of one
process that has the whole global batch. Padding rows are taken out before anything is computed.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cpsp_dist.batch import Batch
from cpsp_dist.config import ObjectiveSettings
from cpsp_dist.models.parts import Output, unit
from cpsp_dist.pool import Members, Mined, embed, gather, mine, share_members


def event_loss(event_logits: Tensor, event: Tensor) -> Tensor:
    """Binary cross entropy of each segment, mean over T. logits [B, T], event [B, T] bool -> [B]."""
    return F.binary_cross_entropy_with_logits(event_logits, event.to(event_logits.dtype), reduction="none").mean(1)


def category_loss(category_logits: Tensor, category: Tensor) -> Tensor:
    """Cross entropy; 0 for a video without class (-1). logits [B, K], category [B] -> [B].

    Weakly supervised the logits are the video's: the largest over its segments of sigmoid(event) · category logits.
    """
    return F.cross_entropy(category_logits, category, ignore_index=-1, reduction="none")


def weak_category_loss_published(video_logits: Tensor, category: Tensor) -> Tensor:
    """Weak supervision as published: `MultiLabelSoftMarginLoss` of softmax(logits), which it takes for logits.

    Sigmoids of probabilities lie between 0.5 and 0.73, so that even a perfect answer costs 0.69 − 0.38/K. For
    comparison; the default is the cross entropy of the same softmax. logits [B, K], category [B] (-1: gives 0) -> [B].
    """
    target = F.one_hot(category.clamp(min=0), video_logits.shape[1]).to(video_logits.dtype)
    values = F.multilabel_soft_margin_loss(video_logits.softmax(1), target, reduction="none")
    return torch.where(category >= 0, values, 0.0)


def avps(similarity: Tensor, event: Tensor) -> Tensor:
    """Pair level: mean over T of (s/Σs − g/Σg)², s = relu(similarity), g the event mask (paper, eq. 8 and 9).

    A video without event has the target zero for each segment: no pair of it should be alike. similarity [B, T],
    event [B, T] bool -> [B].
    """
    positive = F.relu(similarity)
    target = event.to(similarity.dtype)
    share = positive / (positive.sum(1, keepdim=True) + 1e-8)
    return (share - target / (target.sum(1, keepdim=True) + 1e-6)).square().mean(1)


def psa_s(fusion: Tensor, event: Tensor, temperature: float) -> Tensor:
    """Segment level: the event segments of a video are alike, and unlike its background.

    With c_ij the cosine of segments i and j, E the event and R the background segments of a video:
    mean over i in E of −log( P_i / (P_i + N_i) ), P_i = Σ_{j∈E} exp(c_ij/τ), N_i = mean_{j∈R} exp(c_ij/τ).
    0 for a video without event, or without background. fusion [B, T, D], event [B, T] bool -> [B].

    The published code sums over i in place of j, which leaves no gradient: see `psa_s_published`.
    """
    segments = unit(fusion)
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
    segments = unit(fusion)
    scaled = torch.bmm(segments, segments.transpose(1, 2)) / temperature
    inside = event.unsqueeze(1) & event.unsqueeze(2)
    across = ~event.unsqueeze(1) & event.unsqueeze(2)  # row: event, column: background
    axis = 2 if rows else 1
    background = (~event).sum(1, keepdim=True).clamp(min=1)
    p = torch.where(inside, scaled.exp(), 0.0).sum(axis)
    n = torch.where(across, scaled.exp(), 0.0).sum(axis) / background
    each = -(p / (p + n + 1e-12) + 1e-12).log()
    return torch.where(event.any(1), each.sum(1) / event.sum(1).clamp(min=1), 0.0)


def psa_v(anchors: Tensor, rows: Tensor, mined: Mined, margin: float, *, silent: int = 0) -> Tensor:
    """Video level, margin form: relu( d(anchor, positive) − mean of d(anchor, negatives) + margin ).

    The distances of the mined pairs alone are computed, by direct difference: exact where the matrix form cancels, and
    O(A·(1+k)·D) to keep for the backward pass. 0 for an anchor without negatives. anchors [A, D], rows [N, D] -> [A].

    Args:
        silent: anchors with fewer negatives than this give 0 too (the published code: k, by a distance of 1e12).
    """
    to_positive = _distance(anchors, rows[mined.positive])
    to_negatives = torch.where(mined.chosen, _distance(anchors.unsqueeze(1), rows[mined.negatives]), 0.0)
    found = mined.chosen.sum(1)
    hinge = F.relu(to_positive - to_negatives.sum(1) / found.clamp(min=1) + margin)
    return torch.where((found > 0) & (found >= silent), hinge, 0.0)


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean, at least 1e-6 (as published), so that its gradient is zero and not infinite where x = y."""
    return (x - y).square().sum(-1).clamp(min=1e-12).sqrt()


def supcon(anchors: Tensor, own: Tensor, rows: Tensor, category: Tensor, video: Tensor, temperature: float) -> Tensor:
    """Video level, supervised-contrastive form: a reconstruction, as the published code names one and has none.

    Mean over the positives p of −log( exp(c_p/η) / Σ_j exp(c_j/η) ), c the cosine with the anchor, j over the pool
    without the anchor and other rows of its video (SupCon, Khosla et al. 2020, L_out). 0 for an anchor without
    positive. anchors [A, D]; own [A], their indices in the pool; rows [N, D], category [N], video [N]: the pool -> [A].
    """
    scaled = unit(anchors) @ unit(rows).t() / temperature
    other = video[own].unsqueeze(1) != video
    positive = other & (category[own].unsqueeze(1) == category)
    # The zero column keeps an empty pool, and an anchor that is alone, from having no largest value.
    lowest = torch.finfo(scaled.dtype).min / 4
    padded = F.pad(torch.where(other, scaled, lowest), (0, 1), value=lowest)
    log_share = scaled - padded.logsumexp(1, keepdim=True)
    found = positive.sum(1)
    return -torch.where(positive, log_share, 0.0).sum(1) / found.clamp(min=1)


def sspsp(audio: Tensor, own: Tensor, visual: Tensor, temperature: float) -> Tensor:
    """Self-supervised: each audio segment finds the visual segment of its second among all of the pool.

    Mean over T of −log( exp(c_own/τ) / Σ_j exp(c_j/τ) ), c the cosine with the audio segment. audio [B, T, D];
    own [B], the videos' indices in the pool; visual [N, T, D], the pool -> [B].
    """
    videos, segments, width = audio.shape
    scaled = unit(audio).reshape(-1, width) @ unit(visual).reshape(-1, width).t() / temperature  # [B·T, N·T]
    target = own.unsqueeze(1) * segments + torch.arange(segments, device=own.device)
    return F.cross_entropy(scaled, target.flatten(), reduction="none").view(videos, segments).mean(1)


class Objectives:
    """The weighted sum of the objectives that are switched on, scaled as described at the top of this file.

    Makes the same collectives on every rank at every call: one of integers, and one more each for PSA_V and SSPSP over
    the gathered pool.
    """

    def __init__(
        self,
        settings: ObjectiveSettings,
        *,
        pool: Literal["gather", "local"],
        supervision: Literal["full", "weak"] = "full",
    ) -> None:
        self.settings = settings
        self.pool = pool
        self.weak = supervision == "weak"

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's scaled loss, and each of its terms (unweighted, scaled, detached) by name, `total` among them.

        The mean of a term over the ranks is its value over the global batch.
        """
        with torch.autocast(batch.valid.device.type, enabled=False):
            terms = self._terms(Output._make(None if x is None else _precise(x) for x in output), batch)
            weighted = [getattr(self.settings, name) * value for name, value in terms.items()]
            # A classifier whose objective is off gets a gradient of zero all the same: DDP and ZeRO wait for it.
            total = sum(weighted, 0 * (output.event_logits.sum() + output.category_logits.sum()))
        return total, {name: value.detach() for name, value in terms.items()} | {"total": total.detach()}

    def _terms(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        settings = self.settings
        has_event, category = batch.event.any(1), batch.category
        if not self.weak:
            # A video that is background throughout shows nothing of its category.
            category = torch.where(has_event, category, 0 if settings.background == "published" else -1)
        members = share_members(batch.valid, category, batch.video, has_event)
        rows = batch.valid.nonzero().squeeze(1)
        event, category = batch.event[rows], category[rows]

        def mean(values: Tensor, counted: Tensor) -> Tensor:
            """W · sum here / count everywhere. values [rows of this rank], counted [W·b] bool."""
            return members.ranks * values.sum() / counted.sum().clamp(min=1)

        terms: dict[str, Tensor] = {}
        if settings.event:
            terms["event"] = mean(event_loss(output.event_logits[rows], event), members.valid)
        if settings.category and self.weak:
            assert output.video_logits is not None
            loss = weak_category_loss_published if settings.weak_category == "published" else category_loss
            terms["category"] = mean(loss(output.video_logits[rows], category), members.pooled)
        elif settings.category:
            terms["category"] = mean(category_loss(output.category_logits[rows], category), members.pooled)
        if settings.avps:
            terms["avps"] = mean(avps(output.similarity[rows], event), members.valid)
        if settings.psa_s:
            values = self._psa_s(output.fusion[rows], event)
            terms["psa_s"] = mean(values, members.valid & members.event)
        if settings.psa_v:
            terms["psa_v"] = mean(*self._psa_v(embed(output.fusion), members))
        if settings.sspsp:
            visual, own = self._pool(output.visual, members, members.valid)
            terms["sspsp"] = mean(sspsp(output.audio[rows], own, visual, settings.sspsp_temperature), members.valid)
        return terms

    def _psa_s(self, fusion: Tensor, event: Tensor) -> Tensor:
        form, temperature = self.settings.psa_s_form, self.settings.temperature
        if form == "rows":
            return psa_s(fusion, event, temperature)
        return psa_s_published(fusion, event, temperature, rows=form == "published_rows")

    def _psa_v(self, embeddings: Tensor, members: Members) -> tuple[Tensor, Tensor]:
        """embeddings [b, D] of all slots -> values [A], and which slots [W·b] count."""
        settings = self.settings
        pool, own = self._pool(embeddings, members, members.pooled)
        category, video = (self._pool_labels(x, members) for x in (members.category, members.video))
        anchors = embeddings[members.pooled[members.own]]
        if settings.mining == "supcon":
            values = supcon(anchors, own, pool, category, video, settings.supcon_temperature)
            return values, members.with_positive(self.pool)
        mined = mine(anchors, own, pool, category, video, settings.negatives)
        if settings.few_negatives == "published":
            return psa_v(anchors, pool, mined, settings.margin, silent=settings.negatives), members.pooled
        return psa_v(anchors, pool, mined, settings.margin), members.with_negative(self.pool)

    def _pool(self, slots: Tensor, members: Members, kept: Tensor) -> tuple[Tensor, Tensor]:
        """slots [b, …] of this rank, kept [W·b] -> the kept slots of the pool [N, …], and where ours are in it."""
        ours = kept[members.own]
        if self.pool == "gather":
            return gather(slots)[kept], (kept.cumsum(0) - 1)[members.own][ours]
        return slots[ours], torch.arange(int(ours.sum()), device=slots.device)

    def _pool_labels(self, labels: Tensor, members: Members) -> Tensor:
        """labels [W·b] -> [N]: of the rows that `_pool` gives for `members.pooled`."""
        if self.pool == "gather":
            return labels[members.pooled]
        return labels[members.own][members.pooled[members.own]]


def _precise(x: Tensor) -> Tensor:
    """At least float32: bf16 distances change a quarter of the mined sets."""
    return x if x.dtype == torch.float64 else x.float()
