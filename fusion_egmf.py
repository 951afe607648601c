"""The fusion of EGMF: modality sequences, the three experts, the hierarchical gate and the pseudo-token projector.

Expert-Guided Multimodal Fusion with large language models (arXiv 2601.07565) names these parts and how they are
chained; it gives no layer-level detail. Layer choices below are this implementation's own.

Shape letters: B samples, T frames of a modality, M modalities, E experts, K pseudo tokens, d the fusion's hidden size,
H the LLM's.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .configuration_egmf import EGMFConfig
from .towers_egmf import tower_num_states, tower_size


@dataclass
class ModalitySequence:
    """One modality on the common clock: a state token (present or absent), then its frames.

    Args:
        content: (B, 1 + T, d), what is there.
        clock: (B, 1 + T, d), when it is; zero for the state token.
        fractions: (B, T), where on the clip the frames are, from 0 to 1.
        mask: (B, 1 + T) bool, True where a position holds something; the state token always does.
        present: (B,) bool.
    """

    content: torch.Tensor
    clock: torch.Tensor
    fractions: torch.Tensor
    mask: torch.Tensor
    present: torch.Tensor

    @property
    def states(self) -> torch.Tensor:
        """(B, 1 + T, d), what and when."""
        return self.content + self.clock


def clip_fractions(mask: torch.Tensor, times: torch.Tensor | None, span: torch.Tensor) -> torch.Tensor:
    """Where frames are on the clip, (B, T) from 0 to 1: by their seconds where these are known, otherwise by order.

    Args:
        mask: (B, T) bool.
        times: (B, T) seconds, NaN where not known, or None.
        span: (B, 2) first and last known second of all modalities, NaN where there is none.
    """
    fractions = (mask.cumsum(1) - 0.5) / mask.sum(1, keepdim=True).clamp(min=1)
    if times is not None:
        start, end = span[:, :1], span[:, 1:]
        by_seconds = (times.float() - start) / (end - start)
        fractions = torch.where(torch.isfinite(by_seconds), by_seconds, fractions)
    return fractions.clamp(0, 1)


def clip_span(inputs: Iterable[tuple[torch.Tensor | None, torch.Tensor | None]], like: torch.Tensor) -> torch.Tensor:
    """First and last known second over all modalities' (mask, times), each (B, T): (B, 2), NaN where none is known."""
    first = torch.full((len(like),), torch.inf, device=like.device)
    last = -first
    for mask, times in inputs:
        if mask is not None and times is not None and times.shape[1]:
            known = mask.bool() & torch.isfinite(times)
            first = torch.minimum(first, times.float().masked_fill(~known, torch.inf).amin(1))
            last = torch.maximum(last, times.float().masked_fill(~known, -torch.inf).amax(1))
    return torch.stack([first, last], 1).masked_fill((first >= last).unsqueeze(1), torch.nan)


def masked_mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over dimension 1 of (B, T, d) where (B, T) `mask` is True; zero where nothing is."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def masked_softmax(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension in float32, exactly 0 where `mask` is False, all 0 where nothing is True."""
    weights = scores.float().masked_fill(~mask, torch.finfo(torch.float32).min).softmax(-1)
    return weights.masked_fill(~mask, 0.0)


