"""The fusion of EGMF: modality sequences, the three experts, the hierarchical gate and the pseudo-token projector.

Expert-Guided Multimodal Fusion with large language models (arXiv 2601.07565) names these parts and their order but
gives no layer-level detail. This implementation chooses the layers.

Shape letters: B samples, T frames of a modality, M modalities, E experts, K pseudo tokens, d the fusion's hidden size,
H the LLM's hidden size.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .configuration_egmf import EGMFConfig
from .experts_egmf import (
    EXPERT_CLASSES,
    GlobalExpert,
    LatentPooling,
    LocalExpert,
    ModalitySequence,
    SemanticExpert,
    masked_mean,
    masked_softmax,
)
from .towers_egmf import average_frames, tower_num_states, tower_size


def clip_fractions(mask: torch.Tensor, times: torch.Tensor | None, span: torch.Tensor) -> torch.Tensor:
    """Computes the times of the frames as fractions of the clip, (B, T) from 0 to 1.

    A frame with a known time is placed by its seconds, every other frame by its order.

    Args:
        mask: (B, T) bool.
        times: (B, T) seconds, NaN if unknown, or None.
        span: (B, 2) first and last known second over all modalities, NaN if unknown.
    """
    fractions = (mask.cumsum(1) - 0.5) / mask.sum(1, keepdim=True).clamp(min=1)
    if times is not None:
        start, end = span[:, :1], span[:, 1:]
        by_seconds = (times.float() - start) / (end - start)
        fractions = torch.where(torch.isfinite(by_seconds), by_seconds, fractions)
    return fractions.clamp(0, 1)


def clip_span(inputs: Iterable[tuple[torch.Tensor | None, torch.Tensor | None]], like: torch.Tensor) -> torch.Tensor:
    """Computes the first and the last known second of each sample over all modalities.

    Args:
        inputs: (mask, times) of each modality, (B, T) each or None.
        like: Any tensor with B rows on the device of the result.

    Returns:
        (B, 2) seconds, NaN for a sample with fewer than two distinct known times.
    """
    first = torch.full((len(like),), torch.inf, device=like.device)
    last = -first
    for mask, times in inputs:
        if mask is not None and times is not None and times.shape[1]:
            known = mask.bool() & torch.isfinite(times)
            first = torch.minimum(first, times.float().masked_fill(~known, torch.inf).amin(1))
            last = torch.maximum(last, times.float().masked_fill(~known, -torch.inf).amax(1))
    return torch.stack([first, last], 1).masked_fill((first >= last).unsqueeze(1), torch.nan)


class ClockEmbedding(nn.Module):
    """Embeds times into d dimensions with sinusoids of the fraction of the clip and, if known, of the seconds."""

    FRACTION_OCTAVES = 6
    SECOND_OCTAVES = 9  # periods of 0.25 s to 64 s

    def __init__(self, hidden_size: int):
        super().__init__()
        self.register_buffer("frequencies", self.compute_frequencies(), persistent=False)
        self.proj = nn.Linear(2 * (self.FRACTION_OCTAVES + self.SECOND_OCTAVES), hidden_size)

    def compute_frequencies(self) -> torch.Tensor:
        """Angular frequencies: those of the fraction (half a turn per clip and its octaves), then those of seconds."""
        fraction = math.pi * 2.0 ** torch.arange(self.FRACTION_OCTAVES, dtype=torch.float32)
        seconds = 2 * math.pi / (0.25 * 2.0 ** torch.arange(self.SECOND_OCTAVES, dtype=torch.float32))
        return torch.cat([fraction, seconds])

    def forward(self, fractions: torch.Tensor, times: torch.Tensor | None) -> torch.Tensor:
        """(B, T) fractions of the clip and (B, T) seconds (NaN if unknown) -> (B, T, d)."""
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
        # Unknown seconds become zeros: their cosine would otherwise encode second zero.
        wave_mask = torch.ones_like(angles)
        wave_mask[..., self.FRACTION_OCTAVES :] = known.unsqueeze(-1).to(angles.dtype)
        waves = torch.cat([angles.sin() * wave_mask, angles.cos() * wave_mask], dim=-1)
        return self.proj(waves.to(self.proj.weight.dtype))


class HierarchicalGate(nn.Module):
    """Mixes the experts' latents (B, E, M, K, d) into K tokens (B, K, d), conditioned on the context and the prompt.

    For each pseudo token, level 1 weights the modalities inside each expert, and level 2 weights the experts. The
    condition of both levels is the fused context, which is the mean of all latents, and the prompt.
    """

    def __init__(self, config: EGMFConfig):
        super().__init__()
        size = config.fusion_hidden_size
        self.gating = config.gating
        self.context = nn.Linear(size, size)
        self.prompt = nn.Linear(config.text_embedding_size, size)
        self.norm = nn.LayerNorm(size)
        # One scorer per level; a flat gate has one level. A bias would cancel out in the softmax.
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
        """Mixes the latents over modalities and experts.

        Args:
            latents: (B, E, M, K, d).
            present: (B, M) bool.
            prompt: (B, H).

        Returns:
            The mix of all experts (B, K, d), the output of each single expert (B, E, K, d), and the weights
            `modality` (B, E, M), averaged over the pseudo tokens, and `expert` (B, K, E).
        """
        num_experts, num_tokens = latents.shape[1], latents.shape[3]
        available = present[:, None, :].expand(-1, num_experts, -1)  # (B, E, M)
        if self.gating == "mean":
            modality = masked_softmax(torch.zeros_like(available, dtype=torch.float32), available)
            by_expert = torch.einsum("bem,bemkd->bekd", modality.to(latents), latents)
            expert = latents.new_full((len(latents), num_tokens, num_experts), 1 / num_experts).float()
        else:
            condition = self.context(latents.mean((1, 2, 3))) + self.prompt(prompt)  # (B, d)
            names = self.expert_embedding[:, None, :] + self.modality_embedding[None, :, :]  # (E, M, d)
            mix = self.mix_flat if self.gating == "flat" else self.mix_by_level
            by_expert, modality, expert = mix(latents, available, condition, names)
        mixed = torch.einsum("bke,bekd->bkd", expert.to(by_expert), by_expert)
        return mixed, by_expert, {"modality": modality, "expert": expert}

    def mix_by_level(self, latents, available, condition, names):
        """Returns each expert's output (B, E, K, d), the modality weights (B, E, M), the expert weights (B, K, E)."""
        pair_condition = condition[:, None, None] + names
        scores = self.score(self.modality_score, latents, pair_condition.unsqueeze(3)).transpose(2, 3)  # (B, E, K, M)
        modality = masked_softmax(scores, available.unsqueeze(2))
        by_expert = torch.einsum("bekm,bemkd->bekd", modality.to(latents), latents)
        expert_condition = condition[:, None, None] + self.expert_embedding[:, None, :]
        scores = self.score(self.expert_score, by_expert, expert_condition)  # (B, E, K)
        return by_expert, modality.mean(2), scores.float().softmax(1).transpose(1, 2)

    def mix_flat(self, latents, available, condition, names):
        """Like `mix_by_level`, with one softmax over all expert-modality pairs per pseudo token."""
        pair_condition = condition[:, None, None, None] + names[None, :, :, None]
        scores = self.score(self.expert_score, latents, pair_condition).permute(0, 3, 1, 2)  # (B, K, E, M)
        pairs = available[:, None].expand(-1, scores.shape[1], -1, -1)
        weights = masked_softmax(scores.flatten(2), pairs.flatten(2)).view_as(scores)
        expert, tiny = weights.sum(-1), torch.finfo(torch.float32).tiny
        inside = weights / expert.unsqueeze(-1).clamp(min=tiny)
        by_expert = torch.einsum("bkem,bemkd->bekd", inside.to(latents), latents)
        share = weights.sum(1)  # (B, E, M), over the pseudo tokens
        return by_expert, share / share.sum(-1, keepdim=True).clamp(min=tiny), expert


