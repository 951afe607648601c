"""Measures the cost of a training step, compared with fine-tuning the bare LLM and with a lower bound.

    python -m bench.train_step --output results/performance.json

Three methods alternate in one process, on the same rows, with real `Trainer`s that train LoRA under bfloat16:

- `plain`: usual fine-tuning of the bare LLM on the same text, with logits at all positions, rows in random order,
  padding to the longest row of the batch, and no pseudo tokens.
- `floor`: the LLM's forward and backward pass on exactly EGMF's sequences, including pseudo tokens, in batches of
  similar lengths, with logits only at the positions that predict the answer's tokens.
- `egmf`: `train.py` with a recipe.

The rows are sorted by length and cut into batches; grouping by length matches lengths more closely on a whole corpus.
A repetition is one epoch. Its time includes only the steps (forward, backward, optimizer), without tokenizer and
collator, in CPU seconds on one core; other programs affect CPU time less than wall-clock time. Memory is the peak that
torch uses beyond the weights during a step on one batch of the recipe's size, with the same rows for all three. The
models are the pretrained SmolLM2-135M, and Qwen3-0.6B with random weights, full width and vocabulary, and two small
numbers of layers. Time and memory grow linearly with the layers, so two depths determine the cost of all layers.

With `--device cuda`, both models have all their layers and batches of 16 rows; times are wall seconds of the steps
after the first two of an epoch, and memory is what torch has allocated.
"""

import argparse
import copy
import gc
import statistics
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainerCallback

from bench.measuring import SMOLLM2, build_llm, build_rows, clock, machine, peak_memory, record, take_turns
from egmf.data.collator import AffectCollator, expand_by_task
from egmf.recipe_reading import load_recipe
from egmf.training.assembly import add_lora, build_model, build_processor
from egmf.training.language_models import resolve_language_model
from train import with_lengths


ROOT = Path(__file__).resolve().parents[1]


BATCHES = 2  # batches in an epoch
MODELS = {  # recipe, rows in a batch, layers
    SMOLLM2: ("mosi_smollm2", 4, (None,)),
    "Qwen/Qwen3-0.6B": ("meld_qwen3_features", 4, (2, 4)),
}


ON_ACCELERATOR = {SMOLLM2: ("mosi_smollm2", 16, (None,)), "Qwen/Qwen3-0.6B": ("meld_qwen3_features", 16, (28,))}
# Steps of an epoch on an accelerator that are not measured, because Trainer has emptied the cache of its memory.
WARM_UP = 2


class StepClock(TrainerCallback):
    """Measures the seconds of the training steps after the first `skipped` ones."""

    seconds = 0.0

    def __init__(self, skipped: int):
        self.skipped = skipped

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun = clock(args.device)

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += (clock(args.device) - self.begun) * (state.global_step > self.skipped)


class Floor(nn.Module):
    """The LLM with logits only at the positions that predict the answer's tokens."""

    def __init__(self, llm: nn.Module):
        super().__init__()
        self.llm = llm

    def forward(self, input_ids, attention_mask, labels, num_items_in_batch=None, **kwargs):
        llm = self.llm.get_base_model()
        hidden = llm.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        answers = labels[:, 1:] != -100
        logits = llm.lm_head(hidden[:, :-1][answers])
        loss = llm.loss_function(
            logits=logits,
            labels=None,
            shift_labels=labels[:, 1:][answers],
            vocab_size=llm.config.vocab_size,
            num_items_in_batch=num_items_in_batch,
        )
        return {"loss": loss}


def plain_collator(collator: AffectCollator):
    """Removes pseudo tokens, voice and face from the collator's batches and pads them to the longest row."""
    placeholder, pad = collator.processor.pseudo_token_id, collator.processor.tokenizer.pad_token_id

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = collator(rows)
        kept = batch["attention_mask"].bool() & (batch["input_ids"] != placeholder)
        fill = {"input_ids": pad, "attention_mask": 0, "labels": -100}
        return {
            name: pad_sequence([ids[chosen] for ids, chosen in zip(batch[name], kept, strict=True)], True, value)
            for name, value in fill.items()
        }

    return collate


