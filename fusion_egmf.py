"""The fusion of EGMF: modality sequences, the three experts, the hierarchical gate and the pseudo-token projector.

Expert-Guided Multimodal Fusion with large language models (arXiv 2601.07565) names these parts and their order but
gives no layer-level detail. This implementation chooses the layers.

Shape letters: B samples, T frames of a modality, M modalities, E experts, K pseudo tokens, d the fusion's hidden size,
H the LLM's hidden size.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from .configuration_egmf import EGMFConfig
from .experts_egmf import (
    EXPERT_CLASSES,
    ClipSequence,
    GlobalExpert,
    LatentPooling,
    LocalExpert,
    PlaceEmbedding,
    SemanticExpert,
    masked_softmax,
)
from .readout_egmf import unit
from .towers_egmf import average_frames, read_layers, tower_size


def clip_fractions(times: torch.Tensor, unknown: torch.Tensor, in_order: torch.Tensor) -> torch.Tensor:
    """Computes the times of the frames as fractions of the clip, (B, T) from 0 to 1.

    A frame with a known time is placed by its seconds between the first and the last known second of the sample, over
    all modalities. Every other frame, and all if there are fewer than two distinct known seconds, by its order.

    Args:
        times: (B, T) seconds.
        unknown: (B, T) bool, True for padding and frames without a time.
        in_order: (B, T), each frame's fraction by its order among the frames of its modality.
    """
    start = times.masked_fill(unknown, torch.inf).amin(1, keepdim=True)
    end = times.masked_fill(unknown, -torch.inf).amax(1, keepdim=True)
    return torch.where(unknown | (start >= end), in_order, (times - start) / (end - start))


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

    Args:
        size: The number of features.
        components: The number of principal components to which they are reduced; None for all features. With many
            features and few clips, the experts would remember the training clips by the features that matter least.
    """

    LIMIT = 5.0  # standard deviations; feature extractors tend to produce outliers

    def __init__(self, size: int, components: int | None = None):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        if components is not None:
            self.register_buffer("basis", torch.eye(components, size))
        self.is_reduced = components is not None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        standard = ((features - self.mean) / self.std).clamp(-self.LIMIT, self.LIMIT)
        return F.linear(standard, self.basis) if self.is_reduced else standard


