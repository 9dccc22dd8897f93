"""CACE-Net (He et al., ACM MM 2024: co-guidance attention and contrastive enhancement).

The weakly supervised variant is a reconstruction: the one that was published does not start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpsp_dist.models.cmbs import (
    GatedAttention,
    SelfAttention,
    Suppression,
    SuppressionSettings,
    attend,
    suppress,
    twice,
    weak_logits,
)
from cpsp_dist.models.cmran import MAP, WIDTH
from cpsp_dist.models.layers import Output, autocast_disabled, cosine, l2_normalize
from cpsp_dist.utils.registry import setting


@dataclass(frozen=True)
class CACESettings(SuppressionSettings):
    psi: float = setting(0.3, "CACE: weight of what the maps make of the audio (co-guidance)", ge=0)
    enhancement: float = setting(0.6, "CACE: weight of the contrasted features in the event's (paper: lambda)", ge=0)
    enhanced_from: float = setting(0.125, "CACE: share of the epochs after which they count", ge=0, le=1)
    noise: float = setting(0.1, "CACE: standard deviation of the noise that the contrast's second view has", ge=0)


class CACE(Suppression):
    """CMBS with an attention in which the maps guide the audio too, and contrasted features that sharpen events."""

    Settings = CACESettings
    published_names = (
        (r"^spatial_channel_att\.v_norm\.", "spatial_channel_att.norm."),
        *Suppression.published_names,
        (r"^attention\.video_(query|key|value)2\.", r"attention.scene.\1."),
        (r"^attention\.audio_(query|key|value)\.", r"attention.seconds.\1."),
        (r"^localize_module\.encoder_q\.0\.", "contrast."),
    )
    published_unused = (
        r"(spatial_channel_att\.(ave_bottleneck|v_norm2)|a_fc)\."
        r"|.*\.(encoder_layer|decoder_layer|decoder\.layers\.0\.self_attn)\."
    )
    extra_outputs = ("gate", "modality_logits", "views")

    def __init__(
        self,
        settings: CACESettings,
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
            hidden=(1024, 1024 if supervision == "weak" else 512),
        )
        self.enhancement, self.enhanced_from, self.noise = settings.enhancement, settings.enhanced_from, settings.noise
        self.enhanced = True
        self.map_dropout = nn.Dropout(twice(settings.dropout))
        self.attention = CoGuidedAttention(self.audio_channels, positions, settings)
        self.contrast = nn.Linear(WIDTH, WIDTH)
        if self.weak:
            self.event = nn.Linear(WIDTH, 1)
        else:
            self.audio_gate, self.video_gate = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 1)

    def start_step(self, progress: float) -> None:
        self.enhanced = progress >= self.enhanced_from

    def forward(self, visual: Tensor, audio: Tensor) -> Output:
        """[B, T, H, W, C] or [B, T, C], [B, T, A] -> Output with D = 256."""
        visual, audio = self.inputs(visual, audio)
        if self.visual_in is not None:
            visual = self.visual_in(visual)
        visual, audio, attention = self.attention.both(self.map_dropout(F.relu(self.v_fc(visual))), audio)
        with autocast_disabled(audio):
            localize = self._weak if self.weak else self._full
            return localize(*self.relate(visual, audio), attention)

    def _full(self, seen: Tensor, heard: Tensor, visual: Tensor, audio: Tensor, attention: Tensor | None) -> Output:
        by_audio, by_video = self.audio_gate(heard).sigmoid(), self.video_gate(seen).sigmoid()
        visual, audio = suppress(visual, by_audio, self.settings.alpha), suppress(audio, by_video, self.settings.alpha)
        found = self.found(visual, audio)
        visual, audio, fusion = self.interact(visual, audio)
        enhanced, views = self._enhance(fusion)
        event = self.classifier.event(enhanced).squeeze(-1)
        category = self.classifier.category(fusion.max(1).values) + self.settings.gamma * found
        gate, similarity = (by_audio * by_video).squeeze(-1), cosine(audio, visual)
        return Output(event, category, None, fusion, audio, visual, similarity, attention, gate, found, views)

    def _weak(self, seen: Tensor, heard: Tensor, visual: Tensor, audio: Tensor, attention: Tensor | None) -> Output:
        modalities = visual, audio
        visual, audio, fusion = self.interact(visual, audio)
        event = self.event(self._enhance(fusion)[0]).squeeze(-1)
        logits = self.weak_activations(*modalities, fusion, self.settings.gamma)
        scores = weak_logits(event, event.sigmoid(), logits)
        return Output(*scores, fusion, audio, visual, cosine(audio, visual), attention)

    def _enhance(self, fusion: Tensor) -> tuple[Tensor, Tensor | None]:
        """Fused features [B, T, D] with the contrasted ones, and the two views of these, [B, 2, T, D].

        Before they count there are no views, and the weight is 0 and not left out: DDP and ZeRO wait for each gradient.
        In evaluation they always count: the weights chosen there are used so.
        """
        counts = self.enhanced or not self.training
        features = F.relu(self.contrast(fusion))
        enhanced = fusion + (self.enhancement if counts else 0.0) * features
        if not counts or self.weak:
            return enhanced, None
        noisy = fusion + self.noise * torch.randn_like(fusion) if self.training else fusion
        return enhanced, l2_normalize(torch.stack([features, F.relu(self.contrast(noisy))], dim=1))


class CoGuidedAttention(GatedAttention):
    """Audio weighs the maps' positions, as in CMBS; then the maps weigh the seconds of the audio.

    `both`: visual [B, T, P, 512], audio [B, T, A] -> visual [B, T, 512], audio [B, T, A], attention [B, T, P] or None.
    """

    def __init__(self, audio_channels: int, positions: int, settings: CACESettings) -> None:
        super().__init__(audio_channels, positions, settings)
        self.psi = settings.psi
        self.scene = SelfAttention(MAP, MAP // 4, several=self.several)
        self.v_query = nn.Linear(MAP, audio_channels)
        self.vaudio_key = nn.Linear(audio_channels, audio_channels)
        self.vaudio_value = nn.Linear(audio_channels, audio_channels)
        self.seconds = SelfAttention(audio_channels, audio_channels)
        self.a_norm = nn.LayerNorm(audio_channels)

    def both(self, visual: Tensor, audio: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        attended, attention = self(visual, audio)
        scene = self.norm(visual + self.dropout(self.scene(visual))).mean(2).to(audio.dtype)  # [B, T, 512]
        with autocast_disabled(audio):
            known = self.a_norm(audio + self.dropout(self.seconds(audio)))
            guided = attend(self.v_query(scene), self.vaudio_key(known), self.vaudio_value(known))
            return attended, audio + self.psi * guided.sigmoid() * audio, attention
