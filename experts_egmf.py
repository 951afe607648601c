"""The three experts of EGMF: local, semantic correlation, and global.

The paper (arXiv 2601.07565) names them; their layers are our own choice.

Shape letters: B samples, T frames of a modality, M modalities, K pseudo tokens, d the fusion's hidden size.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_egmf import EGMFConfig


@dataclass
class ClipSequence:
    """All modalities of a batch as one sequence: a state token each (present or absent), and the frames side by side.

    Operations on the frames of all modalities thus run once. A GPU spends more time on launching them than on the
    frames that other modalities add.

    Args:
        states: (B, M, d) state tokens.
        frames: (B, T, d) content embeddings of the frames, modality by modality; zero at padding.
        fractions: (B, T) times of the frames as fractions of the clip, from 0 to 1.
        padding: (B, T) bool, True where no valid frame is.
        lengths: Number of frames of each modality, at least 1 (masked if the batch lacks the modality).
        owner: (T,) index of the modality of each frame.
        inside: (B, M, T) bool, True at the valid frames of a modality.
        share: (B, M, T), weights for the mean over a modality's frames; zero for an absent modality.
        present: (B, M) bool, True if the sample has the modality.
        own: (M, M) bool, the identity matrix.
    """

    states: torch.Tensor
    frames: torch.Tensor
    fractions: torch.Tensor
    padding: torch.Tensor
    lengths: dict[str, int]
    owner: torch.Tensor
    inside: torch.Tensor
    share: torch.Tensor
    present: torch.Tensor
    own: torch.Tensor

    def split(self, frames: torch.Tensor, dim: int = 1) -> dict[str, torch.Tensor]:
        """Splits a tensor with T frames by modality."""
        return dict(zip(self.lengths, frames.split([*self.lengths.values()], dim), strict=True))


def masked_mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of (B, T, d) over the positions where `mask` (B, T) is True; zero if there are none."""
    weights = mask / mask.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("bt,btd->bd", weights.to(states.dtype), states)