class LayerMix(nn.Module):
    """Learned softmax mix of a tower's hidden layers: a tuple of (..., size) -> (..., size).

    Each layer is first normalised over its channels. The last layers of Whisper have several times the variance of the
    others and would otherwise dominate the mix.
    """

    def __init__(self, num_layers: int):
        super().__init__()
        self.weights = nn.Parameter(torch.empty(num_layers))

    def forward(self, hidden_states: tuple[torch.Tensor, ...]) -> torch.Tensor:
        layers = torch.stack(hidden_states, -2).to(self.weights.dtype)
        return torch.einsum("n,...nd->...d", self.weights.softmax(0), F.layer_norm(layers, layers.shape[-1:]))


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
        share = (mask / mask.sum(1, keepdim=True).clamp(min=1)).unsqueeze(1)  # (B, 1, T)
        with maybe_autocast(frames.device.type, enabled=False):  # half precision would round the sums
            mean = share @ frames
            variance = share @ (frames - mean).square()
        return torch.cat([mean, (variance + 1e-6).sqrt()], -1).squeeze(1)  # a root of 0 has an infinite gradient

    def forward(self, layers: tuple[torch.Tensor, ...], mask: torch.Tensor) -> torch.Tensor:
        return self.proj(self.dropout(self.norm(self.measure(layers, mask))).to(self.proj.weight.dtype))


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
                self.layer_mix[name] = LayerMix(len(read_layers(config, name)))
            if name in config.clip_statistics:
                layers = 1 if tower is None else len(read_layers(config, name))
                self.clip_statistics[name] = ClipStatistics(layers, widths[name], config)
        self.widths = widths
        self.input_norm = nn.ModuleDict(
            {
                name: nn.LayerNorm(width)
                if name == "text" or name in self.layer_mix
                else FeatureNorm(width, config.feature_components.get(name))
                for name, width in widths.items()
            }
        )
        # Without the modalities that have a tower: `feature_components` may name them for another corpus.
        reduced = {name: norm.basis.shape[0] for name, norm in self.input_norm.items() if hasattr(norm, "basis")}
        self.input_proj = nn.ModuleDict({name: nn.Linear(width, size) for name, width in (widths | reduced).items()})
        self.dropout = nn.Dropout(config.fusion_dropout)
        self.feature_noise, self.frame_pooling = config.feature_noise, config.frame_pooling
        self.present_embedding = nn.Parameter(torch.empty(len(widths), size))
        self.absent_embedding = nn.Parameter(torch.empty(len(widths), size))
        self.experts = nn.ModuleDict({name: EXPERT_CLASSES[name](config) for name in config.experts})
        self.gate = HierarchicalGate(config)
        self.projector = PseudoTokenProjector(config)
        self.readout_prompt = nn.Linear(config.text_embedding_size, size)
        self.readout_norm = nn.LayerNorm(size)

    @torch.no_grad()
    def set_feature_statistics(self, name: str, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Sets the mean and standard deviation, (feature size,) each, of a modality's precomputed features.

        They standardise the features. A constant feature (deviation 0) is only centred.
        """
        self._set_statistics(self.input_norm[name], mean, std)

    @torch.no_grad()
    def set_feature_components(self, name: str, basis: torch.Tensor) -> None:
        """Sets the components (components, feature size) that a modality's standardised features are projected to."""
        self.input_norm[name].basis.copy_(basis)

    @torch.no_grad()
    def set_clip_statistics(self, name: str, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Sets the mean and standard deviation over clips that standardise a modality's [`ClipStatistics`]."""
        self._set_statistics(self.clip_statistics[name].norm, mean, std)

    @staticmethod
    def _set_statistics(norm: FeatureNorm, mean: torch.Tensor, std: torch.Tensor) -> None:
        norm.mean.copy_(mean)
        norm.std.copy_(torch.where(std > 1e-6, std, 1.0))

    def _read(self, name: str, features, mask: torch.Tensor | None, times: torch.Tensor | None, batch_size: int):
        """One modality's frames (B, T, width), clip statistics (B, d), mask (B, T) bool and seconds (B, T).

        Without clip statistics they are None.
        """
        like, is_tower = self.present_embedding, name in self.layer_mix
        if features is None or not mask.shape[1]:
            # A masked blank frame. In distributed training every process must use all parameters in a step.
            mask, times = torch.zeros(batch_size, 1, dtype=torch.bool, device=like.device), None
            features = like.new_zeros(batch_size, 1, self.widths[name])
            features = (features,) * self.layer_mix[name].weights.numel() if is_tower else features
        mask, statistics = mask.bool(), None
        if name in self.clip_statistics:
            statistics = self.clip_statistics[name](features if is_tower else (features,), mask)
        if is_tower:
            features = self.layer_mix[name](features)
        elif name in self.frame_pooling:  # a tower's frames are averaged already
            features = features.masked_fill(~mask.unsqueeze(-1), 0.0)
            features, mask, times = average_frames(features, mask, times, self.frame_pooling[name])
        times = torch.full_like(mask, torch.nan, dtype=torch.float32) if times is None else times.float()
        return features.to(like.dtype), statistics, mask, times

    def _project(self, name: str, features: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        """Normalises and projects the frames of one modality: (B, T, width) and padding (B, T) -> (B, T, d)."""
        # Padding may contain NaN. It must not reach a sum, because 0 * NaN is NaN.
        features = self.input_norm[name](features.masked_fill(padding.unsqueeze(-1), 0.0))
        if self.training and name not in self.layer_mix and self.feature_noise.get(name):
            features = features + self.feature_noise[name] * torch.randn_like(features)
        return self.input_proj[name](features)

    def sequence(
        self, inputs: dict[str, tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]], batch_size: int
    ) -> ClipSequence:
        """Builds the sequence of all modalities from the inputs of [`forward`]."""
        read = [self._read(name, *inputs[name], batch_size) for name in self.widths]
        features, statistics, masks, times = zip(*read, strict=True)
        lengths = {name: mask.shape[1] for name, mask in zip(self.widths, masks, strict=True)}
        mask, seconds = torch.cat(masks, 1), torch.cat(times, 1)
        numbers, padding = torch.arange(len(lengths), device=mask.device), ~mask
        owner = torch.cat([numbers[place].expand(length) for place, length in enumerate(lengths.values())])
        inside = (owner == numbers.unsqueeze(1)) & mask.unsqueeze(1)
        counts = inside.sum(-1, keepdim=True)
        share = inside / counts.clamp(min=1)
        unknown = padding | ~(seconds.abs() < torch.inf)
        in_order = ((inside.cumsum(-1) - 0.5) * share).sum(1)
        fractions = clip_fractions(seconds, unknown, in_order)

        present, embedding = (counts > 0).squeeze(-1), self.present_embedding
        if self.clip_statistics:  # every position of the modality receives the statistics of the clip
            none = embedding.new_zeros(batch_size, embedding.shape[1])
            embedding = embedding + torch.stack([none if part is None else part for part in statistics], 1)
        embedding = embedding.expand(batch_size, -1, -1)
        parts = zip(self.widths, features, padding.split([*lengths.values()], 1), strict=True)
        frames = torch.cat([self._project(*part) for part in parts], 1)
        frames = self.dropout(frames + embedding[:, owner]).masked_fill(padding.unsqueeze(-1), 0.0)
        return ClipSequence(
            states=torch.where(present.unsqueeze(-1), embedding, self.absent_embedding).to(frames),
            frames=frames,
            fractions=fractions,
            padding=padding,
            lengths=lengths,
            owner=owner,
            inside=inside,
            share=share,
            present=present,
            own=numbers.unsqueeze(1) == numbers,
        )

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
            each_expert: Whether to return the readout's states of every single expert as well.

        Returns:
            The pseudo tokens (B, K, H), the states that the expert readout reads (B, 1 + K, d), and the gate weights.
            The states are the prompt and the latents that the pseudo tokens are projected from; the latents of a
            sample without any modality are 0. With `each_expert` the states are (B, 1 + E, 1 + K, d): those of the
            mix, followed by those of each single expert.
        """
        clip = self.sequence(inputs, len(prompt))
        latents = torch.stack([expert(clip) for expert in self.experts.values()], 1)  # (B, E, M, K, d)
        mixed, by_expert, weights = self.gate(latents, clip.present, prompt.to(latents.dtype))
        fused = self.readout_norm(torch.cat([mixed.unsqueeze(1), by_expert], 1) if each_expert else mixed)
        fused = fused * clip.present.any(1).view(-1, *[1] * (fused.ndim - 1))
        asked = self.readout_prompt(unit(prompt.to(fused)))  # (B, d)
        asked = asked.view(len(asked), *[1] * (fused.ndim - 2), -1).expand(*fused.shape[:-2], 1, -1)
        return self.projector(mixed), torch.cat([asked, fused], -2), weights


def init_fusion_weights(module: nn.Module, embedding_rms: float) -> bool:
    """Initialises a module of the fusion and returns True; returns False for any other module.

    `embedding_rms` is the root mean square of the pseudo tokens.
    """
    if isinstance(module, PlaceEmbedding):
        init.copy_(module.frequencies, module.compute_frequencies())
    elif isinstance(module, FeatureNorm):
        init.zeros_(module.mean)
        init.ones_(module.std)
        if module.is_reduced:
            init.eye_(module.basis)
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
