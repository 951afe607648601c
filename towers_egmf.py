"""Towers: the pretrained (or new) speech and image encoders inside the model.

A tower returns all its hidden layers; the fusion learns their weights. The result of a clip does not depend on the
other clips of the batch or on the length of its padding.

Shape letters: B samples, T frames of a tower's output, F video frames.
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import torch_compilable_check

from .configuration_egmf import EGMFConfig


MOST_LAYERS = 8  # hidden states that are read of a deep tower by default
OPTIONS = {"output_hidden_states": True, "return_dict": True}


def read_whole(config: PreTrainedConfig) -> None:
    """Turns off what training hides at random: whole layers, all of which are read, and stretches of frames.

    SpecAugment also fails on clips that are shorter than its stretches.
    """
    off = {"layerdrop": 0.0, "encoder_layerdrop": 0.0, "apply_spec_augment": False}
    for name, value in off.items():
        if hasattr(config, name):
            setattr(config, name, value)


def build_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """Builds a tower with random weights from its config. For an encoder-decoder, returns the encoder.

    An attention implementation that the tower does not have was meant for the LLM: the tower uses its default.
    """
    read_whole(config)
    family, asked = MODEL_MAPPING[type(config)], config._attn_implementation or ""
    has = {"sdpa": family._supports_sdpa, "flex_attention": family._supports_flex_attn}
    if not has.get(asked, "flash" not in asked or family._supports_flash_attn):
        config._attn_implementation = None
    tower = AutoModel.from_config(config)
    return tower.get_encoder() if getattr(config, "is_encoder_decoder", False) else tower


def load_tower(name: str) -> PreTrainedModel:
    """Loads a pretrained tower from a local folder or the Hub, in the dtype of its checkpoint.

    Raises:
        ValueError: If the checkpoint lacks weights that the hidden layers need. These weights would be random.
    """
    config = AutoConfig.from_pretrained(name)
    loader = AutoModel
    # A checkpoint with only the encoder of an encoder-decoder lacks the prefix "encoder." that AutoModel expects.
    family = sys.modules[MODEL_MAPPING[type(config)].__module__]
    for architecture in config.architectures or ():
        if architecture.endswith("Encoder") and hasattr(family, architecture):
            loader = getattr(family, architecture)
    tower, report = loader.from_pretrained(name, output_loading_info=True)
    unused = (
        "pooler",
        "masked_spec_embed",
        "decoder.",
        "text_model.",
        "logit_scale",
        "visual_projection",
        "text_projection",
    )
    missing = sorted(key for key in report["missing_keys"] if not any(part in key for part in unused))
    if missing:
        raise ValueError(f"{name}: its weights lack {len(missing)} of {type(tower).__name__}'s, such as {missing[0]}")
    return tower


def encoder_of(tower: PreTrainedModel, modality: str) -> PreTrainedModel:
    """Selects the tower inside a model: the image model of a CLIP-like one, the encoder of an encoder-decoder."""
    tower = getattr(tower, f"{modality}_model", tower)
    tower = tower.get_encoder() if tower.config.is_encoder_decoder and hasattr(tower, "decoder") else tower
    read_whole(tower.config)
    if hasattr(tower, "layerdrop"):  # Whisper's own copy
        tower.layerdrop = 0.0
    return tower


def is_pyramid(config: PreTrainedConfig) -> bool:
    """Whether the layers of a tower differ in width (ResNet, ConvNeXt, Swin). Only the last layer of these is read."""
    return hasattr(config, "depths") or not hasattr(config, "hidden_size")


def tower_size(config: PreTrainedConfig) -> int:
    """Hidden size of the layers that are read from a tower."""
    return config.hidden_size if hasattr(config, "hidden_size") else config.hidden_sizes[-1]


def tower_num_states(config: PreTrainedConfig) -> int:
    """Number of hidden states that are read from a tower: its input and every layer, or the last of a pyramid."""
    return 1 if is_pyramid(config) else 1 + (getattr(config, "encoder_layers", None) or config.num_hidden_layers)


def spread_layers(config: PreTrainedConfig) -> list[int]:
    """Numbers of at most `MOST_LAYERS` hidden states of a tower, evenly spread from its input to its last layer.

    Neighbouring layers are much alike, so the others of a deep tower add little but disk and time.
    """
    last, count = tower_num_states(config) - 1, min(MOST_LAYERS, tower_num_states(config))
    return [round(place * last / max(count - 1, 1)) for place in range(count)]


def read_layers(config: EGMFConfig, modality: str) -> list[int]:
    """Numbers of the hidden states that are read from a modality's tower, as `config.tower_layers` says.

    Raises:
        ValueError: If the tower has fewer.
    """
    count = tower_num_states(getattr(config, f"{modality}_config"))
    layers = config.tower_layers.get(modality) or list(range(count))
    if layers[-1] >= count:
        raise ValueError(f"tower_layers: got {{{modality!r}: {layers}}}, wanted numbers from 0 to {count - 1}")
    return layers


def is_trained(tower: nn.Module) -> bool:
    """Whether any parameter of a tower requires gradients."""
    return any(parameter.requires_grad for parameter in tower.parameters())


def is_window(inputs: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether audio inputs are fixed windows (B, size, positions), with the positions last, as for Whisper."""
    return inputs.shape[:2] != mask.shape and (inputs.shape[0], inputs.shape[-1]) == tuple(mask.shape)


