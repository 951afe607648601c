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
class ModalitySequence:
    """One modality as a sequence: a state token (present or absent), followed by the frames.

    Args:
        content: (B, 1 + T, d) content embeddings.
        clock: (B, 1 + T, d) time embeddings; zero for the state token.
        fractions: (B, T) times of the frames as fractions of the clip, from 0 to 1.
        mask: (B, 1 + T) bool, True at valid positions. The state token is always valid.
        present: (B,) bool, True if the sample has this modality.
    """

    content: torch.Tensor
    clock: torch.Tensor
    fractions: torch.Tensor
    mask: torch.Tensor
    present: torch.Tensor

    @property
    def states(self) -> torch.Tensor:
        """(B, 1 + T, d), the sum of content and time embeddings."""
        return self.content + self.clock


def masked_mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of (B, T, d) over the positions where `mask` (B, T) is True; zero if there are none."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def masked_softmax(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension in float32.

    A weight is exactly 0 where `mask` is False; a row without any True is all 0.
    """
    weights = scores.float().masked_fill(~mask, torch.finfo(torch.float32).min).softmax(-1)
    return weights.masked_fill(~mask, 0.0)


class Attention(nn.Module):
    """Multi-head attention of queries (B, Q, d) over the keys (B, S, d) where `mask` (B, S) is True."""

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
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
        return self.out(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
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
    """Pools a sequence with K learned queries: (B, S, d) and its mask -> K distinct latents (B, K, d)."""

    def __init__(self, config: EGMFConfig):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(config.num_pseudo_tokens, config.fusion_hidden_size))
        self.norm = nn.LayerNorm(config.fusion_hidden_size)
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        queries = self.queries.unsqueeze(0).expand(states.shape[0], -1, -1)
        latents = queries + self.attention(queries, self.norm(states), mask)
        return latents + self.feed_forward(latents)


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

    def forward(self, sequences: dict[str, ModalitySequence]) -> torch.Tensor:
        """-> (B, M, K, d)."""
        latents = []
        for name, sequence in sequences.items():
            states, mask = [sequence.content[:, :1]], [sequence.mask[:, :1]]
            frames, frame_mask = sequence.content[:, 1:], sequence.mask[:, 1:]
            if frames.shape[1]:
                deviation = frames - masked_mean(frames, frame_mask).unsqueeze(1)
                frames = self.contrast[name](torch.cat([frames, deviation], dim=-1))
                frames = frames.masked_fill(~frame_mask.unsqueeze(-1), 0.0)
                for conv, scale in zip(self.scales[name], self.scale_embedding, strict=True):
                    scaled = F.gelu(frames + conv(frames.transpose(1, 2)).transpose(1, 2)) + scale
                    hidden = scaled.masked_fill(~frame_mask.unsqueeze(-1), torch.finfo(scaled.dtype).min)
                    peak = hidden.amax(1, keepdim=True).masked_fill(~sequence.present[:, None, None], 0.0)
                    states += [scaled, peak + self.peak_embedding]
                    mask += [frame_mask, sequence.present.unsqueeze(1)]
            latents.append(self.pooling(torch.cat(states, 1), torch.cat(mask, 1)))
        return torch.stack(latents, 1)


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
        self.pooling = LatentPooling(config)
        self.norm = nn.LayerNorm(size)
        self.nothing = nn.Parameter(torch.empty(size))  # the only key when no other modality is present
        self.cross_attention = Attention(config)
        self.own = nn.Linear(size, size)
        self.others = nn.Linear(size, size)
        self.relation = FeedForward(config, in_size=4 * size)

    def summarize(self, name: str, sequence: ModalitySequence) -> torch.Tensor:
        """Summarises one modality in K latents: (B, K, d)."""
        # Word order carries meaning. Audio and vision give the same summary when played backwards.
        states, mask = sequence.states if name == "text" else sequence.content, sequence.mask
        if name != "text" and states.shape[1] > 1:
            stretch = (sequence.fractions * self.num_stretches).long().clamp(max=self.num_stretches - 1)
            # Not `F.one_hot`, whose check of the values waits for an accelerator.
            stretches = torch.arange(self.num_stretches, device=stretch.device)
            inside = (stretch.unsqueeze(-1) == stretches) & mask[:, 1:, None]  # (B, T, stretches)
            share = inside / inside.sum(1, keepdim=True).clamp(min=1)
            # Padding may contain any value, including NaN.
            frames = states[:, 1:].masked_fill(~mask[:, 1:, None], 0.0)
            means = torch.einsum("bts,btd->bsd", share.to(frames), frames)
            states, mask = torch.cat([states[:, :1], means], 1), torch.cat([mask[:, :1], inside.any(1)], 1)
        return self.norm(self.pooling(states, mask))

    def forward(self, sequences: dict[str, ModalitySequence]) -> torch.Tensor:
        """-> (B, M, K, d)."""
        summaries = {name: self.summarize(name, sequence) for name, sequence in sequences.items()}
        latents = []
        for name, latent in summaries.items():
            keys = [self.nothing.expand(len(latent), 1, -1)]
            key_mask = [sequences[name].mask[:, :1]]
            for other, sequence in sequences.items():
                if other != name:
                    keys.append(summaries[other])
                    key_mask.append(sequence.present[:, None].expand(-1, latent.shape[1]))
            attended = self.cross_attention(latent, torch.cat(keys, 1), torch.cat(key_mask, 1))
            own, others = self.own(latent), self.others(attended)
            relation = self.relation(torch.cat([own, others, own * others, (own - others).abs()], dim=-1))
            latents.append(latent + relation)
        return torch.stack(latents, 1)


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

    def components(self, name: str, sequence: ModalitySequence) -> tuple[torch.Tensor, torch.Tensor]:
        """The state token and the C cosine components, (B, 1 + C, d), with their mask (B, 1 + C)."""
        mask = sequence.mask[:, 1:, None]
        orders = torch.arange(len(self.component_embedding), device=mask.device)
        # The transform scales its components by 2 / T, and the mean (order 0) by 1 / T.
        weights = torch.where(orders > 0, 2.0, 1.0) / mask.sum(1, keepdim=True).clamp(min=1)
        waves = (math.pi * sequence.fractions.unsqueeze(-1) * orders).cos() * weights * mask  # (B, T, C)
        frames = sequence.content[:, 1:].masked_fill(~mask, 0.0)
        components = torch.einsum("btc,btd->bcd", waves.to(frames), frames)
        components = self.proj[name](components) + self.component_embedding
        states = torch.cat([sequence.content[:, :1], components], 1)
        component_mask = sequence.present[:, None].expand(-1, len(orders))
        return states, torch.cat([sequence.mask[:, :1], component_mask], 1)

    def forward(self, sequences: dict[str, ModalitySequence]) -> torch.Tensor:
        """-> (B, M, K, d)."""
        parts = [self.components(name, sequence) for name, sequence in sequences.items()]
        states, mask = (torch.cat(column, 1) for column in zip(*parts, strict=True))
        for layer in self.layers:
            states = layer(states, mask)
        split = states.shape[1] // len(parts)
        parts = zip(states.split(split, 1), mask.split(split, 1), strict=True)
        return torch.stack([self.pooling(part, part_mask) for part, part_mask in parts], 1)


EXPERT_CLASSES = {"local": LocalExpert, "semantic": SemanticExpert, "global": GlobalExpert}