class PseudoTokenProjector(nn.Module):
    """Projects mixed latents (B, K, d) to pseudo tokens (B, K, H) with the root mean square of LLM embeddings."""

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
        self.embedding_rms = nn.Parameter(torch.empty(1))  # FSDP cannot shard a scalar

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        # The token embedding keeps the K tokens distinct even if no modality is present.
        return self.norm(self.layers(latents + self.token_embedding)) * self.embedding_rms


class FeatureNorm(nn.Module):
    """Standardises precomputed features (..., size) with the statistics of their training split.

    The statistics are saved with the model. A layer norm would remove the level of each frame, and with it
    information such as a loud voice or an open mouth.
    """

    LIMIT = 5.0  # standard deviations; feature extractors tend to produce outliers

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return ((features - self.mean) / self.std).clamp(-self.LIMIT, self.LIMIT)


class LayerMix(nn.Module):
    """Learned softmax mix of a tower's hidden layers: a tuple of (..., size) -> (..., size).

    Each layer is first normalised over its channels. The last layers of Whisper have several times the variance of the
    others and would otherwise dominate the mix.
    """

    def __init__(self, num_layers: int):
        super().__init__()
        self.weights = nn.Parameter(torch.empty(num_layers))

    def forward(self, hidden_states: tuple[torch.Tensor, ...]) -> torch.Tensor:
        weights = self.weights.softmax(0)
        layers = (F.layer_norm(layer.to(weights.dtype), layer.shape[-1:]) for layer in hidden_states)
        return sum(weight * layer for weight, layer in zip(weights, layers, strict=True))


