"""AVSDN (Lin et al., ICASSP 2019: dual-modality sequence to sequence), as the published comparison has it."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpsp_dist.models.avel import ResidualFusion
from cpsp_dist.models.layers import (
    PUBLISHED_ATTENTION_AND_FUSION,
    PUBLISHED_CLASSIFIERS,
    BiLSTM,
    Classifier,
    Network,
    Output,
    autocast_disabled,
    cosine,
    place_attention,
)
from cpsp_dist.utils.registry import NoSettings


class AVSDN(Network):
    """Two LSTMs read the modalities; their fused last states start a third, which reads both. Has no dropout."""

    published_names = (*PUBLISHED_ATTENTION_AND_FUSION, *PUBLISHED_CLASSIFIERS)

    def __init__(
        self,
        settings: NoSettings,
        *,
        supervision: Literal["full", "weak"],
        visual_channels: int,
        audio_channels: int,
        categories: int,
        modality: Literal["both", "audio", "visual"],
        positions: int,
    ) -> None:
        super().__init__(
            visual_channels=visual_channels, audio_channels=audio_channels, modality=modality, positions=positions
        )
        hidden = 128
        self.attention = place_attention(self.visual_channels, positions)
        self.lstm_audio = BiLSTM(self.audio_channels, hidden)
        self.lstm_video = BiLSTM(self.visual_channels, hidden)
        self.lstm_a_v = BiLSTM(self.visual_channels + self.audio_channels, hidden)
        self.fuse = ResidualFusion(hidden)
        self.classifier = Classifier(2 * hidden, categories, supervision)
        for layer in (self.classifier.event, self.classifier.category):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, visual: Tensor, audio: Tensor) -> Output:
        """[B, T, H, W, C] or [B, T, C], [B, T, A] -> Output with D = 256."""
        visual, audio = self.inputs(visual, audio)
        visual, attention = self.attention(visual, audio, self.visual_in)
        with autocast_disabled(audio):
            both = torch.cat([audio, visual], dim=-1)
            audio, audio_state = self.lstm_audio(audio)
            visual, visual_state = self.lstm_video(visual)
            # (hidden, cell), each [2 directions, B, 128]
            hidden, cell = (self.fuse(F.relu(a), F.relu(v)) for a, v in zip(audio_state, visual_state, strict=True))
            fusion = F.relu(self.lstm_a_v(both, (hidden, cell))[0])
            event, category, video = self.classifier(fusion)
            return Output(event, category, video, fusion, audio, visual, cosine(audio, visual), attention)
