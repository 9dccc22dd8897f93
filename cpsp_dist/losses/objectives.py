"""The objectives, and their exact sum over ranks.

Each objective is a small function that gives one value a video (or an anchor), so that `Objectives` can add them up
over the real rows of this rank and divide by the count over all ranks:

    rank loss = W · (sum over this rank's rows) / (count over all ranks)

The mean over ranks of these losses, and of their gradients (what DDP and DeepSpeed compute), is the loss of one
process that has the whole global batch. Padding rows are taken out before anything is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cpsp_dist.config import ObjectiveSettings
from cpsp_dist.data.batch import Batch
from cpsp_dist.distributed.process_group import sum_over_ranks
from cpsp_dist.losses.pool import Bank, Gather, Members, Mined, Rows, Traffic, embed, health, mine, share_members
from cpsp_dist.models.parts import Output, unit

#: The published batch: `mining: proportional` takes the published share of negatives, `negatives` of so many rows.
PUBLISHED_POOL = 64
#: What `Objectives.health` tells.
HEALTH = (
    "size",
    "remembered",
    "anchors_with_positive",
    "active_hinges",
    "positive_distance",
    "negative_distance",
    "suspected_false_negatives",
    "gather_ms",
    "gather_bytes",
)


#: Which objectives take which output of a network (`video_logits`: weak supervision).
TERMS_OF = {
    "event_logits": ("event",),
    "category_logits": ("category",),
    "video_logits": ("category",),
    "fusion": ("psa_s", "psa_v"),
    "audio": ("sspsp",),
    "visual": ("sspsp",),
    "similarity": ("avps",),
}


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


def over_ranks(values: Tensor, counted: Tensor, members: Members) -> Tensor:
    """W · sum here / count everywhere. values: of what this rank counts; counted [W·b] bool: all slots that count."""
    return members.ranks * values.sum() / counted.sum().clamp(min=1)


class Objectives:
    """The weighted sum of the objectives that are switched on, scaled as described at the top of this file.

    Makes the same collectives on every rank at every call: one each for PSA_V and SSPSP over the gathered pool, under
    way while the other objectives are computed, and one of integers. In training order: a `bank` remembers.
    """

    def __init__(
        self,
        settings: ObjectiveSettings,
        *,
        pool: Literal["gather", "local"],
        bank: int = 0,
        supervision: Literal["full", "weak"] = "full",
    ) -> None:
        """pool: what PSA_V and SSPSP compare with; bank: rows of earlier steps that PSA_V's gathered pool also has."""
        self.settings = settings
        self.pool = pool
        self.bank = Bank(bank) if bank and settings.psa_v else None
        self.weak = supervision == "weak"
        self._device, self.traffic = torch.device("cpu"), Traffic()
        self._health: Callable[[], dict[str, tuple[Tensor, Tensor]]] = dict

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

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep, the same on every rank and for any number of ranks."""
        return {} if self.bank is None else self.bank.state()

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""
        if self.bank is not None:
            self.bank.load(state)

    def health(self) -> dict[str, float]:
        """How the pool did at the last call and its backward pass, over all ranks, which call this together.

        pool/ size: rows that an anchor is compared with; remembered: those of the bank; anchors_with_positive: share
        of anchors with another video of their class in the pool; active_hinges: share of counted anchors that the
        margin holds; positive_distance, negative_distance: means over hardest positives and mined negatives;
        suspected_false_negatives: see `pool.health`; gather_ms: waited for collectives; gather_bytes: received by a
        rank. A share of nothing is left out.
        """
        names = [f"pool/{name}" for name in HEALTH]
        found = self._health()
        traffic = {"gather_ms": self.traffic.milliseconds(), "gather_bytes": float(self.traffic.bytes)}
        pairs = [(traffic[name], 1.0) if name in traffic else found.get(name, (0.0, 0.0)) for name in HEALTH]
        sums = torch.tensor([[float(x) for x in pair] for pair in pairs], dtype=torch.float64)
        sums = sum_over_ranks(sums.to(self._device))
        return {name: total / count for name, (total, count) in zip(names, sums.tolist(), strict=True) if count}

    def _terms(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        settings = self.settings
        has_event, category = batch.event.any(1), batch.category
        if not self.weak:
            # A video that is background throughout shows nothing of its category.
            category = torch.where(has_event, category, 0 if settings.background == "published" else -1)
        self._device, self.traffic = batch.valid.device, Traffic()
        embeddings = embed(output.fusion) if settings.psa_v else None
        gathered = None if embeddings is None else self._gather(embeddings)
        visual = self._gather(output.visual) if settings.sspsp else None
        members = share_members(batch.valid, category, batch.video, has_event, self.traffic)
        rows = batch.valid.nonzero().squeeze(1)
        event, category = batch.event[rows], category[rows]

        terms: dict[str, Tensor] = {}
        if settings.event:
            terms["event"] = over_ranks(event_loss(output.event_logits[rows], event), members.valid, members)
        if settings.category and self.weak:
            assert output.video_logits is not None
            loss = weak_category_loss_published if settings.weak_category == "published" else category_loss
            terms["category"] = over_ranks(loss(output.video_logits[rows], category), members.pooled, members)
        elif settings.category:
            values = category_loss(output.category_logits[rows], category)
            terms["category"] = over_ranks(values, members.pooled, members)
        if settings.avps:
            terms["avps"] = over_ranks(avps(output.similarity[rows], event), members.valid, members)
        if settings.psa_s:
            values = self._psa_s(output.fusion[rows], event)
            terms["psa_s"] = over_ranks(values, members.valid & members.event, members)
        if embeddings is not None and gathered is not None:
            terms["psa_v"] = over_ranks(*self._psa_v(embeddings, gathered, members), members)
        if visual is not None:
            seen, own = self._pool(visual, members.valid, members)
            values = sspsp(output.audio[rows], own, seen, settings.sspsp_temperature)
            terms["sspsp"] = over_ranks(values, members.valid, members)
        return terms

    def _psa_s(self, fusion: Tensor, event: Tensor) -> Tensor:
        form, temperature = self.settings.psa_s_form, self.settings.temperature
        if form == "rows":
            return psa_s(fusion, event, temperature)
        return psa_s_published(fusion, event, temperature, rows=form == "published_rows")

    def _psa_v(self, slots: Tensor, gathered: Gather | Tensor, members: Members) -> tuple[Tensor, Tensor]:
        """slots [b, D]: this rank's embeddings, and what `_gather` made of them -> values [A], which slots count."""
        settings, kept = self.settings, members.pooled
        fresh, own = self._pool(gathered, kept, members)
        where = slice(None) if self.pool == "gather" else members.own
        pool = now = Rows(fresh, *(x[where][kept[where]] for x in (members.category, members.video)))
        remembered = None
        if self.bank is not None:
            remembered = self.bank.besides(members, like=fresh)
            pool = Rows(*(torch.cat(pair) for pair in zip(now, remembered, strict=True)))
            self.bank.put(now)
        anchors, mined = slots[kept[members.own]], None
        if settings.mining == "supcon":
            values, counted = supcon(anchors, own, *pool, settings.supcon_temperature), members.with_positive
        else:
            k = settings.negatives
            if settings.mining == "proportional":
                k = max(1, round(k * len(pool.rows) / PUBLISHED_POOL))
            mined = mine(anchors, own, *pool, k, semihard=settings.mining == "semihard")
            silent = k if settings.few_negatives == "published" else 0
            values, counted = psa_v(anchors, pool.rows, mined, settings.margin, silent=silent), members.with_negative
        self._remember_health(anchors, own, pool, mined, values, remembered)
        if settings.few_negatives == "published" and mined is not None:
            return values, kept
        return values, counted(self.pool, remembered)

    def _remember_health(
        self, anchors: Tensor, own: Tensor, pool: Rows, mined: Mined | None, values: Tensor, remembered: Rows | None
    ) -> None:
        """Keep what `health` needs to tell; it is computed when asked for."""
        anchors, values = anchors.detach(), values.detach()
        pool = pool._replace(rows=pool.rows.detach())

        def tell() -> dict[str, tuple[Any, Any]]:
            found: dict[str, tuple[Any, Any]] = dict(health(anchors, own, pool, mined))
            found["size"] = len(pool.rows), 1
            if remembered is not None:
                found["remembered"] = len(remembered.rows), 1
            if mined is not None:
                found["active_hinges"] = (values > 0).sum(), mined.chosen.any(1).sum()
            return found

        self._health = tell

    def _gather(self, slots: Tensor) -> Gather | Tensor:
        """slots [b, …] of this rank: every rank's, on the way; with local pools themselves."""
        return Gather(slots, self.traffic) if self.pool == "gather" else slots

    def _pool(self, slots: Gather | Tensor, kept: Tensor, members: Members) -> tuple[Tensor, Tensor]:
        """What `_gather` gave, kept [W·b] -> the kept slots of the pool [N, …], and where ours are in it."""
        if isinstance(slots, Gather):
            return slots.wait()[kept], members.places(kept)
        ours = slots[kept[members.own]]
        return ours, torch.arange(len(ours), device=ours.device)


def _precise(x: Tensor) -> Tensor:
    """At least float32: bf16 distances change a quarter of the mined sets."""
    return x if x.dtype == torch.float64 else x.float()
