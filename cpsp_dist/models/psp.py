"""PSP, the network of CPSP and SSPSP too: they differ from it by their training objectives only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpsp_dist.models.layers import (
    PUBLISHED_AUDIO,
    PUBLISHED_CLASSIFIERS,
    BiLSTM,
    Classifier,
    DropoutSettings,
    Network,
    Output,
    autocast_disabled,
    cosine,
    place_attention,
)
from cpsp_dist.utils.registry import setting


@dataclass(frozen=True)
class PSPSettings(DropoutSettings):
    threshold: float = setting(0.099, "similarity below which PSP prunes a segment pair", ge=0, lt=1)


class PSP(Network):
    """Positive sample propagation (CPSP, TPAMI 2022, section 3): attention, two LSTMs, propagation, classifiers.

    Left out of the published network are its layers that no output depends on; see `published_unused`.
    """

    Settings = PSPSettings
    published_names = ((r"^lstm_a_v\.", ""), (r"^psp\.", "propagation."), *PUBLISHED_CLASSIFIERS)
    published_unused = r"(linear_v|v_classify|a_classify|L1|L2|align_v)\."

    def __init__(
        self,
        settings: PSPSettings,
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
        self.fa = nn.Sequential(nn.Linear(PUBLISHED_AUDIO, 256, bias=False), nn.Linear(256, hidden, bias=False))
        self.fv = nn.Sequential(nn.Linear(self.visual_channels, 256, bias=False), nn.Linear(256, hidden, bias=False))
        self.attention = place_attention(self.visual_channels, positions)
        self.lstm_audio = BiLSTM(hidden)
        self.lstm_video = BiLSTM(hidden)
        self.propagation = Propagation(2 * hidden, settings.threshold, settings.dropout)
        self.classifier = Classifier(2 * hidden, categories, supervision)

    def forward(self, visual: Tensor, audio: Tensor) -> Output:
        """[B, T, H, W, C] or [B, T, C], [B, T, A] -> Output with D = 256."""
        visual, audio = self.inputs(visual, audio)
        with autocast_disabled(audio):
            audio = self.fa(audio)
        visual, attention = self.attention(visual, audio, self.visual_in)
        with autocast_disabled(audio):
            audio, _ = self.lstm_audio(audio)
            visual, _ = self.lstm_video(self.fv(visual))
            audio, visual = self.propagation(audio, visual)
            fusion = (audio + visual) / 2
            event, category, video = self.classifier(fusion)
            return Output(event, category, video, fusion, audio, visual, cosine(audio, visual), attention)


class Propagation(nn.Module):
    """Each modality takes up the segments of the other that are alike enough (section 3.2).

    audio [B, T, D], visual [B, T, D] -> the same, updated. The similarity of every audio-visual segment pair is scaled
    to sum to 1 over a row, entries of at most `threshold` are dropped, and the rest is scaled to 1 again.
    """

    def __init__(self, width: int, threshold: float, dropout: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.v_L1 = nn.Linear(width, width, bias=False)
        self.v_L2 = nn.Linear(width, width, bias=False)
        self.v_fc = nn.Linear(width, width, bias=False)
        self.a_L1 = nn.Linear(width, width, bias=False)
        self.a_L2 = nn.Linear(width, width, bias=False)
        self.a_fc = nn.Linear(width, width, bias=False)
        self.layer_norm = nn.LayerNorm(width, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.v_L1, self.v_L2, self.v_fc, self.a_L1, self.a_L2, self.a_fc):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, audio: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        v1, v2 = self._branch(self.v_L1, visual), self._branch(self.v_L2, visual)
        a1, a2 = self._branch(self.a_L1, audio), self._branch(self.a_L2, audio)
        similarity = F.relu(torch.bmm(v2, a1.transpose(1, 2)) / v2.shape[-1] ** 0.5)  # [B, T visual, T audio]
        from_audio = torch.bmm(self._prune(similarity), a2)
        from_visual = torch.bmm(self._prune(similarity.transpose(1, 2)), v1)
        visual = self.layer_norm(self._branch(self.v_fc, visual + from_audio))
        audio = self.layer_norm(self._branch(self.a_fc, audio + from_visual))
        return audio, visual

    def _branch(self, layer: nn.Linear, x: Tensor) -> Tensor:
        output: Tensor = self.dropout(F.relu(layer(x)))
        return output

    def _prune(self, similarity: Tensor) -> Tensor:
        share = similarity / (similarity.sum(-1, keepdim=True) + 1e-8)
        kept = torch.where(share > self.threshold, share, 0.0)
        return kept / (kept.sum(-1, keepdim=True) + 1e-8)
