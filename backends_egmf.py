"""What an LLM takes: positions, tree masks, static caches, flex attention. Where answers would change, an error."""

import inspect
from contextlib import AbstractContextManager, nullcontext

import torch
from transformers import PreTrainedModel


def accepts_position_ids(language_model: PreTrainedModel) -> bool:
    """Whether an LLM takes positions at all (ALiBi and state-space models do not)."""
    return "position_ids" in inspect.signature(language_model.forward).parameters


def needs_true_places(language_model: PreTrainedModel) -> bool:
    """Whether an LLM goes by the places of cached tokens rather than by their positions: ALiBi, GPT-Neo's windows."""
    config = language_model.config
    by_index = "local" in getattr(config, "attention_layers", ())
    return by_index or getattr(config, "alibi", False) or not accepts_position_ids(language_model)


def check_static_cache(language_model: PreTrainedModel) -> None:
    """Raises a ValueError if the LLM would answer otherwise, or not at all, with a static cache."""
    implementation = language_model.config._attn_implementation
    if implementation == "flex_attention" or needs_true_places(language_model):
        got = f"a static one for {type(language_model).__name__} with {implementation} attention"
        raise ValueError(f"past_key_values: got {got}, whose masks do not fit it; wanted a dynamic cache")


def uncompiled_on_cpu(language_model: PreTrainedModel) -> AbstractContextManager:
    """Runs flex attention uncompiled on a CPU, where what torch 2.13 compiles fails at a second length."""
    is_flex = language_model.config._attn_implementation == "flex_attention"
    if is_flex and language_model.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.compiler.set_stance("force_eager")
    return nullcontext()