class ClipStatistics(nn.Module):
    """Projects the mean and the standard deviation over time of each of a modality's layers to d.

    The overall sound of a voice carries much of the emotion and can be learned from few clips. A linear probe uses the
    same statistics. They are standardised with the statistics of the training split, which are saved with the model.
    """

    def __init__(self, num_layers: int, width: int, config: EGMFConfig):
        super().__init__()
        self.norm = FeatureNorm(2 * num_layers * width)
        self.dropout = nn.Dropout(config.fusion_dropout)
        self.proj = nn.Linear(2 * num_layers * width, config.fusion_hidden_size)

    @staticmethod
    def measure(layers: tuple[torch.Tensor, ...], mask: torch.Tensor) -> torch.Tensor:
        """(B, T, width) per layer and mask (B, T) -> (B, 2 * layers * width) in float32: means, then deviations."""
        mask = mask.bool()
        frames = torch.cat(layers, -1).float().masked_fill(~mask.unsqueeze(-1), 0.0)
        mean = masked_mean(frames, mask)
        variance = masked_mean((frames - mean.unsqueeze(1)).square(), mask)
        return torch.cat([mean, (variance + 1e-6).sqrt()], -1)  # a root of 0 would have an infinite gradient

    def forward(self, layers: tuple[torch.Tensor, ...], mask: torch.Tensor) -> torch.Tensor:
        return self.proj(self.dropout(self.norm(self.measure(layers, mask))))