def check_positions(name: str, values: torch.Tensor, mask: torch.Tensor, window: bool = False) -> None:
    """Raises a ValueError if `mask` (B, positions) does not fit `values`, or if unmasked values are not finite.

    Values are checked on a CPU only. The host would have to wait for an accelerator, and the processor has checked
    its batches.
    """
    if mask.shape != values.shape[:2] and not window:
        raise ValueError(f"{name}_mask: got {tuple(mask.shape)}, wanted {tuple(values.shape[:2])}")
    if values.device.type != "cpu":
        return
    used, dims = mask.bool(), range(2, values.ndim)
    if window:  # the tower reads the whole window, including padding
        used, dims = used.any(1), range(1, values.ndim)
    # A sum is finite if all its terms are, and takes a small part of the time of `isfinite` for each of them.
    sums = values.sum(list(dims), dtype=torch.float32) if len(dims) else values
    finite = torch.isfinite(sums)
    torch_compilable_check((finite | ~used).all(), f"{name}_features: got NaN or infinite values, wanted finite ones")


def check_times(name: str, times: torch.Tensor | None, mask: torch.Tensor) -> None:
    """Raises a ValueError if `times` have another shape than `mask`, (B, T)."""
    if times is not None and times.shape != mask.shape:
        raise ValueError(f"{name}_times: got {tuple(times.shape)}, wanted {tuple(mask.shape)}")


def read_audio(
    tower: PreTrainedModel, inputs: torch.Tensor, mask: torch.Tensor, input_rate: float
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
    """Encodes audio with a speech encoder.

    A fixed window is encoded whole, including its padding. In the other layouts each clip is encoded separately and
    without padding, because group norms and convolutions of wav2vec2-like encoders ignore the mask.

    Args:
        tower: The encoder.
        inputs: Output of its feature extractor: (B, size, positions), (B, positions) or (B, positions, size).
        mask: (B, positions), 1 at positions with sound.
        input_rate: Positions per second.

    Returns:
        Hidden layers (B, T, size) each, mask (B, T), and seconds (B, T) of the frames' centres.
    """
    dtype = next(tower.parameters()).dtype
    if is_window(inputs, mask):
        layers = tower(inputs.to(dtype), **OPTIONS).hidden_states
        centres = _frame_centres(layers[-1].shape[1], mask.shape[1], mask.device)
        seconds = (centres / input_rate).expand(mask.shape[0], -1)
        return layers, mask[:, centres.long()], seconds
    clips = []
    for clip, clip_mask in zip(inputs, mask.bool(), strict=True):
        # An absent clip is encoded as silence to obtain the shapes; its mask stays 0.
        clip = clip[clip_mask] if clip_mask.any() else torch.zeros_like(clip)
        layers = torch.stack(tower(clip.unsqueeze(0).to(dtype), **OPTIONS).hidden_states)
        centres = _frame_centres(layers.shape[2], clip.shape[0], mask.device)
        clips.append((layers[:, 0].transpose(0, 1), centres, clip_mask.any().expand(len(centres))))
    layers, centres, mask = (pad_sequence(column, batch_first=True) for column in zip(*clips, strict=True))
    return layers.unbind(2), mask, centres / input_rate


def _frame_centres(frames: int, positions: int, device: torch.device) -> torch.Tensor:
    """Centres of a tower's frames in input positions: (frames,)."""
    return (torch.arange(frames, device=device) + 0.5) / frames * positions


def read_frames(tower: PreTrainedModel, frames: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Encodes each video frame with an image encoder.

    Args:
        tower: The encoder.
        frames: (B, F, 3, height, width), output of its image processor.
        mask: (B, F), 1 for a frame. Masked frames are not encoded.

    Returns:
        Hidden layers (of a pyramid only the last), averaged over the patches of an image: (B, F, size) each, 0 for
        masked frames.
    """
    mask = mask.bool()
    if not mask.any():
        if not (is_trained(tower) and torch.is_grad_enabled()):
            return tuple(
                frames.new_zeros(*mask.shape, tower_size(tower.config)) for _ in range(tower_num_states(tower.config))
            )
        # In distributed training every process must use all parameters in a step, so encode one masked frame.
        mask = F.one_hot(torch.zeros(1, dtype=torch.long, device=mask.device), mask.numel()).bool().view_as(mask)
    pictures = frames[mask].to(next(tower.parameters()).dtype)
    if is_pyramid(tower.config):
        pictures = pictures.to(memory_format=torch.channels_last)  # twice as fast on CPUs
    states = tower(pictures, **OPTIONS).hidden_states
    # (frames in use, patches, size), of a pyramid (frames in use, size, height, width) -> (frames in use, size)
    means = [
        state.mean((2, 3)) if state.ndim == 4 else state.mean(1) for state in states[-tower_num_states(tower.config) :]
    ]
    mask = mask.unsqueeze(-1).to(means[0].device)
    return tuple(mean.new_zeros(*mask.shape[:2], mean.shape[-1]).masked_scatter(mask, mean) for mean in means)


def average_frames(
    features: torch.Tensor, mask: torch.Tensor, times: torch.Tensor | None, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Averages every `size` consecutive frames into one, ignoring masked frames.

    (B, T, width), (B, T) and (B, T) become the same with T / size frames, rounded up.
    """
    missing = -mask.shape[1] % size
    split = (mask.shape[1] + missing) // size, size
    mask = F.pad(mask, (0, missing)).unflatten(1, split)
    weights = mask / mask.sum(-1, keepdim=True).clamp(min=1)
    frames = F.pad(features, (0, 0, 0, missing)).unflatten(1, split)
    features = torch.einsum("bts,btsd->btd", weights.float(), frames.float()).to(features.dtype)
    if times is not None:
        times = F.pad(times.float(), (0, missing)).unflatten(1, split).masked_fill(~mask, 0.0)
        times = (times * weights).sum(-1)
    return features, mask.any(-1), times
