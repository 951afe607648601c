"""Measures the samples that EGMF answers per second, compared with the prefill of the bare LLM.

    python -m bench.answer --output results/performance.json

The measurements alternate in one process, on one batch of 16 prompts of about 100 tokens with voice and face:

- `prefill`: the bare LLM reads EGMF's sequences, including pseudo tokens, and computes logits at the last position.
- `score_labels`: the distribution over the seven labels of MELD, and over the 61 scores of MOSEI.
- `generate`: greedy generation restricted to the same legal answers.

The LLM has the shape of Qwen3-0.6B, random weights in bfloat16, and a quarter of the layers. EGMF's own cost does not
grow with the number of layers, so its share is smaller for the whole LLM. Times are CPU seconds on one core.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from bench.measuring import FRAMES, SMOLLM2, WIDTH, build_llm, build_rows, machine, record, take_turns
from egmf.data.collator import AffectCollator, expand_by_task
from egmf.modeling_egmf import EGMFForConditionalGeneration
from egmf.processing_egmf import EGMFProcessor
from egmf.training.language_models import resolve_language_model


ROOT = Path(__file__).resolve().parents[1]


MODEL, LAYERS = "Qwen/Qwen3-0.6B", 7
TASKS = {"meld": "7 labels", "mosei": "61 scores"}
BATCH, LINES = 16, (6, 8)


def build(layers: int = LAYERS) -> tuple[EGMFForConditionalGeneration, EGMFProcessor]:
    """A model with the recipes' fusion, and a processor."""
    processor = EGMFProcessor(AutoTokenizer.from_pretrained(resolve_language_model(SMOLLM2)), num_pseudo_tokens=8)
    sizes = {f"{modality}_feature_size": WIDTH for modality in FRAMES}
    llm = build_llm(MODEL, layers)
    llm.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model = EGMFForConditionalGeneration.from_language_model(llm, pseudo_token_id=processor.pseudo_token_id, **sizes)
    return model.eval(), processor


@torch.no_grad()
def prefill(model: EGMFForConditionalGeneration, batch: dict[str, torch.Tensor]) -> None:
    """Runs the bare LLM on a batch and fills its key-value cache."""
    embeds = model.get_input_embeddings()(batch["input_ids"])
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    read = model.model.language_model(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"], position_ids=positions, use_cache=True
    )
    model.lm_head(read.last_hidden_state[:, -1:])


def ways_of(model: EGMFForConditionalGeneration, processor: EGMFProcessor) -> tuple[dict, int]:
    """The functions to measure, by name, and the mean number of tokens of a prompt."""
    rows, ways = build_rows(BATCH, LINES), {}
    for name, shown in TASKS.items():
        task = processor.tasks[name]
        batch = dict(
            AffectCollator(processor, [task], ["text", "audio", "vision"], None)(list(expand_by_task(rows, [task])))
        )
        candidates, constraint = processor.candidates(name), processor.logits_processor(name, batch)
        options = {"logits_processor": constraint, "max_new_tokens": processor.max_answer_tokens(name)}
        ways[f"prefill, {shown}"] = lambda b=batch: prefill(model, b)
        ways[f"score_labels, {shown}"] = lambda b=batch, c=candidates: model.score_labels(c, **b)
        ways[f"generate, {shown}"] = lambda b=batch, o=options: model.generate(**b, **o, do_sample=False)
    return ways, round(batch["attention_mask"].sum(1).float().mean().item())


def seconds_of(way) -> float:
    begun = time.process_time()
    way()
    return time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file that gets the figures")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    begun = machine()
    ways, tokens = ways_of(*build(args.layers))
    seconds = take_turns({name: lambda way=way: seconds_of(way) for name, way in ways.items()}, args.repetitions + 1)
    seconds = {name: values[1:] for name, values in seconds.items()}  # the first repetition allocates memory
    setting = {"model": MODEL, "layers": args.layers, "batch_size": BATCH, "tokens": tokens}
    for name, values in seconds.items():
        print(f"{name}: {BATCH / statistics.median(values):.2f} samples a second", flush=True)
    record(args.output, "answer", {"machine": begun, **setting, "seconds": seconds})


if __name__ == "__main__":
    main()
