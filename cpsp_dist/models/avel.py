"""AVEL, the first network for the task (Tian et al., ECCV 2018), as the published comparison has it."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class AVEL(Network):
    """Attention, a bidirectional LSTM for each modality, and a residual fusion of the two. Has no dropout."""

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
        self.fuse = ResidualFusion(2 * hidden)
        self.classifier = Classifier(2 * hidden, categories, supervision)

    def forward(self, visual: Tensor, audio: Tensor) -> Output:
        """[B, T, H, W, C] or [B, T, C], [B, T, A] -> Output with D = 256."""
        visual, audio = self.inputs(visual, audio)
        visual, attention = self.attention(visual, audio, self.visual_in)
        with autocast_disabled(audio):
            audio, _ = self.lstm_audio(audio)
            visual, _ = self.lstm_video(visual)
            fusion = F.relu(self.fuse(audio, visual))
            event, category, video = self.classifier(fusion)
            return Output(event, category, video, fusion, audio, visual, cosine(audio, visual), attention)


class ResidualFusion(nn.Module):
    """Mean of tanh(audio + m) and tanh(visual + m), m the mean of both after small networks. [..., D] -> same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.U_v = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.U_a = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, audio: Tensor, visual: Tensor) -> Tensor:
        merged = (self.U_v(visual) + self.U_a(audio)) / 2
        return (torch.tanh(audio + merged) + torch.tanh(visual + merged)) / 2
