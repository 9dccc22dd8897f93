"""A training step as the published code takes it, to measure ours against: PSP's forward pass and its losses, operator
for operator, on the weights of our network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cpsp_dist.data.batch import Batch
from cpsp_dist.losses.avps import avps
from cpsp_dist.losses.event import event_loss
from cpsp_dist.losses.psa_s import psa_s_published
from cpsp_dist.models.layers import AudioGuidedAttention, Output
from cpsp_dist.models.psp import PSP


def published_forward(network: PSP, visual: Tensor, audio: Tensor) -> Output:
    """[B, T, 7, 7, C], [B, T, 128] in the network's type -> as `network(visual, audio)`, fully supervised."""
    audio = network.fa(audio)
    audio, visual = (
        network.lstm_audio(audio)[0],
        network.lstm_video(network.fv(_attention(network, visual, audio)))[0],
    )
    audio, visual = _propagation(network, audio, visual)
    fusion = (audio + visual) / 2
    event = network.classifier.event(fusion).squeeze(-1)
    category = network.classifier.category(fusion.mean(1))
    similarity = (F.normalize(audio, dim=-1) * F.normalize(visual, dim=-1)).sum(-1)
    return Output(event, category, None, fusion, audio, visual, similarity, None)


def _attention(network: PSP, visual: Tensor, audio: Tensor) -> Tensor:
    layers = network.attention
    assert isinstance(layers, AudioGuidedAttention)
    videos, segments, *_, channels = visual.shape
    maps = visual.reshape(videos * segments, -1, channels)
    scores = layers.affine_v(F.relu(layers.affine_video(maps)))
    sounds = F.relu(layers.affine_audio(audio.reshape(videos * segments, -1)))
    scores = scores + layers.affine_g(sounds).unsqueeze(2)
    weights = F.softmax(layers.affine_h(torch.tanh(scores)).squeeze(2), dim=-1).unsqueeze(1)
    return torch.bmm(weights, maps).view(videos, segments, channels)


def _propagation(network: PSP, audio: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
    layers = network.propagation
    dropout = layers.dropout

    def branch(layer: torch.nn.Module, x: Tensor) -> Tensor:
        found: Tensor = dropout(F.relu(layer(x)))
        return found

    v1, v2, a1, a2 = (
        branch(layer, x)
        for layer, x in ((layers.v_L1, visual), (layers.v_L2, visual), (layers.a_L1, audio), (layers.a_L2, audio))
    )
    beta = F.relu(torch.bmm(v2, a1.permute(0, 2, 1)) / v2.shape[-1] ** 0.5)
    from_audio = torch.bmm(_pruned(beta, layers.threshold), a2)
    from_visual = torch.bmm(_pruned(beta.permute(0, 2, 1), layers.threshold), v1)
    visual = layers.layer_norm(branch(layers.v_fc, visual + from_audio))
    audio = layers.layer_norm(branch(layers.a_fc, audio + from_visual))
    return audio, visual


def _pruned(similarity: Tensor, threshold: float) -> Tensor:
    share = similarity / (similarity.sum(dim=-1, keepdim=True) + 1e-8)
    share = torch.gt(share, threshold).to(share) * share
    return share / (share.sum(dim=-1, keepdim=True) + 1e-8)


def published_loss(output: Output, batch: Batch) -> Tensor:
    """The published full supervision's loss of a batch: all distances with gradient, no pool."""
    has_event = batch.event.any(1)
    category = torch.where(has_event, batch.category, 0)
    loss = event_loss(output.event_logits, batch.event).mean() + F.cross_entropy(output.category_logits, category)
    loss = loss + 100 * avps(output.similarity, batch.event).mean()
    loss = loss + 0.01 * psa_s_published(output.fusion, batch.event, 0.6, rows=False).mean()
    return loss + _psa_v(F.normalize(output.fusion, dim=-1).mean(1), category)


def _psa_v(rows: Tensor, category: Tensor) -> Tensor:
    squares = rows.square().sum(1)
    distance = (squares.unsqueeze(1) + squares - 2 * rows @ rows.t()).clamp(min=1e-12).sqrt()
    same = category.unsqueeze(1) == category
    hardest = torch.where(same, distance, 0.0).max(1).values
    nearest = torch.where(same, 1e12, distance).topk(3, largest=False).values.mean(1)
    return F.relu(hardest - nearest + 0.2).mean()
