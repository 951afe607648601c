"""Rehearsals: `train.py RECIPE --shrink 16` trains smaller random models with the recipe's configurations.

Each model that the recipe names (the LLM and the towers) is built with random weights from its configuration, with
layers, widths and attention heads divided by the number. Everything is loaded, stepped, saved and evaluated as in a
real run, in seconds on a CPU; the answers are meaningless. Vocabulary, head size, picture size, kernels and strides of
audio frames, tokenizer and preprocessors stay unchanged.

A configuration comes from the folder or the Hub repository that the recipe names. If the Hub cannot be reached, it
comes from `recipes/published_configs.json`, with a byte tokenizer instead of the LLM's, and the log says so. A model
that is not in this file is an error. Only rehearsals read the file.
"""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
)

from egmf.recipe import ModelArguments
from egmf.training.language_models import build_once, byte_tokenizer, why_unreachable


DIVISORS = (1, 2, 4, 8, 16)
PUBLISHED = Path(__file__).resolve().parents[2] / "recipes" / "published_configs.json"

_DIVIDED = {"hidden_size", "intermediate_size", "projection_dim", "conv_dim", "num_hidden_layers"}
_DIVIDED |= {"num_attention_heads", "num_key_value_heads"}
# Whisper's own names.
_DIVIDED |= {"d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim"}
_DIVIDED |= {"decoder_layers", "decoder_attention_heads", "decoder_ffn_dim"}
_PREPROCESSORS = {"audio_tower": "feature_extractor", "vision_tower": "image_processor"}


def shrink(model: ModelArguments, folder: Path) -> ModelArguments:
    """Builds small random models in `folder` and returns the arguments with these instead of the recipe's models.

    Raises:
        ValueError: A `shrink` that is none of 2, 4, 8 and 16, or a model whose layers and widths are not known.
        ConnectionError: A model that neither the Hub, which cannot be reached, nor the file has.
    """
    if model.shrink not in DIVISORS:
        raise ValueError(f"shrink: got {model.shrink}, wanted one of {', '.join(map(str, DIVISORS))}")
    small: dict[str, Any] = {}
    for field in ("language_model", *_PREPROCESSORS):
        name = getattr(model, field)
        if name and isinstance(name, str):  # a tower that the recipe describes is small already
            target = folder / f"{Path(name).name}-shrunk-{model.shrink}"
            build_once(target, lambda place, field=field, name=name: _build(field, name, model.shrink, place))
            small[field] = str(target)
    return dataclasses.replace(model, **small)


def shrunk(config: PreTrainedConfig, divisor: int) -> PreTrainedConfig:
    """A configuration with layers, widths and heads divided, rounded up; for CLIP, those of both parts.

    Raises:
        ValueError: If neither it nor a part of it has a width and a number of layers under a known name.
    """
    fields = config.to_dict()
    parts = [fields, *(fields[name] for name in config.sub_configs)]
    if not any(
        {"hidden_size", "num_hidden_layers"} <= part.keys() or {"d_model", "encoder_layers"} <= part.keys()
        for part in parts
    ):
        wanted = "a model with hidden_size and num_hidden_layers in its configuration"
        raise ValueError(f"shrink: got a model of type {config.model_type!r}, wanted {wanted}")
    for part in parts:
        for name in _DIVIDED & part.keys():
            value = part[name]
            part[name] = [_up(size, divisor) for size in value] if isinstance(value, list) else _up(value, divisor)
        heads = part.get("num_attention_heads", 0)
        if part.get("num_key_value_heads"):  # each is shared by the same number of heads
            part["num_attention_heads"] = part["num_key_value_heads"] * _up(heads, part["num_key_value_heads"])
        if part.get("layer_types"):
            part["layer_types"] = part["layer_types"][: part["num_hidden_layers"]]
    return type(config).from_dict(fields)


def published_config(name: str) -> PreTrainedConfig | None:
    """A model's configuration from `recipes/published_configs.json`; None if the file lacks the model."""
    entry = _published().get(name)
    if entry is None:
        return None
    fields = dict(entry["config"])
    return CONFIG_MAPPING[fields.pop("model_type")](**fields)


def _published() -> dict[str, dict[str, Any]]:
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))


def _up(size: int, divisor: int) -> int:
    return -(-size // divisor)


def _build(field: str, name: str, divisor: int, folder: Path) -> None:
    """Writes a small random model, with its tokenizer or preprocessor, into a folder."""
    error = None if Path(name).is_dir() else why_unreachable(name, field)
    config = AutoConfig.from_pretrained(name) if error is None else published_config(name)
    if config is None:
        wanted = f"a local folder or one of {', '.join(_published())}"
        raise ConnectionError(
            f"{field}: got {name!r}, and the Hugging Face Hub cannot be reached ({error}); wanted {wanted}"
        ) from error
    if error is not None:
        logging.warning("The Hugging Face Hub cannot be reached: the configuration of %s is from %s", name, PUBLISHED)
    config = shrunk(config, divisor)
    dtype = config.dtype or torch.float32
    if field == "language_model":
        tokenizer = AutoTokenizer.from_pretrained(name) if error is None else byte_tokenizer()
        if error is not None:
            config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        model = _random(AutoModelForCausalLM, config, dtype)
        model.generation_config = GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
        tokenizer.save_pretrained(folder)
    else:
        model = _random(AutoModel, config, dtype)
        if error is None:
            loader = AutoFeatureExtractor if field == "audio_tower" else AutoImageProcessor
            loader.from_pretrained(name).save_pretrained(folder)
        else:
            preprocessor = _published()[name][_PREPROCESSORS[field]]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")
    model.save_pretrained(folder)


def _random(auto: Any, config: PreTrainedConfig, dtype: torch.dtype):
    """A model with random weights, the same in every call; the global random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return auto.from_config(config, dtype=dtype)
