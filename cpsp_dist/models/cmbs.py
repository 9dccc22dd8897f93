"""CMBS (Xia and Zhao, CVPR 2022: cross-modal background suppression), fully and weakly supervised."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpsp_dist.models.cmran import (
    MAP,
    PUBLISHED_RELATIONS,
    WIDTH,
    Decoder,
    Interaction,
    RelationEncoder,
    SpatialChannelAttention,
    split_attention,
)
from cpsp_dist.models.layers import BiLSTM, Classifier, DropoutSettings, Network, Output, autocast_disabled, cosine
from cpsp_dist.utils.registry import setting

#: Segments that a category's activations are averaged over: those where they are largest.
TOP = 4


@dataclass(frozen=True)
class SuppressionSettings(DropoutSettings):
    alpha: float = setting(0.1, "CMBS, CACE: weight of a segment's gate (time-level suppression)", ge=0, le=1)
    beta: float = setting(0.4, "CMBS, CACE: weight of what the maps show without the audio (gated attention)", ge=0)
    gamma: float = setting(0.3, "CMBS, CACE: weight of the modalities' categories (event-level suppression)", ge=0)


@dataclass(frozen=True)
class CMBSSettings(SuppressionSettings):
    weak_gates: Literal["opposite", "published"] = setting(
        "opposite",
        "CMBS, weak supervision: a modality is gated by the other one; published: by itself, and the mean gate, a "
        "probability, is taken for a logit: every segment is an event",
    )


class Suppression(Network):
    """What CMBS and CACE-Net share: relations as in CMRAN, gates in time, categories of each modality.

    With weak supervision a video's logits have a column more than there are categories: background. Subclasses make
    `attention`, from maps [B, T, P, 512] and audio [B, T, 128].
    """

    published_names: ClassVar[tuple[tuple[str, str], ...]] = (
        *PUBLISHED_RELATIONS,
        (r"^audio_visual_rnn_layer\.audio_rnn\.", "lstm_audio."),
        (r"^audio_visual_rnn_layer\.visual_rnn\.", "lstm_video."),
        (r"^(AV|VA)Inter\.video_multihead\.", r"\1Inter.attention."),
        (r"^(AV|VA)Inter\.norm1\.", r"\1Inter.norm."),
        (r"^AVInter\.", "video_interaction."),
        (r"^VAInter\.", "audio_interaction."),
        (r"^(audio|video)_gated\.0\.", r"\1_gate."),
        (r"^attention\.video_(query|key|value)\.", r"attention.itself.\1."),
        (r"^(localize_module\.)?CAS_model\.classifier\.0\.", "activations."),
    )
    extra_outputs: ClassVar[tuple[str, ...]] = ("gate", "modality_logits")

    def __init__(
        self,
        settings: SuppressionSettings,
        *,
        supervision: Literal["full", "weak"],
        visual_channels: int,
        audio_channels: int,
        categories: int,
        modality: Literal["both", "audio", "visual"],
        positions: int,
        hidden: tuple[int, int],
    ) -> None:
        """hidden: widths of the feed-forward layers, in the encoders and in the decoders."""
        super().__init__(
            visual_channels=visual_channels, audio_channels=audio_channels, modality=modality, positions=positions
        )
        self.settings, self.weak, dropout = settings, supervision == "weak", settings.dropout
        self.v_fc = nn.Linear(self.visual_channels, MAP)
        audio_width = self.audio_channels
        if not self.weak:
            audio_width = 2 * self.audio_channels
            self.lstm_audio, self.lstm_video = BiLSTM(self.audio_channels, audio_width // 2), BiLSTM(MAP, MAP // 2)
        self.video_encoder = RelationEncoder(MAP, layers=2, dropout=dropout, hidden=hidden[0])
        self.audio_encoder = RelationEncoder(audio_width, layers=2, dropout=dropout, hidden=hidden[0])
        self.video_decoder = Decoder(MAP, dropout=dropout, hidden=hidden[1])
        self.audio_decoder = Decoder(audio_width, dropout=dropout, hidden=hidden[1])
        heads = 2 if self.weak else 4
        self.video_interaction = Interaction(heads, dropout, attention_dropout=twice(dropout))
        self.audio_interaction = Interaction(heads, dropout, attention_dropout=twice(dropout))
        self.audio_cas = nn.Linear(WIDTH, categories + self.weak)
        self.video_cas = nn.Linear(WIDTH, categories + self.weak)
        if self.weak:
            self.activations = nn.Linear(WIDTH, categories + 1, bias=False)
        else:
            self.classifier = Classifier(WIDTH, categories, supervision, pooling="max")

    @classmethod
    def convert_published(cls, name: str, value: Tensor) -> Iterable[tuple[str, Tensor]]:
        """The published activations are a convolution of width 1; query, key and value of an attention are one."""
        return split_attention(name, value.squeeze(-1) if name == "activations.weight" else value)

    def relate(self, visual: Tensor, audio: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[B, T, 512], [B, T, 128] -> the encoded, then the decoded modalities, visual first, each [B, T, 256]."""
        if not self.weak:
            (audio, _), (visual, _) = self.lstm_audio(audio), self.lstm_video(visual)
        seen, heard = self.video_encoder(visual), self.audio_encoder(audio)
        return seen, heard, self.video_decoder(visual, heard), self.audio_decoder(audio, seen)

    def interact(self, visual: Tensor, audio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, 256] each -> visual, audio and their mean."""
        visual = self.video_interaction(audio, visual)
        audio = self.audio_interaction(visual, audio)
        return visual, audio, (visual + audio) / 2

    def found(self, visual: Tensor, audio: Tensor) -> Tensor:
        """The category by each modality, the mean of the two. [B, T, 256] each -> [B, K]."""
        return (top_mean(self.video_cas(visual)) + top_mean(self.audio_cas(audio))) / 2

    def weak_activations(self, visual: Tensor, audio: Tensor, fusion: Tensor, gamma: float) -> Tensor:
        """Event-level suppression: both modalities have to agree. [B, T, 256] each -> [B, K + 1], background last."""
        agreed = gamma * (self.video_cas(visual).sigmoid() + self.audio_cas(audio).sigmoid())
        return top_mean(agreed * self.activations(fusion))


class CMBS(Suppression):
    """What a modality takes for background is suppressed in the other, in time and by category."""

    Settings = CMBSSettings
    published_unused = (
        r"(spatial_channel_att\.ave_bottleneck|video_norm|audio_norm)\.|classifier\.(weight|bias)$"
        r"|.*\.(encoder_layer|decoder_layer|decoder\.layers\.0\.self_attn)\."
    )

    def __init__(
        self,
        settings: CMBSSettings,
        *,
        supervision: Literal["full", "weak"],
        visual_channels: int,
        audio_channels: int,
        categories: int,
        modality: Literal["both", "audio", "visual"],
        positions: int,
    ) -> None:
        super().__init__(
            settings,
            supervision=supervision,
            visual_channels=visual_channels,
            audio_channels=audio_channels,
            categories=categories,
            modality=modality,
            positions=positions,
            hidden=(2048 if supervision == "weak" else 1024, 1024),
        )
        self.own_gates = settings.weak_gates == "published"
        self.map_dropout = nn.Dropout(settings.dropout if self.weak else twice(settings.dropout))
        self.attention = GatedAttention(self.audio_channels, positions, settings)
        self.audio_gate, self.video_gate = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 1)

    def forward(self, visual: Tensor, audio: Tensor) -> Output:
        """[B, T, H, W, C] or [B, T, C], [B, T, A] -> Output with D = 256."""
        visual, audio = self.inputs(visual, audio)
        if self.visual_in is not None:
            visual = self.visual_in(visual)
        visual, attention = self.attention(self.map_dropout(F.relu(self.v_fc(visual))), audio)
        with autocast_disabled(audio):
            localize = self._weak if self.weak else self._full
            return localize(*self.relate(visual, audio), attention)

    def _full(self, seen: Tensor, heard: Tensor, visual: Tensor, audio: Tensor, attention: Tensor | None) -> Output:
        by_audio, by_video = self.audio_gate(heard).sigmoid(), self.video_gate(seen).sigmoid()
        visual, audio = suppress(visual, by_audio, self.settings.alpha), suppress(audio, by_video, self.settings.alpha)
        found = self.found(visual, audio)
        visual, audio, fusion = self.interact(visual, audio)
        event, category, _ = self.classifier(fusion)
        category, gate = category + self.settings.gamma * found, (by_audio * by_video).squeeze(-1)
        similarity = cosine(audio, visual)
        return Output(event, category, None, fusion, audio, visual, similarity, attention, gate, found)

    def _weak(self, seen: Tensor, heard: Tensor, visual: Tensor, audio: Tensor, attention: Tensor | None) -> Output:
        if self.own_gates:
            seen, heard = heard, seen
        by_audio, by_video = self.audio_gate(heard).sigmoid(), self.video_gate(seen).sigmoid()
        alpha = self.settings.alpha
        visual = (1 - alpha) * visual + alpha * by_audio * visual
        audio = (1 - alpha) * audio + alpha * by_video * audio
        modalities = visual, audio
        visual, audio, fusion = self.interact(visual, audio)
        logits = self.weak_activations(*modalities, fusion, self.settings.gamma)
        gate = ((by_audio + by_video) / 2).squeeze(-1)
        scores = weak_logits(gate if self.own_gates else torch.logit(gate, eps=1e-6), gate, logits)
        return Output(*scores, fusion, audio, visual, cosine(audio, visual), attention, gate)


class GatedAttention(SpatialChannelAttention):
    """CMRAN's attention, its channels weighed by maps that have seen all of themselves; and what these show alone.

    visual [B, T, P, 512], audio [B, T, A] -> attended visual features [B, T, 512], attention [B, T, P] or None.
    """

    def __init__(self, audio_channels: int, positions: int, settings: SuppressionSettings) -> None:
        super().__init__(audio_channels, positions)
        self.beta = settings.beta
        self.itself = SelfAttention(MAP, MAP // 4, several=self.several)
        if self.several:
            self.affine_video_ave = nn.Linear(MAP, 256)
            self.affine_video_3 = nn.Linear(MAP, 256)
            self.ave_v_att = nn.Linear(256, 1)
        self.norm = nn.LayerNorm(MAP)
        self.dropout = nn.Dropout(twice(settings.dropout))

    def forward(self, visual: Tensor, audio: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if seen is None:
            seen = self.norm(visual + self.dropout(self.itself(visual))).to(visual.dtype)
        attended, attention = super().forward(visual, audio, seen)
        return attended + self.beta * self._alone(seen, audio.dtype).sigmoid() * attended, attention

    def _alone(self, seen: Tensor, dtype: torch.dtype) -> Tensor:
        """What the maps show without the audio. [B, T, P, 512] -> [B, T, 512]."""
        if not self.several:
            return seen.squeeze(2).to(dtype)
        query = F.relu(self.affine_video_3(seen)) * F.relu(self.affine_video_ave(seen.mean(2))).unsqueeze(2)
        weights = F.softmax(torch.tanh(self.ave_v_att(query)).to(dtype), dim=2).to(seen.dtype)  # [B, T, P, 1]
        return torch.matmul(weights.transpose(2, 3), seen).squeeze(2).to(dtype)


class SelfAttention(nn.Module):
    """Each position takes up all of them; a position by itself needs no weights. [..., P, width] -> the same."""

    def __init__(self, width: int, hidden: int, several: bool = True) -> None:
        super().__init__()
        self.several = several
        if several:
            self.query = nn.Linear(width, hidden)
            self.key = nn.Linear(width, hidden)
        self.value = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.several:
            return attend(self.query(x), self.key(x), self.value(x))
        value: Tensor = self.value(x)
        return value


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of one head, unscaled, as published. [..., P, D], [..., S, D], [..., S, E] -> [..., P, E]."""
    energy = torch.matmul(query, key.transpose(-1, -2))
    return torch.matmul(F.softmax(energy, dim=-1).to(value.dtype), value)


def suppress(x: Tensor, gate: Tensor, alpha: float) -> Tensor:
    """Time-level suppression: segments that the other modality's gate lets through grow. [B, T, D], [B, T, 1]."""
    return x + alpha * gate * x


def top_mean(activations: Tensor) -> Tensor:
    """The mean over the 4 segments where it is largest, of each category. [B, T, K] -> [B, K]."""
    return activations.topk(min(TOP, activations.shape[1]), dim=1).values.mean(1)


def twice(dropout: float) -> float:
    """Published: 0.2 in some places, 0.1 in the others."""
    return min(2 * dropout, 0.99)


def weak_logits(event: Tensor, gate: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Event logits [B, T], category logits [B, K] and the video's logits [B, K + 1] of weak supervision.

    event [B, T]: of each segment by itself; gate [B, T], 0 to 1: its weight; logits [B, K + 1], background last. A
    segment is an event where it is one by itself, and the video's likeliest category is not background.
    """
    category, background = logits[:, :-1], logits[:, -1:]
    event = torch.minimum(event, category.max(1, keepdim=True).values - background)
    return event, category, (gate.unsqueeze(-1) * logits.unsqueeze(1)).max(1).values