class EGMFFusion(nn.Module):
    """The parts that EGMF adds to the LLM and the towers: computes K pseudo tokens and gate weights per sample."""

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
        """Sets the mean and standard deviation, (feature size,) each, of a modality's precomputed features.

        They standardise the features. A constant feature (deviation 0) is only centred.
        """
        self._set_statistics(self.input_norm[name], mean, std)

    @torch.no_grad()
    def set_clip_statistics(self, name: str, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Sets the mean and standard deviation over clips that standardise a modality's [`ClipStatistics`]."""
        self._set_statistics(self.clip_statistics[name].norm, mean, std)

    @staticmethod
    def _set_statistics(norm: FeatureNorm, mean: torch.Tensor, std: torch.Tensor) -> None:
        norm.mean.copy_(mean)
        norm.std.copy_(torch.where(std > 1e-6, std, 1.0))

    def sequence(
        self, name: str, features, mask: torch.Tensor | None, times: torch.Tensor | None, span: torch.Tensor
    ) -> ModalitySequence:
        """Builds the sequence of one modality.

        Args:
            name: The modality.
            features: (B, T, width), or a tower's hidden layers as a tuple, or None if the batch lacks the modality.
            mask: (B, T).
            times: (B, T) seconds, NaN if unknown, or None.
            span: (B, 2), the result of [`clip_span`] for all modalities.
        """
        index, batch_size = list(self.widths).index(name), len(span)
        weight = self.input_proj[name].weight
        if features is None and self.training and torch.is_grad_enabled():
            # In distributed training every process must use all parameters in a step, so use a masked blank frame.
            layers = self.layer_mix[name].weights.numel() if name in self.layer_mix else 0
            mask = torch.zeros(batch_size, 1, dtype=torch.bool, device=weight.device)
            blank = weight.new_zeros(batch_size, 1, self.widths[name])
            features = (blank,) * layers if layers else blank
        if features is None:
            state = self.absent_embedding[index].expand(batch_size, 1, -1)
            mask = torch.ones(batch_size, 1, dtype=torch.bool, device=weight.device)
            return ModalitySequence(state, torch.zeros_like(state), state.new_zeros(batch_size, 0), mask, ~mask[:, 0])
        mask, layers = mask.bool(), features if name in self.layer_mix else (features,)
        state_embedding, present = self.present_embedding[index].expand(batch_size, -1), mask.any(1)
        if name in self.clip_statistics:  # every position of the modality receives the statistics of the clip
            state_embedding = state_embedding + self.clip_statistics[name](layers, mask)
        if name in self.layer_mix:
            features = self.layer_mix[name](features)
        # Padding may contain NaN. It must not reach a sum, because 0 * NaN is NaN.
        features = features.to(weight.dtype).masked_fill(~mask.unsqueeze(-1), 0.0)
        if name in self.frame_pooling and name not in self.layer_mix:  # a tower's frames are averaged already
            features, mask, times = average_frames(features, mask, times, self.frame_pooling[name])
        features = self.input_norm[name](features)
        if self.training and self.feature_noise.get(name):
            features = features + self.feature_noise[name] * torch.randn_like(features)
        frames = self.dropout(self.input_proj[name](features) + state_embedding.unsqueeze(1))
        state = torch.where(present[:, None], state_embedding, self.absent_embedding[index])
        fractions = clip_fractions(mask, times, span)
        content = torch.cat([state.unsqueeze(1).to(frames), frames], 1)
        clock = F.pad(self.clock(fractions, times).to(frames), (0, 0, 1, 0))
        return ModalitySequence(content, clock, fractions, F.pad(mask, (1, 0), value=True), present)

    def forward(
        self,
        inputs: dict[str, tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]],
        prompt: torch.Tensor,
        each_expert: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Computes the pseudo tokens.

        Args:
            inputs: By modality: features (B, T, width) or None, mask (B, T), times (B, T) in seconds or None.
            prompt: (B, H), the mean embedding of the tokens before the pseudo tokens.
            each_expert: Whether to return the latents of every single expert as well.

        Returns:
            The pseudo tokens (B, K, H), the latents that they are projected from (B, K, d), and the gate weights. With
            `each_expert` the latents are (B, 1 + E, K, d): those of the mix, followed by those of each single expert.
        """
        span = clip_span(((mask, times) for _, mask, times in inputs.values()), like=prompt)
        sequences = {name: self.sequence(name, *inputs[name], span) for name in self.widths}
        latents = torch.stack([expert(sequences) for expert in self.experts.values()], 1)  # (B, E, M, K, d)
        present = torch.stack([sequence.present for sequence in sequences.values()], 1)  # (B, M)
        mixed, by_expert, weights = self.gate(latents, present, prompt.to(latents.dtype))
        fused = torch.cat([mixed.unsqueeze(1), by_expert], 1) if each_expert else mixed
        return self.projector(mixed), fused, weights


def init_fusion_weights(module: nn.Module, embedding_rms: float) -> bool:
    """Initialises a module of this file and returns True; returns False for any other module.

    `embedding_rms` is the root mean square of the pseudo tokens.
    """
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
