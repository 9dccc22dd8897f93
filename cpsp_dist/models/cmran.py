"""CMRAN (Xu et al., ACM MM 2020: cross-modal relation-aware networks), as the published comparison has it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpsp_dist.models.layers import Classifier, DropoutSettings, Network, Output, autocast_disabled, cosine

WIDTH = 256
MAP = 512  # visual channels inside
#: Names in the published code that networks of this family share: (pattern, replacement).
PUBLISHED_RELATIONS = (
    (r"^spatial_channel_att\.", "attention."),
    (r"_encoder\.encoder\.layers\.(\d)\.", r"_encoder.layers.\1."),
    (r"_decoder\.decoder\.layers\.0\.", "_decoder.layer."),
    (r"\.(self_attn|multihead_attn)\.", ".attention."),
    (r"\.out_proj\.", ".out."),
    (r"^localize_module\.classifier\.", "classifier.event."),
    (r"^localize_module\.event_classifier\.", "classifier.category."),
)


def split_attention(name: str, value: Tensor) -> Iterable[tuple[str, Tensor]]:
    """Query, key and value of an attention are one matrix in the published code, and three layers here."""
    packed = re.search(r"in_proj_(weight|bias)$", name)
    if packed is None:
        return [(name, value)]
    parts = zip(("query", "key", "value"), value.chunk(3), strict=False)
    return [(f"{name[: packed.start()]}{part}.{packed[1]}", rows) for part, rows in parts]


class CMRAN(Network):
    """Spatial-channel attention, relations within each modality, across the two, and their interaction.

    The published weak variant has 2 heads in the interaction, the full one 4.
    """

    Settings = DropoutSettings
    published_names = (
        *PUBLISHED_RELATIONS,
        (r"^AVInter\.video_multihead\.", "interaction.attention."),
        (r"^AVInter\.norm1\.", "interaction.norm."),
    )
    published_unused = r".*\.(affine_video_guided_\d|encoder_layer|decoder_layer|decoder\.layers\.0\.self_attn)\."

    def __init__(
        self,
        settings: DropoutSettings,
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
        self.v_fc = nn.Linear(self.visual_channels, MAP)
        self.map_dropout = nn.Dropout(min(2 * settings.dropout, 0.99))  # published: 0.2 here, 0.1 everywhere else
        self.attention = SpatialChannelAttention(self.audio_channels, positions)
        self.video_encoder = RelationEncoder(MAP, layers=2, dropout=settings.dropout)
        self.audio_encoder = RelationEncoder(self.audio_channels, layers=2, dropout=settings.dropout)
        self.video_decoder = Decoder(MAP, dropout=settings.dropout)
        self.audio_decoder = Decoder(self.audio_channels, dropout=settings.dropout)
        self.interaction = Interaction(heads=4 if supervision == "full" else 2, dropout=settings.dropout)
        self.classifier = Classifier(WIDTH, categories, supervision, pooling="max")

    @classmethod
    def convert_published(cls, name: str, value: Tensor) -> Iterable[tuple[str, Tensor]]:
        return split_attention(name, value)

    def forward(self, visual: Tensor, audio: Tensor) -> Output:
        """[B, T, H, W, C] or [B, T, C], [B, T, A] -> Output with D = 256."""
        visual, audio = self.inputs(visual, audio)
        if self.visual_in is not None:
            visual = self.visual_in(visual)
        visual, attention = self.attention(self.map_dropout(F.relu(self.v_fc(visual))), audio)
        with autocast_disabled(audio):
            audio_out = self.audio_decoder(audio, self.video_encoder(visual))
            visual_out = self.video_decoder(visual, self.audio_encoder(audio))
            fusion = self.interaction(audio_out, visual_out)
            event, category, video = self.classifier(fusion)
            similarity = cosine(audio_out, visual_out)
            return Output(event, category, video, fusion, audio_out, visual_out, similarity, attention)


class SpatialChannelAttention(nn.Module):
    """Audio weighs first the channels of the maps, then their positions, where there are several.

    visual [B, T, P, 512], audio [B, T, A] -> attended visual features [B, T, 512], attention [B, T, P] or None.
    """

    def __init__(self, audio_channels: int, positions: int) -> None:
        super().__init__()
        self.several = positions > 1
        self.affine_video_1 = nn.Linear(MAP, MAP)
        self.affine_audio_1 = nn.Linear(audio_channels, MAP)
        self.affine_bottleneck = nn.Linear(MAP, 256)
        self.affine_v_c_att = nn.Linear(256, MAP)
        if self.several:
            self.affine_video_2 = nn.Linear(MAP, 256)
            self.affine_audio_2 = nn.Linear(audio_channels, 256)
            self.affine_v_s_att = nn.Linear(256, 1)

    def forward(self, visual: Tensor, audio: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """seen [B, T, P, 512]: what the channels are weighed by, where that is not `visual` itself."""
        # The audio's factor is the same at each position, so it can wait until after the mean over them.
        query = F.relu(self.affine_video_1(visual if seen is None else seen)).mean(2) * F.relu(
            self.affine_audio_1(audio)
        )
        channels = self.affine_v_c_att(F.relu(self.affine_bottleneck(query))).sigmoid()
        visual = visual * (channels + 1).to(visual.dtype).unsqueeze(2)
        if not self.several:
            return visual.squeeze(2).to(audio.dtype), None
        query = F.relu(self.affine_video_2(visual)) * F.relu(self.affine_audio_2(audio)).unsqueeze(2)
        scores = torch.tanh(self.affine_v_s_att(query)).squeeze(-1)
        attention = F.softmax(scores.to(audio.dtype), dim=-1)
        attended = torch.matmul(attention.to(visual.dtype).unsqueeze(-2), visual).squeeze(-2)
        return attended.to(audio.dtype), attention


class Attention(nn.Module):
    """Multi-head attention: query [B, T, 256], memory [B, S, 256] -> [B, T, 256].

    Not `nn.MultiheadAttention`: it reads weights of a module inside it without calling it, which ZeRO-3 cannot see.
    """

    def __init__(self, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        for layer in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(layer.weight, gain=2**-0.5)  # as if the three were one matrix [768, 256]
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, query), (self.key, memory), (self.value, memory))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        output: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return output


class Relation(nn.Module):
    """One layer: attention and a feed-forward network, each with a residual and a norm behind it."""

    def __init__(self, dropout: float, hidden: int) -> None:
        super().__init__()
        self.attention = Attention(4, dropout)
        self.linear1 = nn.Linear(WIDTH, hidden)
        self.linear2 = nn.Linear(hidden, WIDTH)
        self.norm1 = nn.LayerNorm(WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        x = self.norm1(query + self.dropout(self.attention(query, memory)))
        output: Tensor = self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))
        return output


class RelationEncoder(nn.Module):
    """Relations between the segments of one modality. [B, T, channels] -> [B, T, 256]."""

    def __init__(self, channels: int, layers: int, dropout: float, hidden: int = 2048) -> None:
        super().__init__()
        self.affine_matrix = nn.Linear(channels, WIDTH)
        self.layers = nn.ModuleList(Relation(dropout, hidden) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.affine_matrix(x)
        for layer in self.layers:
            x = layer(x, x)
        return x


class Decoder(nn.Module):
    """Relations of one modality's segments to the encoded other, and to themselves. -> [B, T, 256]."""

    def __init__(self, channels: int, dropout: float, hidden: int = 2048) -> None:
        super().__init__()
        self.affine_matrix = nn.Linear(channels, WIDTH)
        self.layer = Relation(dropout, hidden)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        x = self.affine_matrix(x)
        output: Tensor = self.layer(x, torch.cat([other, x], dim=1))
        return output


class Interaction(nn.Module):
    """The product of the modalities looks again at both. audio, visual [B, T, 256] -> [B, T, 256].

    attention_dropout: of the attention's weights, where it is not `dropout`.
    """

    def __init__(self, heads: int, dropout: float, attention_dropout: float | None = None) -> None:
        super().__init__()
        self.attention = Attention(heads, dropout if attention_dropout is None else attention_dropout)
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, audio: Tensor, visual: Tensor) -> Tensor:
        product = audio * visual
        attended = self.attention(product, torch.cat([audio, visual], dim=1))
        output: Tensor = self.norm(product + self.dropout(attended))
        return output
