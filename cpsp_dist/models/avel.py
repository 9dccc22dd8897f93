"""AVEL, the first network for the task (Tian et al., ECCV 2018), as the published comparison has it."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpsp_dist.models.parts import AudioGuidedAttention, BiLSTM, Classifier, Network, Output, cosine, exact


class AVEL(Network):
    """Attention, a bidirectional LSTM for each modality, and a residual fusion of the two. Has no dropout."""

    def __init__(
        self,
        *,
        supervision: Literal["full", "weak"],
        visual_channels: int,
        audio_channels: int,
        categories: int,
        sees: Literal["both", "audio", "visual"],
    ) -> None:
        super().__init__(visual_channels=visual_channels, audio_channels=audio_channels, sees=sees)
        hidden = 128
        self.attention = AudioGuidedAttention(self.visual_channels)
        self.lstm_audio = BiLSTM(self.audio_channels, hidden)
        self.lstm_video = BiLSTM(self.visual_channels, hidden)
        self.fuse = ResidualFusion(2 * hidden)
        self.classifier = Classifier(2 * hidden, categories, supervision)

    def forward(self, visual: Tensor, audio: Tensor) -> Output:
        """[B, T, 7, 7, C], [B, T, A] -> Output with D = 256."""
        visual, audio = self.inputs(visual, audio)
        visual, attention = self.attention(visual, audio, self.visual_in)
        with exact(audio):
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