def masked_softmax(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension in float32.

    A weight is exactly 0 where `mask` is False; a row without any True is all 0.
    """
    absent = ~mask
    weights = scores.float().masked_fill(absent, torch.finfo(torch.float32).min).softmax(-1)
    return weights.masked_fill(absent, 0.0)


class Attention(nn.Module):
    """Multi-head attention of queries (B or 1, Q, d) over keys (B, S, d).

    `mask` (B, Q or 1, S) selects the keys; every query needs at least one.
    """

    def __init__(self, config: EGMFConfig):
        super().__init__()
        size = config.fusion_hidden_size
        self.num_heads = config.fusion_num_attention_heads
        self.query = nn.Linear(size, size)
        self.key_value = nn.Linear(size, 2 * size)
        self.out = nn.Linear(size, size)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query = self.query(queries).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key, value = self.key_value(keys).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query = query.expand(len(keys), -1, -1, -1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.unsqueeze(1))
        return self.out(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    """Layer norm and two linear layers, (..., in_size or d) -> (..., d)."""

    def __init__(self, config: EGMFConfig, in_size: int | None = None):
        size = config.fusion_hidden_size
        super().__init__(
            nn.LayerNorm(in_size or size),
            nn.Linear(in_size or size, config.fusion_intermediate_size),
            nn.GELU(),
            nn.Dropout(config.fusion_dropout),
            nn.Linear(config.fusion_intermediate_size, size),
        )


class LatentPooling(nn.Module):
    """Pools the keys of each modality with K learned queries, the same for all modalities, into K distinct latents."""

    def __init__(self, config: EGMFConfig):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(config.num_pseudo_tokens, config.fusion_hidden_size))
        self.norm = nn.LayerNorm(config.fusion_hidden_size)
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Keys (B, S, d), and a mask (B, M, S) that selects those of each modality -> (B, M, K, d)."""
        queries = self.queries.repeat(mask.shape[1], 1).unsqueeze(0)
        keys = mask.repeat_interleave(len(self.queries), 1)
        latents = queries + self.attention(queries, self.norm(states), keys)
        latents = latents + self.feed_forward(latents)
        return latents.unflatten(1, (mask.shape[1], -1))


class LocalExpert(nn.Module):
    """Fine-grained local expert: models brief events inside each modality.

    Each frame is combined with its deviation from the clip's mean, so that unusual moments stand out. Depth-wise
    convolutions with several kernel widths (scales) then process short stretches of frames. The latents attend to
    every frame at every scale and to one peak per scale, the maximum of each channel over time. The peak keeps a brief
    event visible in a clip of any length. This expert receives no time embeddings: an event has the same effect
    wherever it occurs in the clip.
    """

    def __init__(self, config: EGMFConfig):
        super().__init__()
        size = config.fusion_hidden_size
        self.contrast = nn.ModuleDict({name: nn.Linear(2 * size, size) for name in config.modalities})
        self.scales = nn.ModuleDict(
            {
                name: nn.ModuleList(
                    nn.Conv1d(size, size, width, padding=width // 2, groups=size)
                    for width in config.local_kernel_sizes
                )
                for name in config.modalities
            }
        )
        self.scale_embedding = nn.Parameter(torch.empty(len(config.local_kernel_sizes), size))
        self.peak_embedding = nn.Parameter(torch.empty(size))
        self.pooling = LatentPooling(config)

    def forward(self, clip: ClipSequence) -> torch.Tensor:
        """-> (B, M, K, d)."""
        means = clip.share.to(clip.frames) @ clip.frames
        deviation = clip.frames - means[:, clip.owner]
        pairs = zip(clip.split(clip.frames).values(), clip.split(deviation).values(), strict=True)
        frames = [contrast(torch.cat(pair, -1)) for contrast, pair in zip(self.contrast.values(), pairs, strict=True)]
        frames = torch.cat(frames, 1).masked_fill(clip.padding.unsqueeze(-1), 0.0)
        by_time = clip.split(frames.mT, -1)  # (B, d, T) each
        convolved = [torch.stack([conv(by_time[name]) for conv in scales], 1) for name, scales in self.scales.items()]
        scaled = F.gelu(frames.mT.unsqueeze(1) + torch.cat(convolved, -1)) + self.scale_embedding.unsqueeze(-1)
        hidden = scaled.masked_fill(clip.padding[:, None, None], torch.finfo(scaled.dtype).min)
        peaks = torch.stack([part.amax(-1) for part in clip.split(hidden, -1).values()], 1)  # (B, M, scales, d)
        peaks = peaks.masked_fill(~clip.present[:, :, None, None], 0.0) + self.peak_embedding
        states = torch.cat([clip.states, *scaled.mT.unbind(1), peaks.flatten(1, 2)], 1)
        own_peaks = (clip.own & clip.present.unsqueeze(1)).repeat_interleave(scaled.shape[1], 2)
        own_states = clip.own.expand(len(states), -1, -1)
        return self.pooling(states, torch.cat([own_states, *[clip.inside] * scaled.shape[1], own_peaks], -1))


class PlaceEmbedding(nn.Module):
    """Embeds places as fractions of the clip, (B, T) from 0 to 1, with sinusoids: -> (B, T, d)."""

    OCTAVES = 6  # from half a turn per clip

    def __init__(self, hidden_size: int):
        super().__init__()
        self.register_buffer("frequencies", self.compute_frequencies(), persistent=False)
        self.proj = nn.Linear(2 * self.OCTAVES, hidden_size)

    def compute_frequencies(self) -> torch.Tensor:
        """Angular frequencies (OCTAVES,)."""
        return math.pi * 2.0 ** torch.arange(self.OCTAVES, dtype=torch.float32)

    def forward(self, fractions: torch.Tensor) -> torch.Tensor:
        angles = fractions.unsqueeze(-1) * self.frequencies
        return self.proj(torch.cat([angles.sin(), angles.cos()], -1).to(self.proj.weight.dtype))


class SemanticExpert(nn.Module):
    """Semantic correlation expert: models how the modalities relate to each other.

    Each modality is first summarised in K latents. Text is pooled over all tokens; audio and vision are averaged over
    stretches of the clip and pooled without order, so that neither a single moment nor the course of time dominates.
    Each latent is then compared with the result of its cross-attention to the other modalities. The comparison uses
    both vectors, their product (agreement) and their absolute difference (disagreement).
    """

    def __init__(self, config: EGMFConfig):
        super().__init__()
        size = config.fusion_hidden_size
        self.num_stretches = config.semantic_num_stretches
        self.place = PlaceEmbedding(size)
        self.pooling = LatentPooling(config)
        self.norm = nn.LayerNorm(size)
        self.nothing = nn.Parameter(torch.empty(size))  # the only key when no other modality is present
        self.cross_attention = Attention(config)
        self.own = nn.Linear(size, size)
        self.others = nn.Linear(size, size)
        self.relation = FeedForward(config, in_size=4 * size)

    def summarize(self, clip: ClipSequence) -> torch.Tensor:
        """Summarises each modality in K latents: (B, M, K, d)."""
        # Word order carries meaning. Audio and vision give the same summary when played backwards.
        words = next(iter(clip.lengths.values()))
        text = clip.frames[:, :words] + self.place(clip.fractions[:, :words]).to(clip.frames)
        numbers = torch.arange(self.num_stretches, device=text.device).unsqueeze(1)
        stretch = (clip.fractions[:, words:] * self.num_stretches).long().clamp(max=self.num_stretches - 1)
        within = (stretch.unsqueeze(1) == numbers).unsqueeze(1) & clip.inside[:, 1:, None, words:]  # (B, M - 1, n, T)
        counts = within.sum(-1)
        share = within / counts.clamp(min=1).unsqueeze(-1)
        means = share.flatten(1, 2).to(text) @ clip.frames[:, words:]
        used = (clip.own[:, 1:, None] & (counts > 0).unsqueeze(1)).flatten(2)  # (B, M, (M - 1) n)
        own = clip.own.expand(len(text), -1, -1)
        mask = torch.cat([own, clip.inside[..., :words], used], -1)
        return self.norm(self.pooling(torch.cat([clip.states, text, means], 1), mask))

    def forward(self, clip: ClipSequence) -> torch.Tensor:
        """-> (B, M, K, d)."""
        summaries = self.summarize(clip)
        latents, each = summaries.flatten(1, 2), summaries.shape[2]
        keys = torch.cat([self.nothing.expand(len(latents), 1, -1), latents], 1)
        others = (~clip.own & clip.present.unsqueeze(1)).repeat_interleave(each, 2)
        mask = F.pad(others, (1, 0), value=True).repeat_interleave(each, 1)
        own, others = self.own(latents), self.others(self.cross_attention(latents, keys, mask))
        relation = self.relation(torch.cat([own, others, own * others, (own - others).abs()], dim=-1))
        return (latents + relation).view_as(summaries)


class GlobalLayer(nn.Module):
    """Pre-norm transformer layer over (B, S, d)."""

    def __init__(self, config: EGMFConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.fusion_hidden_size)
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        normed = self.norm(states)
        states = states + self.attention(normed, normed, mask)
        return states + self.feed_forward(states)


class GlobalExpert(nn.Module):
    """Global context expert: models how the whole clip develops, over all modalities jointly.

    For each modality it computes the lowest components of a discrete cosine transform over the clip (the mean, the
    rise or fall, and so on). One token thus represents a slow change even if the frames are noisy, and a brief event
    has little effect. A transformer relates the components of all modalities.
    """

    def __init__(self, config: EGMFConfig):
        super().__init__()
        size = config.fusion_hidden_size
        self.component_embedding = nn.Parameter(torch.empty(config.global_num_components, size))
        self.proj = nn.ModuleDict({name: nn.Linear(size, size) for name in config.modalities})
        self.layers = nn.ModuleList(GlobalLayer(config) for _ in range(config.global_num_layers))
        self.pooling = LatentPooling(config)

    def components(self, clip: ClipSequence) -> torch.Tensor:
        """The C cosine components of each modality, (B, M, C, d)."""
        orders = torch.arange(len(self.component_embedding), device=clip.frames.device).unsqueeze(1)
        # The transform scales its components by 2 / T, and the mean (order 0) by 1 / T.
        waves = (math.pi * clip.fractions.unsqueeze(1) * orders).cos() * (orders.clamp(max=1) + 1)  # (B, C, T)
        weights = (waves.unsqueeze(1) * clip.share.unsqueeze(2)).flatten(1, 2)
        components = (weights.to(clip.frames) @ clip.frames).unflatten(1, (-1, len(orders)))
        by_modality = components.transpose(0, 1).contiguous()  # one copy, where each projection would make its own
        projected = [proj(part) for proj, part in zip(self.proj.values(), by_modality, strict=True)]
        return torch.stack(projected, 1) + self.component_embedding

    def forward(self, clip: ClipSequence) -> torch.Tensor:
        """-> (B, M, K, d)."""
        components = self.components(clip)
        states = torch.cat([clip.states.unsqueeze(2), components], 2)
        # The state tokens are always valid.
        valid = F.pad(clip.present.unsqueeze(-1).expand(components.shape[:3]), (1, 0), value=True)  # (B, M, 1 + C)
        states, mask = states.flatten(1, 2), valid.flatten(1).unsqueeze(1)
        for layer in self.layers:
            states = layer(states, mask)
        return self.pooling(states, (clip.own.unsqueeze(-1) & valid.unsqueeze(1)).flatten(2))


EXPERT_CLASSES = {"local": LocalExpert, "semantic": SemanticExpert, "global": GlobalExpert}