def average_frames(
    features: torch.Tensor, mask: torch.Tensor, times: torch.Tensor | None, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Every `size` consecutive frames as one, the mean of those in use: (B, T, width), (B, T), (B, T) -> T / size."""
    missing = -mask.shape[1] % size
    split = (mask.shape[1] + missing) // size, size
    mask = F.pad(mask, (0, missing)).unflatten(1, split)
    weights = mask / mask.sum(-1, keepdim=True).clamp(min=1)
    features = F.pad(features, (0, 0, 0, missing)).unflatten(1, split)
    features = torch.einsum("bts,btsd->btd", weights.to(features), features)
    if times is not None:
        times = F.pad(times.float(), (0, missing)).unflatten(1, split).masked_fill(~mask, 0.0)
        times = (times * weights).sum(-1)
    return features, mask.any(-1), times


class ClockEmbedding(nn.Module):
    """Position on the clip's clock -> d: sinusoids of the fraction of the clip and, where known, of the seconds."""

    FRACTION_OCTAVES = 6
    SECOND_OCTAVES = 9  # periods of 0.25 s to 64 s

    def __init__(self, hidden_size: int):
        super().__init__()
        self.register_buffer("frequencies", self.compute_frequencies(), persistent=False)
        self.proj = nn.Linear(2 * (self.FRACTION_OCTAVES + self.SECOND_OCTAVES), hidden_size)

    def compute_frequencies(self) -> torch.Tensor:
        """Angular frequencies, of the fraction (half a turn per clip and its octaves), then of seconds."""
        fraction = math.pi * 2.0 ** torch.arange(self.FRACTION_OCTAVES, dtype=torch.float32)
        seconds = 2 * math.pi / (0.25 * 2.0 ** torch.arange(self.SECOND_OCTAVES, dtype=torch.float32))
        return torch.cat([fraction, seconds])

    def forward(self, fractions: torch.Tensor, times: torch.Tensor | None) -> torch.Tensor:
        """(B, T) fractions of the clip and (B, T) seconds (NaN where not known) -> (B, T, d)."""
        seconds = torch.full_like(fractions, torch.nan) if times is None else times.to(fractions.dtype)
        known = torch.isfinite(seconds)
        clock = torch.cat(
            [
                fractions.unsqueeze(-1).expand(-1, -1, self.FRACTION_OCTAVES),
                seconds.masked_fill(~known, 0.0).unsqueeze(-1).expand(-1, -1, self.SECOND_OCTAVES),
            ],
            dim=-1,
        )
        angles = clock * self.frequencies
        # Unknown seconds give no sinusoid at all: a cosine of 0 would read as "second zero".
        audible = torch.ones_like(angles)
        audible[..., self.FRACTION_OCTAVES :] = known.unsqueeze(-1).to(angles.dtype)
        waves = torch.cat([angles.sin() * audible, angles.cos() * audible], dim=-1)
        return self.proj(waves.to(self.proj.weight.dtype))


class Attention(nn.Module):
    """Multi-head attention of queries (B, Q, d) over keys (B, S, d) where (B, S) `mask` is True."""

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
    """K learned queries read a sequence: (B, S, d) and its mask -> K distinct latents (B, K, d)."""

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
    """Fine-grained local expert: what happens briefly, inside each modality.

    Per modality, depth-wise convolutions at several widths look at short stretches of the frames beside their
    deviation from the clip's mean, so that what is unlike the rest of the clip stands out. Besides every (scale,
    frame) the latents read one peak per scale, the maximum over time channel by channel: a brief event reaches them
    however long the clip is. It is not told when on the clip a frame is: what happens matters here, wherever it does.
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
    """Semantic correlation expert: how the modalities relate to each other.

    Each modality is first summed up in K latents, the words from every token, voice and face from stretches of the
    clip in no order: what they say as a whole, not in a moment nor in the course of time. A latent is then described
    by itself, by what the other modalities say about it, by their product (agreement) and by their absolute difference
    (disagreement).
    """

    def __init__(self, config: EGMFConfig):
        super().__init__()
        size = config.fusion_hidden_size
        self.num_stretches = config.semantic_num_stretches
        self.pooling = LatentPooling(config)
        self.norm = nn.LayerNorm(size)
        self.nothing = nn.Parameter(torch.empty(size))  # what a modality hears when no other is present
        self.cross_attention = Attention(config)
        self.own = nn.Linear(size, size)
        self.others = nn.Linear(size, size)
        self.relation = FeedForward(config, in_size=4 * size)

    def summarize(self, name: str, sequence: ModalitySequence) -> torch.Tensor:
        """-> (B, K, d)."""
        # Words mean what they mean in their order; voice and face as a whole are the same played backwards.
        states, mask = sequence.states if name == "text" else sequence.content, sequence.mask
        if name != "text" and states.shape[1] > 1:
            stretch = (sequence.fractions * self.num_stretches).long().clamp(max=self.num_stretches - 1)
            inside = F.one_hot(stretch, self.num_stretches).bool() & mask[:, 1:, None]  # (B, T, stretches)
            share = inside / inside.sum(1, keepdim=True).clamp(min=1)
            # Padding may hold anything, NaN too.
            frames = states[:, 1:].masked_fill(~mask[:, 1:, None], 0.0)
            means = torch.einsum("bts,btd->bsd", share.to(frames), frames)
            states, mask = torch.cat([states[:, :1], means], 1), torch.cat([mask[:, :1], inside.any(1)], 1)
        return self.norm(self.pooling(states, mask))

    def forward(self, sequences: dict[str, ModalitySequence]) -> torch.Tensor:
        """-> (B, M, K, d)."""
        sums = {name: self.summarize(name, sequence) for name, sequence in sequences.items()}
        latents = []
        for name, latent in sums.items():
            heard = [self.nothing.expand(len(latent), 1, -1)]
            heard_mask = [sequences[name].mask[:, :1]]
            for other, sequence in sequences.items():
                if other != name:
                    heard.append(sums[other])
                    heard_mask.append(sequence.present[:, None].expand(-1, latent.shape[1]))
            attended = self.cross_attention(latent, torch.cat(heard, 1), torch.cat(heard_mask, 1))
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
    """Global context expert: how the whole clip runs, in all modalities at once.

    Of each modality it reads the lowest cosine components over the clip (those of a discrete cosine transform: its
    mean, its rise or fall, and so on), so that a slow change is one token however noisy the frames are and a brief
    event hardly shows. A transformer relates the components of all modalities.
    """

    def __init__(self, config: EGMFConfig):
        super().__init__()
        size = config.fusion_hidden_size
        self.component_embedding = nn.Parameter(torch.empty(config.global_num_components, size))
        self.proj = nn.ModuleDict({name: nn.Linear(size, size) for name in config.modalities})
        self.layers = nn.ModuleList(GlobalLayer(config) for _ in range(config.global_num_layers))
        self.pooling = LatentPooling(config)

    def components(self, name: str, sequence: ModalitySequence) -> tuple[torch.Tensor, torch.Tensor]:
        """State token and components with their mask: (B, 1 + C, d), (B, 1 + C)."""
        mask = sequence.mask[:, 1:, None]
        orders = torch.arange(len(self.component_embedding), device=mask.device)
        # The 2 / T of the transform, 1 / T of the mean.
        weights = torch.where(orders > 0, 2.0, 1.0) / mask.sum(1, keepdim=True).clamp(min=1)
        waves = (math.pi * sequence.fractions.unsqueeze(-1) * orders).cos() * weights * mask  # (B, T, C)
        frames = sequence.content[:, 1:].masked_fill(~mask, 0.0)
        components = torch.einsum("btc,btd->bcd", waves.to(frames), frames)
        components = self.proj[name](components) + self.component_embedding
        states = torch.cat([sequence.content[:, :1], components], 1)
        there = sequence.present[:, None].expand(-1, len(orders))
        return states, torch.cat([sequence.mask[:, :1], there], 1)

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


class HierarchicalGate(nn.Module):
    """Mixes the experts' latents (B, E, M, K, d) into K tokens (B, K, d), given the context and the prompt.

    Level 1 weighs the modalities inside an expert (one weight per expert and modality), level 2 the experts (one
    weight per pseudo token and expert). Both see the fused context, the mean of all latents, and the prompt.
    """

    def __init__(self, config: EGMFConfig):
        super().__init__()
        size = config.fusion_hidden_size
        self.gating = config.gating
        self.context = nn.Linear(size, size)
        self.prompt = nn.Linear(config.text_embedding_size, size)
        self.norm = nn.LayerNorm(size)
        # One scorer per level; a flat gate has one level. A softmax knows no bias.
        self.modality_score = nn.Linear(size, 1, bias=False) if config.gating == "hierarchical" else None
        self.expert_score = nn.Linear(size, 1, bias=False) if config.gating != "mean" else None
        self.expert_embedding = nn.Parameter(torch.empty(len(config.experts), size))
        self.modality_embedding = nn.Parameter(torch.empty(len(config.modalities), size))

    def score(self, scorer: nn.Linear, latents: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """(..., d) latents and a condition that broadcasts to them -> (...) scores."""
        return scorer(torch.tanh(self.norm(latents) + condition)).squeeze(-1)

    def forward(
        self, latents: torch.Tensor, present: torch.Tensor, prompt: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """`latents` (B, E, M, K, d), `present` (B, M) bool, `prompt` (B, H).

        Returns the mix (B, K, d), each expert by itself (B, E, K, d), of which that is the mix, and the weights by
        level.
        """
        num_experts, num_tokens = latents.shape[1], latents.shape[3]
        available = present[:, None, :].expand(-1, num_experts, -1)  # (B, E, M)
        if self.gating == "mean":
            modality = masked_softmax(torch.zeros_like(available, dtype=torch.float32), available)
            alone = torch.einsum("bem,bemkd->bekd", modality.to(latents), latents)
            expert = latents.new_full((len(latents), num_tokens, num_experts), 1 / num_experts).float()
        else:
            condition = self.context(latents.mean((1, 2, 3))) + self.prompt(prompt)  # (B, d)
            names = self.expert_embedding[:, None, :] + self.modality_embedding[None, :, :]  # (E, M, d)
            mix = self.mix_flat if self.gating == "flat" else self.mix_by_level
            alone, modality, expert = mix(latents, available, condition, names)
        mixed = torch.einsum("bke,bekd->bkd", expert.to(alone), alone)
        return mixed, alone, {"modality": modality, "expert": expert}

    def mix_by_level(self, latents, available, condition, names):
        """-> each expert by itself (B, E, K, d), weights of modalities (B, E, M) and of experts (B, K, E)."""
        where = condition[:, None, None] + names
        modality = masked_softmax(self.score(self.modality_score, latents.mean(3), where), available)
        alone = torch.einsum("bem,bemkd->bekd", modality.to(latents), latents)
        where = condition[:, None, None] + self.expert_embedding[:, None, :]
        scores = self.score(self.expert_score, alone, where)  # (B, E, K)
        return alone, modality, scores.float().softmax(1).transpose(1, 2)

    def mix_flat(self, latents, available, condition, names):
        """The same from one softmax over all pairs of expert and modality, for each pseudo token."""
        where = condition[:, None, None, None] + names[None, :, :, None]
        scores = self.score(self.expert_score, latents, where).permute(0, 3, 1, 2)  # (B, K, E, M)
        pairs = available[:, None].expand(-1, scores.shape[1], -1, -1)
        weights = masked_softmax(scores.flatten(2), pairs.flatten(2)).view_as(scores)
        expert, tiny = weights.sum(-1), torch.finfo(torch.float32).tiny
        inside = weights / expert.unsqueeze(-1).clamp(min=tiny)
        alone = torch.einsum("bkem,bemkd->bekd", inside.to(latents), latents)
        share = weights.sum(1)  # (B, E, M), over the pseudo tokens
        return alone, share / share.sum(-1, keepdim=True).clamp(min=tiny), expert


class PseudoTokenProjector(nn.Module):
    """Mixed latents (B, K, d) -> pseudo tokens (B, K, H) with the root mean square of the LLM's own embeddings."""

    def __init__(self, config: EGMFConfig):
        super().__init__()
        size = config.text_embedding_size
        self.token_embedding = nn.Parameter(torch.empty(config.num_pseudo_tokens, config.fusion_hidden_size))
        self.layers = nn.Sequential(
            nn.LayerNorm(config.fusion_hidden_size),
            nn.Linear(config.fusion_hidden_size, size),
            nn.GELU(),
            nn.Linear(size, size),
        )
        self.norm = nn.RMSNorm(size, elementwise_affine=False, eps=1e-6)
        self.embedding_rms = nn.Parameter(torch.empty(1))  # FSDP divides no scalars

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        # The token's own embedding keeps the K tokens apart, also where no modality is present.
        return self.norm(self.layers(latents + self.token_embedding)) * self.embedding_rms


class FeatureNorm(nn.Module):
    """Standardises precomputed features (..., size) by their training split's statistics, which travel with the model.

    A layer norm would take the level out of every frame, and with it what a loud voice or an open mouth says.
    """

    LIMIT = 5.0  # standard deviations; extractors are prone to outliers

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return ((features - self.mean) / self.std).clamp(-self.LIMIT, self.LIMIT)


class LayerMix(nn.Module):
    """Learned softmax mix of a tower's hidden layers: a tuple of (..., size) -> (..., size)."""

    def __init__(self, num_layers: int):
        super().__init__()
        self.weights = nn.Parameter(torch.empty(num_layers))

    def forward(self, hidden_states: tuple[torch.Tensor, ...]) -> torch.Tensor:
        weights = self.weights.softmax(0)
        return sum(weight * layer.to(weight.dtype) for weight, layer in zip(weights, hidden_states, strict=True))


class ClipStatistics(nn.Module):
    """A clip as a whole: mean and standard deviation over time of each of a modality's layers -> d.

    Speech says much of what is felt in how it sounds throughout, and few clips are enough to learn that: this is what
    a linear probe reads. The statistics are standardised by those of the training split, which travel with the model.
    """

    def __init__(self, num_layers: int, width: int, config: EGMFConfig):
        super().__init__()
        self.norm = FeatureNorm(2 * num_layers * width)
        self.dropout = nn.Dropout(config.fusion_dropout)
        self.proj = nn.Linear(2 * num_layers * width, config.fusion_hidden_size)

    @staticmethod
    def measure(layers: tuple[torch.Tensor, ...], mask: torch.Tensor) -> torch.Tensor:
        """(B, T, width) each, (B, T) mask -> (B, 2 * layers * width) in float32: the means, then the deviations."""
        mask = mask.bool()
        frames = torch.cat(layers, -1).float().masked_fill(~mask.unsqueeze(-1), 0.0)
        mean = masked_mean(frames, mask)
        variance = masked_mean((frames - mean.unsqueeze(1)).square(), mask)
        return torch.cat([mean, (variance + 1e-6).sqrt()], -1)  # the root has a gradient where nothing varies

    def forward(self, layers: tuple[torch.Tensor, ...], mask: torch.Tensor) -> torch.Tensor:
        return self.proj(self.dropout(self.norm(self.measure(layers, mask))))


class EGMFFusion(nn.Module):
    """All that EGMF adds to the LLM and the towers: modality sequences in, K pseudo tokens and gate weights out."""

    def __init__(self, config: EGMFConfig):
        super().__init__()
        size = config.fusion_hidden_size
        widths = {"text": config.text_embedding_size}
        self.layer_mix, self.clip_statistics = nn.ModuleDict(), nn.ModuleDict()
        for name in config.modalities[1:]:
            tower = getattr(config, f"{name}_config")
            widths[name] = getattr(config, f"{name}_feature_size") if tower is None else tower_size(tower)
            if tower is not None:
                self.layer_mix[name] = LayerMix(tower_num_states(tower))
            if name in config.clip_statistics:
                layers = 1 if tower is None else tower_num_states(tower)
                self.clip_statistics[name] = ClipStatistics(layers, widths[name], config)
        self.widths = widths
        self.clock = ClockEmbedding(size)
        self.input_norm = nn.ModuleDict(
            {
                name: nn.LayerNorm(width) if name == "text" or name in self.layer_mix else FeatureNorm(width)
                for name, width in widths.items()
            }
        )
        self.input_proj = nn.ModuleDict({name: nn.Linear(width, size) for name, width in widths.items()})
        self.dropout = nn.Dropout(config.fusion_dropout)
        self.feature_noise, self.frame_pooling = config.feature_noise, config.frame_pooling
        self.present_embedding = nn.Parameter(torch.empty(len(widths), size))
        self.absent_embedding = nn.Parameter(torch.empty(len(widths), size))
        self.experts = nn.ModuleDict({name: EXPERT_CLASSES[name](config) for name in config.experts})
        self.gate = HierarchicalGate(config)
        self.projector = PseudoTokenProjector(config)

    @torch.no_grad()
    def set_feature_statistics(self, name: str, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Sets what the precomputed features of a modality are standardised by: (feature size,) each.

        A feature that never varies (deviation 0) is centred and left at that.
        """
        self._set_statistics(self.input_norm[name], mean, std)

    @torch.no_grad()
    def set_clip_statistics(self, name: str, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Sets what a modality's [`ClipStatistics`] are standardised by: their mean and deviation over clips."""
        self._set_statistics(self.clip_statistics[name].norm, mean, std)

    @staticmethod
    def _set_statistics(norm: FeatureNorm, mean: torch.Tensor, std: torch.Tensor) -> None:
        norm.mean.copy_(mean)
        norm.std.copy_(torch.where(std > 1e-6, std, 1.0))

    def sequence(
        self, name: str, features, mask: torch.Tensor | None, times: torch.Tensor | None, span: torch.Tensor
    ) -> ModalitySequence:
        """(B, T, width) features (or a tower's hidden layers) with mask and times -> the modality's sequence.

        `span` is what [`clip_span`] gives for all modalities.
        """
        index, batch_size = list(self.widths).index(name), len(span)
        weight = self.input_proj[name].weight
        if features is None and self.training and torch.is_grad_enabled():
            # All parameters are used in every step: processes that hold parts of them have to agree on which.
            layers = self.layer_mix[name].weights.numel() if name in self.layer_mix else 0
            mask = torch.zeros(batch_size, 1, dtype=torch.bool, device=weight.device)
            blank = weight.new_zeros(batch_size, 1, self.widths[name])
            features = (blank,) * layers if layers else blank
        if features is None:
            state = self.absent_embedding[index].expand(batch_size, 1, -1)
            mask = torch.ones(batch_size, 1, dtype=torch.bool, device=weight.device)
            return ModalitySequence(state, torch.zeros_like(state), state.new_zeros(batch_size, 0), mask, ~mask[:, 0])
        mask, layers = mask.bool(), features if name in self.layer_mix else (features,)
        here, present = self.present_embedding[index].expand(batch_size, -1), mask.any(1)
        if name in self.clip_statistics:  # every position of the modality knows the clip as a whole
            here = here + self.clip_statistics[name](layers, mask)
        if name in self.layer_mix:
            features = self.layer_mix[name](features)
        # Padding may hold anything, NaN too: it must not reach a sum, where 0 * NaN is NaN.
        features = features.to(weight.dtype).masked_fill(~mask.unsqueeze(-1), 0.0)
        if name in self.frame_pooling:
            features, mask, times = average_frames(features, mask, times, self.frame_pooling[name])
        features = self.input_norm[name](features)
        if self.training and self.feature_noise.get(name):
            features = features + self.feature_noise[name] * torch.randn_like(features)
        frames = self.dropout(self.input_proj[name](features) + here.unsqueeze(1))
        state = torch.where(present[:, None], here, self.absent_embedding[index])
        fractions = clip_fractions(mask, times, span)
        content = torch.cat([state.unsqueeze(1).to(frames), frames], 1)
        clock = F.pad(self.clock(fractions, times).to(frames), (0, 0, 1, 0))
        return ModalitySequence(content, clock, fractions, F.pad(mask, (1, 0), value=True), present)

    def forward(
        self,
        inputs: dict[str, tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]],
        prompt: torch.Tensor,
        each_expert: bool = False,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`inputs` by modality: features (B, T, width) or None, mask (B, T), times (B, T) in seconds or None.

        `prompt` is (B, H), the mean embedding of the tokens before the pseudo tokens. Returns the pseudo tokens
        (B, K, H) and the gate weights; with `each_expert` the pseudo tokens are (B, 1 + E, K, H), the mix of the
        experts first and then what each of them gives by itself.
        """
        span = clip_span(((mask, times) for _, mask, times in inputs.values()), like=prompt)
        sequences = {name: self.sequence(name, *inputs[name], span) for name in self.widths}
        latents = torch.stack([expert(sequences) for expert in self.experts.values()], 1)  # (B, E, M, K, d)
        present = torch.stack([sequence.present for sequence in sequences.values()], 1)  # (B, M)
        mixed, alone, weights = self.gate(latents, present, prompt.to(latents.dtype))
        if each_expert:
            mixed = torch.cat([mixed.unsqueeze(1), alone], 1)
        return self.projector(mixed), weights


def init_fusion_weights(module: nn.Module, embedding_rms: float) -> bool:
    """Initialises a module of this file; False if it is none. `embedding_rms` is the size of pseudo tokens."""
    if isinstance(module, ClockEmbedding):
        init.copy_(module.frequencies, module.compute_frequencies())
    elif isinstance(module, FeatureNorm):
        init.zeros_(module.mean)
        init.ones_(module.std)
    elif isinstance(module, LatentPooling):
        init.normal_(module.queries)
    elif isinstance(module, LayerMix):
        init.zeros_(module.weights)
    elif isinstance(module, LocalExpert):
        init.normal_(module.scale_embedding, std=0.5)
        init.normal_(module.peak_embedding, std=0.5)
    elif isinstance(module, SemanticExpert):
        init.normal_(module.nothing)
    elif isinstance(module, GlobalExpert):
        init.normal_(module.component_embedding, std=0.5)
    elif isinstance(module, HierarchicalGate):
        init.normal_(module.expert_embedding, std=0.5)
        init.normal_(module.modality_embedding, std=0.5)
    elif isinstance(module, PseudoTokenProjector):
        init.normal_(module.token_embedding)
        init.constant_(module.embedding_rms, embedding_rms)
    elif isinstance(module, EGMFFusion):
        init.normal_(module.present_embedding, std=0.5)
        init.normal_(module.absent_embedding)
    else:
        return False
    return True
