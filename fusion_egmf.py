"""The fusion of EGMF: modality sequences, the three experts, the hierarchical gate and the pseudo-token projector.

Expert-Guided Multimodal Fusion with large language models (arXiv 2601.07565) names these parts and how they are
chained; it gives no layer-level detail. Layer choices below are this implementation's own.

Shape letters: B samples, T frames of a modality, M modalities, E experts, K pseudo tokens, d the fusion's hidden size,
H the LLM's.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


try:
    from .configuration_egmf import EGMFConfig
    from .towers_egmf import tower_num_states, tower_size
except ImportError:
    from configuration_egmf import EGMFConfig
    from towers_egmf import tower_num_states, tower_size


@dataclass
class ModalitySequence:
    """One modality on the common clock: a state token (present or absent), then its frames.

    Args:
        states: (B, 1 + T, d).
        mask: (B, 1 + T) bool, True where a position holds something; the state token always does.
        present: (B,) bool.
    """

    states: torch.Tensor
    mask: torch.Tensor
    present: torch.Tensor


def masked_mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over dimension 1 of (B, T, d) where (B, T) `mask` is True; zero where nothing is."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def masked_softmax(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension in float32, exactly 0 where `mask` is False, all 0 where nothing is True."""
    weights = scores.float().masked_fill(~mask, torch.finfo(torch.float32).min).softmax(-1)
    return weights.masked_fill(~mask, 0.0)


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

    def forward(self, mask: torch.Tensor, times: torch.Tensor | None) -> torch.Tensor:
        """(B, T) bool mask and (B, T) seconds (NaN where not known) -> (B, T, d)."""
        rank = mask.cumsum(1) - 0.5
        fraction = rank / mask.sum(1, keepdim=True).clamp(min=1)
        seconds = torch.full_like(fraction, torch.nan) if times is None else times.to(fraction.dtype)
        known = torch.isfinite(seconds)
        clock = torch.cat(
            [
                fraction.unsqueeze(-1).expand(-1, -1, self.FRACTION_OCTAVES),
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
    however long the clip is.
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
            states, mask = [sequence.states[:, :1]], [sequence.mask[:, :1]]
            frames, frame_mask = sequence.states[:, 1:], sequence.mask[:, 1:]
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

    Each modality's positions attend to the other modalities; a position is then described by itself, by what the
    others say about it, by their product (agreement) and by their absolute difference (disagreement).
    """

    def __init__(self, config: EGMFConfig):
        super().__init__()
        size = config.fusion_hidden_size
        self.norm = nn.LayerNorm(size)
        self.nothing = nn.Parameter(torch.empty(size))  # what a modality hears when no other is part of the model
        self.cross_attention = Attention(config)
        self.own = nn.Linear(size, size)
        self.others = nn.Linear(size, size)
        self.relation = FeedForward(config, in_size=4 * size)
        self.pooling = LatentPooling(config)

    def forward(self, sequences: dict[str, ModalitySequence]) -> torch.Tensor:
        """-> (B, M, K, d)."""
        latents = []
        for name, sequence in sequences.items():
            batch_size = sequence.states.shape[0]
            heard = [self.nothing.expand(batch_size, 1, -1)]
            heard_mask = [sequence.mask[:, :1]]
            for other, other_sequence in sequences.items():
                if other != name:
                    heard.append(other_sequence.states)
                    heard_mask.append(other_sequence.mask)
            attended = self.cross_attention(
                self.norm(sequence.states), self.norm(torch.cat(heard, 1)), torch.cat(heard_mask, 1)
            )
            own, others = self.own(self.norm(sequence.states)), self.others(attended)
            relation = self.relation(torch.cat([own, others, own * others, (own - others).abs()], dim=-1))
            latents.append(self.pooling(sequence.states + relation, sequence.mask))
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
    """Global context expert: a transformer over the whole clip and all modalities at once."""

    def __init__(self, config: EGMFConfig):
        super().__init__()
        self.layers = nn.ModuleList(GlobalLayer(config) for _ in range(config.global_num_layers))
        self.pooling = LatentPooling(config)

    def forward(self, sequences: dict[str, ModalitySequence]) -> torch.Tensor:
        """-> (B, M, K, d)."""
        lengths = [sequence.states.shape[1] for sequence in sequences.values()]
        states = torch.cat([sequence.states for sequence in sequences.values()], 1)
        mask = torch.cat([sequence.mask for sequence in sequences.values()], 1)
        for layer in self.layers:
            states = layer(states, mask)
        parts = zip(states.split(lengths, 1), mask.split(lengths, 1), strict=True)
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
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`latents` (B, E, M, K, d), `present` (B, M) bool, `prompt` (B, H) -> (B, K, d) and the weights by level."""
        num_experts, num_tokens = latents.shape[1], latents.shape[3]
        available = present[:, None, :].expand(-1, num_experts, -1)  # (B, E, M)
        if self.gating == "mean":
            modality = masked_softmax(torch.zeros_like(available, dtype=torch.float32), available)
            expert = latents.new_full((latents.shape[0], num_tokens, num_experts), 1 / num_experts).float()
            mixed = torch.einsum("bke,bem,bemkd->bkd", expert.to(latents), modality.to(latents), latents)
            return mixed, {"modality": modality, "expert": expert}

        condition = self.context(latents.mean((1, 2, 3))) + self.prompt(prompt)  # (B, d)
        expert_names, modality_names = self.expert_embedding[:, None, :], self.modality_embedding[None, :, :]
        if self.gating == "flat":
            where = condition[:, None, None, None] + (expert_names + modality_names)[None, :, :, None]
            scores = self.score(self.expert_score, latents, where).permute(0, 3, 1, 2)  # (B, K, E, M)
            pairs = available[:, None].expand(-1, num_tokens, -1, -1)
            weights = masked_softmax(scores.flatten(2), pairs.flatten(2)).view_as(scores)
            expert = weights.sum(-1)
            share = weights.sum(1)  # (B, E, M), over the pseudo tokens
            modality = share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            mixed = torch.einsum("bkem,bemkd->bkd", weights.to(latents), latents)
            return mixed, {"modality": modality, "expert": expert}

        where = condition[:, None, None] + expert_names + modality_names
        modality = masked_softmax(self.score(self.modality_score, latents.mean(3), where), available)  # (B, E, M)
        inside = torch.einsum("bem,bemkd->bekd", modality.to(latents), latents)
        where = condition[:, None, None] + expert_names
        scores = self.score(self.expert_score, inside, where)  # (B, E, K)
        expert = scores.float().softmax(1).transpose(1, 2)  # (B, K, E)
        mixed = torch.einsum("bke,bekd->bkd", expert.to(latents), inside)
        return mixed, {"modality": modality, "expert": expert}


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
        self.embedding_rms = nn.Parameter(torch.empty(()))

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
        self.feature_noise = config.feature_noise
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
        self, name: str, index: int, batch_size: int, features, mask: torch.Tensor | None, times: torch.Tensor | None
    ) -> ModalitySequence:
        """(B, T, width) features (or a tower's hidden layers) with their mask -> the modality's sequence."""
        weight = self.input_proj[name].weight
        if features is None:
            state = self.absent_embedding[index].expand(batch_size, 1, -1)
            mask = torch.ones(batch_size, 1, dtype=torch.bool, device=weight.device)
            return ModalitySequence(state, mask, ~mask[:, 0])
        mask, layers = mask.bool(), features if name in self.layer_mix else (features,)
        if name in self.layer_mix:
            features = self.layer_mix[name](features)
        # Padding may hold anything, NaN too: it must not reach a sum, where 0 * NaN is NaN.
        features = self.input_norm[name](features.to(weight.dtype).masked_fill(~mask.unsqueeze(-1), 0.0))
        if self.training and self.feature_noise.get(name):
            features = features + self.feature_noise[name] * torch.randn_like(features)
        frames = self.input_proj[name](features) + self.clock(mask, times)
        here, present = self.present_embedding[index], mask.any(1)
        if name in self.clip_statistics:  # every position of the modality knows the clip as a whole
            here = here + self.clip_statistics[name](layers, mask)  # (B, d)
            frames = frames + here.unsqueeze(1)
        else:
            frames = frames + here
        frames = self.dropout(frames)
        state = torch.where(present[:, None], here, self.absent_embedding[index])
        return ModalitySequence(
            torch.cat([state.unsqueeze(1).to(frames), frames], 1), F.pad(mask, (1, 0), value=True), present
        )

    def forward(
        self,
        inputs: dict[str, tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]],
        prompt: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`inputs` by modality: features (B, T, width) or None, mask (B, T), times (B, T) in seconds or None.

        `prompt` is (B, H), the mean embedding of the tokens before the pseudo tokens. Returns the pseudo tokens
        (B, K, H) and the gate weights.
        """
        sequences = {
            name: self.sequence(name, index, prompt.shape[0], *inputs[name]) for index, name in enumerate(self.widths)
        }
        latents = torch.stack([expert(sequences) for expert in self.experts.values()], 1)  # (B, E, M, K, d)
        present = torch.stack([sequence.present for sequence in sequences.values()], 1)  # (B, M)
        mixed, weights = self.gate(latents, present, prompt.to(latents.dtype))
        return self.projector(mixed), weights
