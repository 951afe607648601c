"""Audio and vision of a batch: towers, pooled frames, speakers' centers, and the checks of all of these.

Shape letters: B samples, T frames of a modality, F video frames.
"""

from collections.abc import Iterable

import torch
from torch import nn
from transformers.utils import torch_compilable_check

from .configuration_egmf import EGMFConfig
from .towers_egmf import (
    average_frames,
    check_positions,
    check_times,
    is_trained,
    is_window,
    read_audio,
    read_frames,
    read_layers,
    tower_size,
)


# The fields of a batch that a tower reads, and their modality.
TOWER_INPUTS = {"input_features": "audio", "input_values": "audio", "pixel_values": "vision"}
# All audio and vision fields of a batch: features or tower inputs, masks, times and centers.
MEDIA_INPUTS = (
    *("audio_features", "audio_mask", "audio_times", "vision_features", "vision_mask", "vision_times"),
    *("audio_center", "vision_center"),
    *TOWER_INPUTS,
)


LEAST_DEVIATION = 0.01  # of the mean over channels; channels below it are only centred


def adapt_to_speaker(frames: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """Subtracts a speaker's mean from frames (..., D) and divides them by the speaker's deviation.

    A channel that hardly varies would be blown up, so it is only centred; so is every channel if all deviations are 0.
    """
    varies = deviation > LEAST_DEVIATION * deviation.mean(-1, keepdim=True)
    return (frames - mean) / torch.where(varies, deviation, 1.0)


class MediaMixin:
    """Reads audio and vision for a model with `audio_tower` and `vision_tower`, either of which may be None."""

    config: EGMFConfig
    audio_tower: nn.Module | None
    vision_tower: nn.Module | None

    def get_audio_features(
        self, inputs: torch.Tensor, mask: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
        """The audio tower's hidden layers (B, T, size) each, mask (B, T) and seconds (B, T); see [`read_audio`]."""
        return self._pool("audio", *read_audio(self.audio_tower, inputs, mask, self.config.audio_input_rate))

    def get_vision_features(
        self, frames: torch.Tensor, mask: torch.Tensor, times: torch.Tensor | None = None
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor | None]:
        """The vision tower's hidden layers (B, F, size) each, mask (B, F) and seconds (B, F); see [`read_frames`]."""
        return self._pool("vision", read_frames(self.vision_tower, frames, mask), mask, times)

    def _pool(self, name: str, layers: tuple[torch.Tensor, ...], mask: torch.Tensor, times: torch.Tensor | None):
        """Selects the hidden layers of `config.tower_layers`, and averages frames as `config.frame_pooling` says."""
        layers = tuple(layers[number] for number in read_layers(self.config, name))
        # A device map may have put the tower elsewhere.
        mask, times = (value if value is None else value.to(layers[0].device) for value in (mask, times))
        if name not in self.config.frame_pooling:
            return layers, mask, times
        together, sizes = torch.stack(layers, 2), (len(layers), layers[0].shape[-1])
        pooled, mask, times = average_frames(together.flatten(2), mask.bool(), times, self.config.frame_pooling[name])
        return pooled.unflatten(2, sizes).unbind(2), mask, times

    def encode_media(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Replaces the tower inputs of a processor's batch with the towers' hidden layers.

        Scoring and generation of the returned batch run no tower, and the hidden layers of a frozen tower can be
        cached. Gradients flow through towers that are trained.

        Returns:
            The batch with the hidden layers (B, T, layers, size) as `audio_features` and `vision_features`, with
            masks and times. A batch without tower inputs is returned unchanged.
        """
        encoded = dict(inputs)
        for field in TOWER_INPUTS:
            if encoded.get(field) is not None:
                name = TOWER_INPUTS[field]
                fields = [f"{name}_{part}" for part in ("features", "mask", "times")]
                layers, mask, times = self._modality(name, None, encoded.pop(field), *map(encoded.get, fields[1:]))
                encoded.update(zip(fields, (torch.stack(layers, 2), mask, times), strict=True))
        return encoded

    def _modalities(self, **media) -> dict[str, tuple]:
        """Maps `MEDIA_INPUTS` to (features or hidden layers, mask, times) by modality, each None if absent."""
        return {name: self.read_modality(name, **media) for name in ("audio", "vision")}

    def read_modality(self, name: str, **media) -> tuple:
        """Selects one modality from a batch's `MEDIA_INPUTS`: features or hidden layers, mask (B, T), times (B, T).

        The features or hidden layers are adapted to the batch's center. `encode_media` leaves this to the call that
        reads its result.
        """
        features, mask, times = (media.get(f"{name}_{part}") for part in ("features", "mask", "times"))
        candidates = (media.get(field) for field, modality in TOWER_INPUTS.items() if modality == name)
        tower_inputs = next((value for value in candidates if value is not None), None)
        features, mask, times = self._modality(name, features, tower_inputs, mask, times)
        return self._adapt(name, features, media.get(f"{name}_center")), mask, times

    def _adapt(self, name: str, features, center: torch.Tensor | None):
        """Adapts features or a tuple of hidden layers to a center, in float32; see [`adapt_to_speaker`]."""
        if features is None or center is None:
            return features
        is_tower = isinstance(features, tuple)
        layers = features if is_tower else (features,)
        wanted = (len(layers[0]), 2, *((len(layers),) if is_tower else ()), layers[0].shape[-1])
        if center.shape != wanted:
            raise ValueError(f"{name}_center: got shape {tuple(center.shape)}, wanted {wanted}")
        if center.device.type == "cpu":
            finite = torch.isfinite(center).all()
            torch_compilable_check(finite, f"{name}_center: got NaN or infinite values, wanted finite ones")
        center = center.to(layers[0].device, torch.float32).reshape(len(center), 2, len(layers), 1, -1)
        means, deviations = (part.unbind(1) for part in center.unbind(1))
        parts = zip(layers, means, deviations, strict=True)
        adapted = tuple(adapt_to_speaker(layer.float(), mean, deviation) for layer, mean, deviation in parts)
        return adapted if is_tower else adapted[0]

    @torch.no_grad()
    def speaker_center(self, batches: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Computes the center of a speaker: mean and standard deviation over frames, with equal weight for each clip.

        Args:
            batches: Batches of a processor that together have all clips of the speaker. Their own centers are ignored.

        Returns:
            `audio_center` and `vision_center`, (1, 2, layers, size) for a tower and (1, 2, feature size) for
            features: means, then deviations. A modality that no clip has is left out.
        """
        sums: dict[str, torch.Tensor] = {}  # of the clips' means and mean squares, in float64
        counts: dict[str, int] = {}
        for batch in batches:
            encoded = self.encode_media(batch)
            for name in ("audio", "vision"):
                if encoded.get(f"{name}_features") is None:
                    continue
                for clip, mask in zip(encoded[f"{name}_features"], encoded[f"{name}_mask"].bool(), strict=True):
                    if mask.any():
                        field, frames = f"{name}_center", clip[mask].cpu().double()
                        moments = torch.stack([frames.mean(0), frames.square().mean(0)])
                        sums[field], counts[field] = sums.get(field, 0.0) + moments, counts.get(field, 0) + 1
        centers = {}
        for field, total in sums.items():
            mean, square = total / counts[field]
            deviation = (square - mean.square()).clamp(min=0).sqrt()
            centers[field] = torch.stack([mean, deviation]).float().unsqueeze(0)
        return centers

    def _modality(self, name: str, features, tower_inputs, mask, times):
        """Checks one modality's inputs and converts them to (features or hidden layers, mask, times)."""
        if features is None and tower_inputs is None:
            return None, None, None
        if name not in self.config.modalities:
            raise ValueError(f"{name}_features: got values, wanted None: the model has no {name} modality")
        tower = getattr(self, f"{name}_tower")
        if features is not None and tower_inputs is not None or (tower is None and features is None):
            wanted = "one of features and the tower's input" if tower is not None else "precomputed features only"
            raise ValueError(f"{name}_features: got a tower's input, wanted {wanted}")
        if mask is None:
            raise ValueError(f"{name}_mask: got None, wanted the mask that goes with {name}_features")
        if features is not None:
            if tower is None:
                sizes = (getattr(self.config, f"{name}_feature_size"),)
            else:  # precomputed hidden layers of the tower
                sizes = (len(read_layers(self.config, name)), tower_size(tower.config))
            if features.ndim != 2 + len(sizes) or features.shape[2:] != sizes:
                wanted = ", ".join(map(str, ("batch", "frames", *sizes)))
                raise ValueError(f"{name}_features: got shape {tuple(features.shape)}, wanted ({wanted})")
            check_positions(name, features, mask)
            check_times(name, times, mask)
            # A cache of hidden layers has 16 bits, which autocast to bfloat16 does not take.
            return features if tower is None else features.float().unbind(2), mask, times
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained(tower)):
            if name == "audio":
                check_positions(name, tower_inputs, mask, is_window(tower_inputs, mask))
                return self.get_audio_features(tower_inputs, mask)
            if tower_inputs.ndim != 5:
                wanted = "(batch, frames, 3, height, width)"
                raise ValueError(f"pixel_values: got shape {tuple(tower_inputs.shape)}, wanted {wanted}")
            check_positions(name, tower_inputs, mask)
            check_times(name, times, mask)
            return self.get_vision_features(tower_inputs, mask, times)
