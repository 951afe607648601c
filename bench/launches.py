"""Counts the operations that EGMF launches on an accelerator beside the LLM's own. No accelerator is needed.

    python -m bench.launches --output results/performance.json

The model runs on torch's meta device, which computes shapes only. A forward pass that had to read a value back to the
host, and so wait for the device, would fail there. Views launch nothing and are not counted; every other operation
counts once, although some backends launch more or fewer kernels for it. The counts do not depend on sizes, so the LLM
is a small Llama.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from bench.answer import BATCH, LINES, TASKS
from bench.measuring import FRAMES, SMOLLM2, WIDTH, build_rows, record
from egmf.data.collator import AffectCollator, expand_by_task
from egmf.modeling_egmf import EGMFForConditionalGeneration
from egmf.processing_egmf import EGMFProcessor
from egmf.training.language_models import resolve_language_model


# They allocate or alias memory and launch nothing.
FREE = {
    "aten::empty",
    "aten::empty_like",
    "aten::new_empty",
    "aten::empty_strided",
    "aten::detach",
    "aten::_unsafe_view",
}


# One kernel each on a GPU.
FUSED = {F.scaled_dot_product_attention, F.rms_norm, torch.rms_norm}


class FusedFunctions(TorchFunctionMode):
    """Counts functions that are one kernel on a GPU, and of which the meta device runs the parts, as one operation."""

    def __init__(self, counter: "LaunchCounter"):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, function, types, args=(), kwargs=None):
        paused = self.counter.paused
        if function in FUSED and not paused:
            mask = (kwargs or {}).get("attn_mask")
            converted = mask is not None and mask.dtype == torch.bool  # to numbers, by a kernel of its own
            self.counter.count, self.counter.paused = self.counter.count + 1 + converted, True
        result = function(*args, **(kwargs or {}))
        self.counter.paused = paused
        return result


class LaunchCounter(TorchDispatchMode):
    """Counts the operations of all code that runs inside it, without those of one module."""

    def __init__(self, left_out: nn.Module):
        super().__init__()
        self.count, self.paused = 0, False
        self.hooks = [
            left_out.register_forward_pre_hook(lambda *_: setattr(self, "paused", True)),
            left_out.register_forward_hook(lambda *_: setattr(self, "paused", False)),
        ]

    def __enter__(self):
        self.fused = FusedFunctions(self)
        self.fused.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*exception)
        self.fused.__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not (self.paused or function.is_view or function._schema.name in FREE)
        return function(*args, **(kwargs or {}))


def build(layers: int = 2) -> tuple[EGMFForConditionalGeneration, EGMFProcessor]:
    """A model on the meta device, and a processor."""
    processor = EGMFProcessor(AutoTokenizer.from_pretrained(resolve_language_model(SMOLLM2)), num_pseudo_tokens=8)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4}
    llm = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=processor.pseudo_token_id + 1, **shape))
    sizes = {f"{modality}_feature_size": WIDTH for modality in FRAMES}
    model = EGMFForConditionalGeneration.from_language_model(llm, pseudo_token_id=processor.pseudo_token_id, **sizes)
    return model.eval().to("meta"), processor


@torch.no_grad()
def count() -> dict[str, int]:
    """The launches of a forward pass of the fusion, and of `score_labels` beside the fusion and the LLM's layers."""
    (model, processor), rows, found = build(), build_rows(BATCH, LINES), {}
    llm = model.model.language_model
    for name, shown in TASKS.items():
        task = processor.tasks[name]
        collator = AffectCollator(processor, [task], ["text", "audio", "vision"], None)
        batch = {field: value.to("meta") for field, value in collator(list(expand_by_task(rows, [task]))).items()}
        candidates = processor.candidates(name)
        model.score_labels(candidates, **batch)  # builds the trie, which later batches share
        with LaunchCounter(llm) as fusion:
            model.model.get_expert_states(**batch)
        with LaunchCounter(llm) as scoring:
            model.score_labels(candidates, **batch)
        found["fusion"] = fusion.count
        found[f"score_labels, {shown}"] = scoring.count - fusion.count
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file that gets the figures")
    args = parser.parse_args()
    found = count()
    record(args.output, "launches", found)
    for name, launched in found.items():
        print(f"{name}: {launched} launches")


if __name__ == "__main__":
    main()
