"""What the networks share: their output, their input layers, the audio-guided attention, the classifiers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpsp_dist.utils.registry import NoSettings, setting

POSITIONS = 49  # of a published map, 7 by 7
PUBLISHED_AUDIO = 128
PUBLISHED_VISUAL = (512, 1024)  # VGG-19 and ResNet maps
#: Names in the published code that several networks have: (pattern, replacement).
PUBLISHED_CLASSIFIERS = (
    (r"^event_classifier\.0\.", "classifier.event."),
    (r"^category_classifier\.0\.", "classifier.category."),
)
PUBLISHED_ATTENTION_AND_FUSION = ((r"^affine_", "attention.affine_"), (r"^(U_[av])\.", r"fuse.\1."))


class Output(NamedTuple):
    """What a network gives for B videos. A named tuple, so that DeepSpeed's ZeRO-3 hooks find the tensors in it."""

    event_logits: Tensor  # [B, T] is the segment an event?
    category_logits: Tensor  # [B, K] which one
    video_logits: Tensor | None  # [B, K] weak supervision: the category as pooled over gated segments, else None
    fusion: Tensor  # [B, T, D] fused segment features
    audio: Tensor  # [B, T, D]
    visual: Tensor  # [B, T, D]
    similarity: Tensor  # [B, T] cosine of `audio` and `visual`
    attention: Tensor | None  # [B, T, P] weights of the map's positions, where the network has them
    # What some networks give besides: `Network.extra_outputs`.
    gate: Tensor | None = None  # [B, T] how much both modalities take the segment for an event, 0 to 1
    modality_logits: Tensor | None = None  # [B, K] the category as each modality finds it, the mean of the two
    views: Tensor | None = None  # [B, 2, T, D] segment features of length 1 and, second, those of a noisy copy


#: The fields that a network may leave out, or not: `Network.extra_outputs`.
EXTRA_OUTPUTS = frozenset(Output._field_defaults)


def l2_normalize(x: Tensor) -> Tensor:
    """`x` [..., D] scaled to length 1; a zero vector stays zero, with gradient zero (`F.normalize`'s is 1e12 there)."""
    squares = x.square().sum(-1, keepdim=True)
    nonzero = squares > 1e-24
    return torch.where(nonzero, x / torch.where(nonzero, squares, 1.0).sqrt(), 0.0)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """[..., D], [..., D] -> [...]."""
    return (l2_normalize(x) * l2_normalize(y)).sum(-1)


@dataclass(frozen=True)
class DropoutSettings:
    dropout: float = setting(0.1, "share of activations that training sets to 0", ge=0, lt=1)