class Bench:
    """The three methods with one LLM, and their training rows."""

    def __init__(self, model_name: str, layers: int | None, folder: str, device: torch.device):
        name, on_cpu = MODELS[model_name][0], device.type == "cpu"
        quiet = {"logging": "no", "eval": "no", "save": "no"}
        self.recipe = recipe = load_recipe(
            [str(ROOT / f"recipes/{name}.yaml"), "--output_dir", folder, "--tasks", "meld", "--use_cpu", str(on_cpu)]
            + [part for kind, value in quiet.items() for part in (f"--{kind}_strategy", value)]
            + ["--load_best_model_at_end", "false", "--disable_tqdm", "true", "--remove_unused_columns", "false"]
            + ["--num_train_epochs", "1"]
        )
        attention = {"attn_implementation": "eager" if on_cpu else "sdpa"}  # as `attn_implementation: auto`
        processor = build_processor(recipe, resolve_language_model(SMOLLM2), {})
        self.tasks = [processor.tasks[name] for name in recipe.data.tasks]
        self.collator = AffectCollator(processor, self.tasks, recipe.data.modalities, with_answers=True)
        self.text_alone = AffectCollator(processor, self.tasks, ["text"], with_answers=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            llm = build_llm(model_name, layers)
            llm.save_pretrained(place)
            model = build_model(recipe, place, processor, {}, self.rows(2))
        own = LoraConfig(
            task_type="CAUSAL_LM",
            r=recipe.model.lora_r,
            lora_alpha=recipe.model.lora_alpha,
            target_modules=r"model\.layers\..*\.(q|k|v|o|gate|up|down)_proj",
        )
        self.modules = {
            "plain": get_peft_model(build_llm(model_name, layers, **attention), own),
            "floor": Floor(get_peft_model(build_llm(model_name, layers, **attention), own)),
            "egmf": add_lora(recipe, model, []),
        }

    def rows(self, count: int) -> Dataset:
        """Rows sorted by length."""
        return with_lengths(expand_by_task(build_rows(count), self.tasks), self.collator).sort("length")

    def trainers(self, batches: int, batch_size: int) -> dict[str, Trainer]:
        """A Trainer for each method, on the same rows."""
        rows = self.rows(batches * batch_size)
        collators = {"plain": plain_collator(self.text_alone), "floor": self.text_alone, "egmf": self.collator}
        found = {}
        for name, module in self.modules.items():
            settings = copy.copy(self.recipe.training)
            settings.per_device_train_batch_size = batch_size
            settings.train_sampling_strategy = "random" if name == "plain" else "sequential"
            found[name] = Trainer(module, settings, data_collator=collators[name], train_dataset=rows)
        return found


def batches_on(device: torch.device) -> int:
    return BATCHES if device.type == "cpu" else WARM_UP + 5 * BATCHES


def epoch(trainer: Trainer, lean: bool) -> float:
    """Seconds of the steps of one epoch."""
    steps = StepClock(0 if trainer.args.device.type == "cpu" else WARM_UP)
    trainer.add_callback(steps)
    with disable_input_dtype_casting(trainer.model, active=lean):
        trainer.train()
    trainer.remove_callback(steps)
    return steps.seconds


def step_memory(trainer: Trainer, lean: bool) -> int:
    """Peak bytes beyond the weights during a step after the first, when the optimizer's state already exists.

    This is the peak of a first step, which comes before the state is created, plus the bytes of the state.
    """
    peak = peak_memory(lambda: epoch(trainer, lean), trainer.args.device)
    states = trainer.optimizer.state.values()
    return peak + sum(value.nbytes for state in states for value in state.values() if isinstance(value, torch.Tensor))


def measure(model_name: str, layers: int | None, batch_size: int, repetitions: int, device: torch.device) -> dict:
    """Memory of the three methods on one batch of the recipe's size, and time on batches of `batch_size`."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(model_name, layers, folder, device)
        recipes_size = bench.recipe.training.per_device_train_batch_size
        memory, weights = {}, {}
        for dtype in (torch.float32, torch.bfloat16):  # creates an accelerator's workspaces, which belong to no method
            torch.ones(64, 64, dtype=dtype, device=device).mm(torch.ones(64, 64, dtype=dtype, device=device))
        for name, trainer in bench.trainers(1, recipes_size).items():
            memory[name] = step_memory(trainer, name != "plain")
            weights[name] = sum(parameter.nbytes for parameter in trainer.model.parameters())
        shown = {way: f"{held / 1e6:.0f} MB" for way, held in memory.items()}
        print(model_name, layers, recipes_size, "rows:", shown, flush=True)
        gc.collect()
        trainers = bench.trainers(batches_on(device), batch_size)
        ways = {name: lambda t=trainer, n=name: epoch(t, n != "plain") for name, trainer in trainers.items()}
        seconds = take_turns(ways, repetitions)
    gc.collect()
    found = {"layers": layers, "seconds": seconds, "memory": memory, "weights": weights}
    return found | {"memory_batch_size": recipes_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file that gets the figures")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {"machine": machine(args.device), "models": {}}
    models = MODELS if args.device.type == "cpu" else ON_ACCELERATOR
    for name, (recipe, batch_size, depths) in models.items():
        batches = batches_on(args.device)
        setting = {"recipe": recipe, "batch_size": batch_size, "batches": batches, "depths": []}
        found["models"][name] = setting
        for layers in depths:
            setting["depths"].append(measure(name, layers, batch_size, args.repetitions, args.device))
            median = {way: statistics.median(values) for way, values in setting["depths"][-1]["seconds"].items()}
            print(name, layers, {way: round(seconds, 2) for way, seconds in median.items()}, flush=True)
        record(args.output, "train_step", found, args.device)


if __name__ == "__main__":
    main()
