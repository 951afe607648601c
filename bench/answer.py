"""Measures the samples that EGMF answers per second, compared with the prefill of the bare LLM.

    python -m bench.answer --output results/performance.json

The measurements alternate in one process, on one batch of 16 prompts of about 100 tokens with voice and face:

- `prefill`: the bare LLM reads EGMF's sequences, including pseudo tokens, and computes logits at the last position.
- `score_labels`: the distribution over the seven labels of MELD, and over the 61 scores of MOSEI.
- `score_labels and greedy text`: the same with `end_token_id`, which finds the text of plain `generate()` as well.
- `generate`: greedy generation restricted to the same legal answers.

The LLM has the shape of Qwen3-0.6B, random weights in bfloat16, and a quarter of the layers. EGMF's own cost does not
grow with the number of layers, so its share is smaller for the whole LLM. Times are CPU seconds on one core. With
`--device cuda --layers 28` they are those of the whole LLM on a GPU, in wall seconds.
"""

import argparse
import statistics
from pathlib import Path

import torch
from transformers import AutoTokenizer

from bench.measuring import FRAMES, SMOLLM2, WIDTH, build_llm, build_rows, clock, machine, record, take_turns
from egmf.data.collator import AffectCollator, expand_by_task
from egmf.modeling_egmf import EGMFForConditionalGeneration
from egmf.processing_egmf import EGMFProcessor
from egmf.training.language_models import resolve_language_model


MODEL, LAYERS = "Qwen/Qwen3-0.6B", 7
TASKS = {"meld": "7 labels", "mosei": "61 scores"}
BATCH, LINES = 16, (6, 8)


def build(
    layers: int = LAYERS, name: str = MODEL, device: torch.device | str = "cpu"
) -> tuple[EGMFForConditionalGeneration, EGMFProcessor]:
    """A model with the recipes' fusion, and a processor."""
    processor = EGMFProcessor(AutoTokenizer.from_pretrained(resolve_language_model(SMOLLM2)), num_pseudo_tokens=8)
    sizes = {f"{modality}_feature_size": WIDTH for modality in FRAMES}
    llm = build_llm(name, layers)
    llm.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    llm.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model = EGMFForConditionalGeneration.from_language_model(llm, pseudo_token_id=processor.pseudo_token_id, **sizes)
    return model.eval().to(device), processor


@torch.no_grad()
def prefill(model: EGMFForConditionalGeneration, batch: dict[str, torch.Tensor]) -> None:
    """Runs the bare LLM on a batch and fills its key-value cache."""
    embeds = model.get_input_embeddings()(batch["input_ids"])
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    read = model.model.language_model(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"], position_ids=positions, use_cache=True
    )
    model.lm_head(read.last_hidden_state[:, -1:])


def ways_of(
    model: EGMFForConditionalGeneration, processor: EGMFProcessor, batch_size: int = BATCH
) -> tuple[dict, int]:
    """The functions to measure, by name, and the mean number of tokens of a prompt."""
    rows, ways = build_rows(batch_size, LINES), {}
    for name, shown in TASKS.items():
        task = processor.tasks[name]
        collator = AffectCollator(processor, [task], ["text", "audio", "vision"], None)
        batch = dict(collator(list(expand_by_task(rows, [task]))).to(model.device))
        candidates, constraint = processor.candidates(name), processor.logits_processor(name, batch)
        options = {"logits_processor": constraint, "max_new_tokens": processor.max_answer_tokens(name)}
        ways[f"prefill, {shown}"] = lambda b=batch: prefill(model, b)
        ways[f"score_labels, {shown}"] = lambda b=batch, c=candidates: model.score_labels(c, **b)
        greedy = {**batch, "end_token_id": processor.tokenizer.eos_token_id}
        ways[f"score_labels and greedy text, {shown}"] = lambda b=greedy, c=candidates: model.score_labels(c, **b)
        ways[f"generate, {shown}"] = lambda b=batch, o=options: model.generate(**b, **o, do_sample=False)
    return ways, round(batch["attention_mask"].sum(1).float().mean().item())


def seconds_of(way, device: torch.device) -> float:
    begun = clock(device)
    way()
    return clock(device) - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file that gets the figures")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--model", default=MODEL, help="a published model whose shape the LLM has")
    parser.add_argument("--batch_size", type=int, default=BATCH)
    args = parser.parse_args()
    torch.set_num_threads(1)
    begun = machine(args.device)
    ways, tokens = ways_of(*build(args.layers, args.model, args.device), args.batch_size)
    timed = {name: lambda way=way: seconds_of(way, args.device) for name, way in ways.items()}
    seconds = take_turns(timed, args.repetitions + 1)
    seconds = {name: values[1:] for name, values in seconds.items()}  # the first repetition allocates memory
    setting = {"model": args.model, "layers": args.layers, "batch_size": args.batch_size, "tokens": tokens}
    for name, values in seconds.items():
        print(f"{name}: {args.batch_size / statistics.median(values):.2f} samples a second", flush=True)
    record(args.output, "answer", {"machine": begun, **setting, "seconds": seconds}, args.device)


if __name__ == "__main__":
    main()