class Network(nn.Module):
    """Base of all networks: brings the features to a published size, in the right dtype, without a blanked modality.

    The published networks take 128 audio and 512 or 1024 visual channels. For other counts a linear layer stands in
    front (to 128 and 512); at the published sizes there is none.

    A network's constructor takes its `Settings`, then by keyword what `models.build_model` lists.

    Attributes:
        Settings: a frozen dataclass of `setting` fields. Its keys stand in the section `model` of the configuration.
        published_names: what to replace in a parameter's name of the published code: (pattern, replacement), in order.
        published_unused: matches published parameters that no output depends on. They have no counterpart here: DDP
            and ZeRO wait for the gradient of each parameter.
        extra_outputs: the fields of `Output` with a default that it fills with full supervision, for objectives.
    """

    Settings: ClassVar[type] = NoSettings
    published_names: ClassVar[tuple[tuple[str, str], ...]] = ()
    published_unused: ClassVar[str] = r"$"
    extra_outputs: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        *,
        visual_channels: int,
        audio_channels: int,
        modality: Literal["both", "audio", "visual"] = "both",
        positions: int = POSITIONS,
    ) -> None:
        super().__init__()
        self.modality, self.positions = modality, positions
        fits = visual_channels in PUBLISHED_VISUAL
        self.visual_channels = visual_channels if fits else PUBLISHED_VISUAL[0]
        self.visual_in = None if fits else nn.Linear(visual_channels, self.visual_channels)
        self.audio_channels = PUBLISHED_AUDIO
        self.audio_in = None if audio_channels == PUBLISHED_AUDIO else nn.Linear(audio_channels, PUBLISHED_AUDIO)
        self.calibrate(1.0, 1.0)

    @classmethod
    def convert_published(cls, name: str, value: Tensor) -> Iterable[tuple[str, Tensor]]:
        """A published parameter, renamed already, as parameters of this network; by default itself."""
        return [(name, value)]

    @torch.no_grad()
    def calibrate(self, visual_rms: float, audio_rms: float) -> None:
        """Start the layers in front as isometries that bring features of these root mean squares to about 1.

        Encoders differ in scale by orders of magnitude. Features that are too large saturate the attention's tanh, and
        training then starts from a random place to look at: one seed in four never finds the event.
        """
        for layer, rms in ((self.visual_in, visual_rms), (self.audio_in, audio_rms)):
            if layer is not None:
                nn.init.orthogonal_(layer.weight, gain=max(1.0, layer.out_features / layer.in_features) ** 0.5)
                layer.weight /= max(rms, 1e-6)
                nn.init.zeros_(layer.bias)

    def start_step(self, progress: float) -> None:
        """Called before each training step. progress: the share of the epochs that are done, 0 to 1."""
        return

    def forward(self, visual: Tensor, audio: Tensor) -> Output:
        raise NotImplementedError

    def inputs(self, visual: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, H, W, C] (or [B, T, C]: P = 1), [B, T, A] -> [B, T, P, C], [B, T, 128].

        The maps are still to go through `visual_in`.

        Raises:
            ValueError: another number of positions, P = H·W, than the network was built for.
        """
        grid = visual.shape[2:-1]
        if positions_of(visual.shape[1:]) != self.positions:
            found = "vectors" if not grid else f"maps of {' by '.join(map(str, grid))} positions"
            raise ValueError(f"visual features are {found}; this network takes {describe_positions(self.positions)}")
        device = visual.device.type
        dtype = next(self.parameters()).dtype
        # Under autocast the maps are brought to its dtype once, here, and not again by each of their two uses.
        wide = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
        visual = torch.zeros_like(visual, dtype=wide) if self.modality == "audio" else visual.to(wide)
        audio = torch.zeros_like(audio, dtype=dtype) if self.modality == "visual" else audio.to(dtype)
        visual = visual.unsqueeze(2) if not grid else visual.flatten(2, 3)
        if self.audio_in is not None:
            with autocast_disabled(audio):
                audio = self.audio_in(audio)
        return visual, audio


def positions_of(shape: Sequence[int]) -> int:
    """Of visual features of `shape` [T, H, W, C]: H·W. Of vectors, [T, C]: 1."""
    return math.prod(shape[1:-1])


def describe_positions(positions: int) -> str:
    """`maps of 49 positions, as 7 by 7`."""
    if positions == 1:
        return "vectors, or maps of one position"
    side = math.isqrt(positions)
    return f"maps of {positions} positions" + (f", as {side} by {side}" if side * side == positions else "")


def start_step(module: nn.Module, progress: float) -> None:
    """See `Network.start_step`; a module of another kind has no use for it."""
    if isinstance(module, Network):
        module.start_step(progress)


def autocast_disabled(x: Tensor) -> torch.autocast:
    """No autocast inside: only the products over all positions of the maps gain from it, and LSTMs fail in it."""
    return torch.autocast(x.device.type, enabled=False)


class AudioGuidedAttention(nn.Module):
    """Weighs the positions of a map by what is audio_scores (AVEL, Tian et al. 2018, section 4.2).

    visual [B, T, P, C], audio [B, T, A] -> attended visual features [B, T, C], attention [B, T, P]. With `front`, a
    linear layer that maps [..., C'] to [..., C], `visual` is [B, T, P, C'].
    """

    def __init__(self, visual_channels: int, positions: int, hidden: int = 512) -> None:
        super().__init__()
        self.affine_audio = nn.Linear(PUBLISHED_AUDIO, hidden)
        self.affine_video = nn.Linear(visual_channels, hidden)
        self.affine_v = nn.Linear(hidden, positions, bias=False)
        self.affine_g = nn.Linear(hidden, positions, bias=False)
        self.affine_h = nn.Linear(positions, 1, bias=False)
        for layer in (self.affine_audio, self.affine_video, self.affine_v, self.affine_g, self.affine_h):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, visual: Tensor, audio: Tensor, front: nn.Linear | None = None) -> tuple[Tensor, Tensor]:
        if front is None:
            projected = self.affine_video(visual)
        else:
            # Two linear layers in a row are one. At 64 channels this is a fifth of the work of applying both to each
            # of the positions; weights and gradients are the same.
            with autocast_disabled(audio):
                weight, bias = self.affine_video.weight @ front.weight, self.affine_video(front.bias)
            projected = F.linear(visual, weight, bias)
        visual_scores = self.affine_v(F.relu(projected))  # [B, T, P, P]
        audio_scores = self.affine_g(F.relu(self.affine_audio(audio)))  # [B, T, P]: one number a position
        scores = self.affine_h(torch.tanh(visual_scores + audio_scores.unsqueeze(-1))).squeeze(-1)
        attention = F.softmax(scores.to(audio.dtype), dim=-1)
        attended = torch.matmul(attention.to(visual.dtype).unsqueeze(-2), visual).squeeze(-2).to(audio.dtype)
        if front is not None:
            with autocast_disabled(audio):
                attended = front(attended)  # the weights of the positions sum to 1: before or after is the same
        return attended, attention


class OnlyPosition(nn.Module):
    """In the place of an attention where there is one position: nothing to weigh, no parameters."""

    def forward(self, visual: Tensor, audio: Tensor, front: nn.Linear | None = None) -> tuple[Tensor, None]:
        attended = visual.squeeze(2).to(audio.dtype)
        if front is not None:
            with autocast_disabled(audio):
                attended = front(attended)
        return attended, None


def place_attention(visual_channels: int, positions: int) -> AudioGuidedAttention | OnlyPosition:
    """The audio-guided attention over `positions`, or what stands for it at one. See `AudioGuidedAttention`."""
    return AudioGuidedAttention(visual_channels, positions) if positions > 1 else OnlyPosition()


class BiLSTM(nn.LSTM):
    """[B, T, inputs] -> [B, T, 2·hidden], batch first, one layer, both directions."""

    def __init__(self, inputs: int, hidden: int = 128) -> None:
        super().__init__(inputs, hidden, batch_first=True, bidirectional=True)


class Classifier(nn.Module):
    """fusion [B, T, D] -> event logits [B, T], category logits [B, K], video logits [B, K] (weak supervision) or None.

    Weakly supervised (multiple-instance learning), a video's logits are the largest over its segments of
    sigmoid(event logit) · category logits.
    """

    def __init__(
        self,
        width: int,
        categories: int,
        supervision: Literal["full", "weak"],
        pooling: Literal["mean", "max"] = "mean",
    ) -> None:
        super().__init__()
        self.weak = supervision == "weak"
        self.pooling = pooling
        self.event = nn.Linear(width, 1)
        self.category = nn.Linear(width, categories)

    def forward(self, fusion: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        event = self.event(fusion).squeeze(-1)
        category = self.category(fusion.mean(1) if self.pooling == "mean" else fusion.max(1).values)
        if not self.weak:
            return event, category, None
        gated = event.sigmoid().unsqueeze(-1) * category.unsqueeze(1)  # [B, T, K]
        return event, category, gated.max(1).values
