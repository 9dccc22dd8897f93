"""The objectives by plain loops over their definitions."""

from __future__ import annotations

import math

from torch import Tensor

from cpsp_dist.config import ObjectiveSettings
from cpsp_dist.data.batch import Batch
from cpsp_dist.losses.psa_v import video_embedding
from cpsp_dist.models import Output


def cosine(x: Tensor, y: Tensor) -> float:
    return (x @ y / (x.norm() * y.norm())).item()


CONTRASTIVE = ("avps", "psa_s", "psa_v", "sspsp", "contrast")


def slow_psa_s(fusion: Tensor, event: Tensor, temperature: float) -> float:
    inside = [t for t in range(len(event)) if event[t]]
    outside = [t for t in range(len(event)) if not event[t]]
    if not inside or not outside:
        return 0.0
    total = 0.0
    for i in inside:
        p = sum(math.exp(cosine(fusion[i], fusion[j]) / temperature) for j in inside)
        n = sum(math.exp(cosine(fusion[i], fusion[j]) / temperature) for j in outside) / len(outside)
        total += -math.log(p / (p + n))
    return total / len(inside)


def slow_mine(
    rows: Tensor, category: list[int], video: list[int], k: int, semihard: bool = False
) -> list[tuple[int, list[int]]]:
    found = []
    for i in range(len(rows)):
        distances = [float((rows[i] - rows[j]).square().sum()) for j in range(len(rows))]
        others = [j for j in range(len(rows)) if j != i and video[j] != video[i]]
        positives = [j for j in others if category[j] == category[i]]
        negatives = [j for j in others if category[j] != category[i]]
        positive = min(positives, key=lambda j: (-distances[j], j)) if positives else i
        beyond = [j for j in negatives if not positives or distances[j] > distances[positive]]
        if semihard and not beyond:
            hardest = sorted(negatives, key=lambda j: (-distances[j], j))
        else:
            hardest = sorted(beyond if semihard else negatives, key=lambda j: (distances[j], j))
        found.append((positive, sorted(hardest[:k])))
    return found


def slow_supcon(rows: Tensor, category: list[int], video: list[int], temperature: float) -> list[float]:
    values = []
    for i in range(len(rows)):
        others = [j for j in range(len(rows)) if video[j] != video[i]]
        positives = [j for j in others if category[j] == category[i]]
        if positives:
            total = sum(math.exp(cosine(rows[i], rows[j]) / temperature) for j in others)
            shares = [math.exp(cosine(rows[i], rows[j]) / temperature) / total for j in positives]
            values.append(-sum(math.log(share) for share in shares) / len(shares))
    return values


def slow_sspsp(audio: Tensor, visual: Tensor, temperature: float) -> list[float]:
    heard, seen = audio.flatten(0, 1), visual.flatten(0, 1)
    values = []
    for i in range(len(heard)):
        each = [math.exp(cosine(heard[i], seen[j]) / temperature) for j in range(len(seen))]
        values.append(-math.log(each[i] / sum(each)))
    return values


def slow_gate(gate: Tensor, event: Tensor) -> float:
    each = [-math.log(g if e else 1 - g) for g, e in zip(gate.tolist(), event.tolist(), strict=True)]
    return sum(each) / len(each)


def slow_contrast(views: Tensor, event: Tensor, temperature: float) -> float:
    """views [2, T, D]: over all segments of both views."""
    segments = [(view, t) for view in range(2) for t in range(len(event))]
    values = []
    for i in segments:
        others = [j for j in segments if j != i]
        alike = [j for j in others if (j[1] == i[1] and j[0] != i[0]) or (event[i[1]] and event[j[1]])]
        near, total = (sum(math.exp((views[i] @ views[j]).item() / temperature) for j in js) for js in (alike, others))
        values.append(-math.log(near / len(alike) / total))
    return sum(values) / len(values)


def slow_presence(logits: list[float], present: bool, top: int) -> float:
    """Of segments that are surely events, or surely background."""
    each = (
        [math.log1p(math.exp(-x)) for x in sorted(logits)[-top:]]
        if present
        else [math.log1p(math.exp(x)) for x in logits]
    )
    return sum(each) / len(each)


def slow_weak_category(logits: Tensor, category: int, published: bool) -> float:
    shares = logits.softmax(0).tolist()
    if not published:
        return -math.log(shares[category])
    sigmoids = [1 / (1 + math.exp(-share)) for share in shares]
    return -sum(math.log(x if k == category else 1 - x) for k, x in enumerate(sigmoids)) / len(shares)


def slow_terms(output: Output, batch: Batch, s: ObjectiveSettings, weak: bool) -> dict[str, float]:
    """Every objective of a batch on one process, by loops."""
    valid = [b for b in range(len(batch)) if batch.valid[b]]
    with_event = [b for b in valid if batch.event[b].any()]
    classed = [b for b in valid if batch.category[b] >= 0] if weak else with_event
    event = [
        math.log1p(math.exp(-x)) if batch.event[b, t] else math.log1p(math.exp(x))
        for b in valid
        for t, x in enumerate(output.event_logits[b].tolist())
    ]
    if weak and s.weak_category != "ungated":
        logits, published = output.video_logits.detach(), s.weak_category == "published"
        category = [slow_weak_category(logits[b], int(batch.category[b]), published) for b in classed]
    else:
        category = [-output.category_logits[b].log_softmax(0)[batch.category[b]].item() for b in classed]
    pairs = []
    for b in valid:
        positive = output.similarity[b].clamp(min=0)
        share = positive / (positive.sum() + 1e-8)
        target = batch.event[b].double() / (batch.event[b].sum().double() + 1e-6)
        pairs.append((share - target).square().mean().item())
    segments = [slow_psa_s(output.fusion[b], batch.event[b], s.temperature) for b in with_event]
    rows = video_embedding(output.fusion[classed]).detach()
    classes, videos = batch.category[classed].tolist(), batch.video[classed].tolist()
    if s.mining == "supcon":
        videowise = slow_supcon(rows, classes, videos, s.supcon_temperature)
    else:
        videowise = []
        k = max(1, round(s.negatives * len(rows) / 64)) if s.mining == "proportional" else s.negatives
        for i, (positive, negatives) in enumerate(slow_mine(rows, classes, videos, k, s.mining == "semihard")):
            if negatives:
                d_p = max((rows[i] - rows[positive]).norm().item(), 1e-6)
                d_n = sum((rows[i] - rows[j]).norm().item() for j in negatives) / len(negatives)
                videowise.append(max(0.0, d_p - d_n + s.margin))
    apart = [-output.modality_logits[b].log_softmax(0)[batch.category[b]].item() for b in classed]
    across = slow_sspsp(output.audio[valid].detach(), output.visual[valid].detach(), s.sspsp_temperature)
    values = {
        "event": event,
        "category": category,
        "presence": [
            slow_presence(output.event_logits[b].tolist(), bool(batch.event[b].any()), s.presence_top) for b in valid
        ],
        "avps": pairs,
        "psa_s": segments,
        "psa_v": videowise,
        "sspsp": across,
        "gate": [slow_gate(output.gate[b], batch.event[b]) for b in valid],
        "modality": apart,
        "contrast": [slow_contrast(output.views[b], batch.event[b], s.contrast_temperature) for b in valid],
    }
    return {name: sum(each) / max(len(each), 1) for name, each in values.items() if getattr(s, name)}
