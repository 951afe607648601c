"""What `train.py RECIPE --dry_run` shows of a run that it has built: a prompt, parameters and memory."""

from contextlib import contextmanager
from itertools import groupby

import torch
from datasets import Dataset
from peft.helpers import disable_input_dtype_casting

from egmf.data.collator import AffectCollator, prompt_lengths
from egmf.recipe import Recipe


PARTS = {"audio_tower": "audio tower", "vision_tower": "vision tower", "fusion": "fusion", "readout": "expert readout"}
TRAINED_BYTES = 16  # of a weight that is trained: float32 with its gradient and Adam's two moments


def count_parameters(module: torch.nn.Module, trained: bool = False) -> int:
    """The number of parameters: all, or only those that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


@contextmanager
def kept_tensors(model: torch.nn.Module):
    """Yields a function that returns the bytes that steps inside the context keep for the backward pass."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor keeps its address in use
        return tensor

    def total() -> int:
        return sum(size for size, _ in kept.values())

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield total


def describe_prompt(row: dict, collator: AffectCollator) -> list[str]:
    """The prompt of a row with its answer: its tokens, by what the model does with them.

    Args:
        row: A row with a column `task`.
        collator: A collator with answers.
    """
    processor = collator.processor
    words = AffectCollator(processor, collator.tasks, [m for m in collator.modalities if m == "text"], True)
    batch = words([row])
    ids, spoken, labels = (batch[name][0].tolist() for name in ("input_ids", "utterance_mask", "labels"))

    def role(place: int) -> str:
        if labels[place] != -100:
            return "learned"
        if ids[place] == processor.pseudo_token_id:
            return "pseudo tokens"
        return "utterance" if spoken[place] else "read"

    text = processor.tokenizer.decode(ids).replace("\n", "\\n")
    lines = [f"prompt of {row['id']}, task {row['task']}, {len(ids)} tokens: {text}"]
    for name, places in groupby(range(len(ids)), role):
        tokens = [processor.tokenizer.decode([ids[place]]).replace("\n", "\\n") for place in places]
        lines.append(f"  {name:14}{len(tokens):4}  {'|'.join(tokens)}")
    return lines


def describe_model(recipe: Recipe, model, rows: Dataset, collator: AffectCollator) -> list[str]:
    """Parameters by part of the model, and an estimate of the memory of a training step.

    The activations are counted, on this machine, in one forward pass over the row with the longest prompt.

    Args:
        recipe: The recipe.
        model: The model of the last phase, with LoRA.
        rows: The training rows with a column `task`.
        collator: A collator with answers and without a cache.
    """
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # PEFT trains a copy
            continue
        part = next((title for part, title in PARTS.items() if f".{part}." in name), "language model")
        trained, total = counts.setdefault(part, [0, 0])
        counts[part] = [trained + parameter.numel() * parameter.requires_grad, total + parameter.numel()]
    lines = ["parameters, trained with the language model and in all:"]
    lines += [f"  {part:16}{trained:>14,}{total:>16,}" for part, (trained, total) in counts.items()]
    if recipe.phases.fusion_epochs:
        lines.append("  fusion and expert readout, except the fusion's projector, are trained before")
    lengths = prompt_lengths(rows, collator)
    longest = max(range(len(rows)), key=lengths.__getitem__)
    training, device = recipe.training, model.device  # weights in 4 bits are on a GPU
    batch = {name: value.to(device) for name, value in collator([rows[longest]]).items()}
    tokens, half = batch["input_ids"].shape[1], training.mixed_precision == "bf16"
    if training.activation_checkpointing:
        options = dict(training.activation_checkpointing_kwargs or {})
        own = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
        model.activation_checkpointing_enable(options or None, **own)
    with kept_tensors(model) as kept, disable_input_dtype_casting(model, active=half):
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            model.to(device).train()(**batch)
        activations = kept() * training.per_device_train_batch_size
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    learned = TRAINED_BYTES * count_parameters(model, trained=True)
    lines += [
        f"memory of a step of {training.per_device_train_batch_size} rows of {tokens} tokens, the longest:",
        f"  {_size(frozen)} frozen weights, {_size(learned)} trained weights with gradients and Adam, "
        f"{_size(activations)} activations: about {_size(frozen + learned + activations)}; CUDA takes 1.5 GB more",
    ]
    return lines


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
