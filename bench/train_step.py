"""What a training step costs, beside fine-tuning the bare LLM and beside the least that it could cost.

    python -m bench.train_step --output results/performance.json

Three ways take turns in one process, on the same rows, with real `Trainer`s that train LoRA under bfloat16:

- `plain`: the bare LLM on the same text, as it is usually done. Logits at all positions, rows in random order, padded
  to the longest of their batch. It has no pseudo tokens.
- `floor`: the LLM's own forward and backward pass on the very sequences of EGMF, pseudo tokens included, in batches of
  like lengths, with logits where the answer's tokens are predicted and nowhere else.
- `egmf`: what `train.py` does with a recipe.

Rows in the order of their lengths are cut into batches; grouping by length does that more closely on a whole corpus. A
repetition is an epoch of the rows; its time is that of the steps alone (forward, backward, optimizer), not that of
tokenizer and collator, in seconds of CPU on one core, which other programs disturb less than they disturb the clock.
Memory is the most that torch holds beyond the weights during a step on one batch as large as the recipe's, of the same
rows for all three. The models are SmolLM2-135M as it is, and Qwen3-0.6B with random weights, at full width and
vocabulary but with few layers, twice: time and memory grow by the layer, so that two depths say what all layers would
take.
"""

import argparse
import copy
import gc
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainerCallback

from bench.measuring import SMOLLM2, build_llm, build_rows, machine, peak_memory, record, take_turns
from egmf.data.collator import AffectCollator, expand_by_task
from egmf.recipe import load_recipe
from egmf.training.assembly import add_lora, build_model, build_processor
from egmf.training.language_models import resolve_language_model
from train import with_lengths


ROOT = Path(__file__).resolve().parents[1]


BATCHES = 2  # of an epoch
MODELS = {  # recipe, rows in a batch, layers
    SMOLLM2: ("mosi_smollm2", 4, (None,)),
    "Qwen/Qwen3-0.6B": ("meld_qwen3_features", 4, (2, 4)),
}


class StepClock(TrainerCallback):
    """Seconds that the steps take."""

    seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.process_time() - self.begun


class Floor(nn.Module):
    """The LLM with logits where the answer's tokens are predicted alone."""

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
    """The collator's prompts and answers without pseudo tokens, voice and face, padded to the longest."""
    placeholder, pad = collator.processor.pseudo_token_id, collator.processor.tokenizer.pad_token_id

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = collator(rows)
        kept = batch["attention_mask"].bool() & (batch["input_ids"] != placeholder)
        fill = {"input_ids": pad, "attention_mask": 0, "labels": -100}
        return {
            name: pad_sequence([ids[here] for ids, here in zip(batch[name], kept, strict=True)], True, value)
            for name, value in fill.items()
        }

    return collate


class Bench:
    """The three ways with one LLM, and what they train on."""

    def __init__(self, model_name: str, layers: int | None, folder: str):
        name = MODELS[model_name][0]
        quiet = {"logging": "no", "eval": "no", "save": "no"}
        self.recipe = recipe = load_recipe(
            [str(ROOT / f"recipes/{name}.yaml"), "--output_dir", folder, "--tasks", "meld", "--use_cpu", "true"]
            + [part for kind, value in quiet.items() for part in (f"--{kind}_strategy", value)]
            + ["--load_best_model_at_end", "false", "--disable_tqdm", "true", "--remove_unused_columns", "false"]
            + ["--num_train_epochs", "1"]
        )
        attention = {"attn_implementation": recipe.model.attn_implementation}
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
        """Rows in the order of their lengths."""
        return with_lengths(expand_by_task(build_rows(count), self.tasks), self.collator).sort("length")

    def trainers(self, batches: int, batch_size: int) -> dict[str, Trainer]:
        """The ways, each a Trainer on the same rows."""
        rows = self.rows(batches * batch_size)
        collators = {"plain": plain_collator(self.text_alone), "floor": self.text_alone, "egmf": self.collator}
        found = {}
        for name, module in self.modules.items():
            settings = copy.copy(self.recipe.training)
            settings.per_device_train_batch_size = batch_size
            settings.train_sampling_strategy = "random" if name == "plain" else "sequential"
            found[name] = Trainer(module, settings, data_collator=collators[name], train_dataset=rows)
        return found


def epoch(trainer: Trainer, lean: bool) -> float:
    """Seconds of the steps of one epoch."""
    clock = StepClock()
    trainer.add_callback(clock)
    with disable_input_dtype_casting(trainer.model, active=lean):
        trainer.train()
    trainer.remove_callback(clock)
    return clock.seconds


def step_memory(trainer: Trainer, lean: bool) -> int:
    """The most bytes beyond the weights during a step after the first, which finds the optimizer's state there.

    Measured in a first step, where the most is before that state is made, and the state's bytes added.
    """
    peak = peak_memory(lambda: epoch(trainer, lean))
    states = trainer.optimizer.state.values()
    return peak + sum(value.nbytes for state in states for value in state.values() if isinstance(value, torch.Tensor))


def measure(model_name: str, layers: int | None, repetitions: int) -> dict:
    """Memory of the three ways on one batch as large as the recipe's, and time on smaller ones."""
    _, batch_size, _ = MODELS[model_name]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(model_name, layers, folder)
        recipes_size = bench.recipe.training.per_device_train_batch_size
        memory, weights = {}, {}
        for name, trainer in bench.trainers(1, recipes_size).items():
            memory[name] = step_memory(trainer, name != "plain")
            weights[name] = sum(parameter.nbytes for parameter in trainer.model.parameters())
        shown = {way: f"{held / 1e6:.0f} MB" for way, held in memory.items()}
        print(model_name, layers, recipes_size, "rows:", shown, flush=True)
        gc.collect()
        trainers = bench.trainers(BATCHES, batch_size)
        ways = {name: lambda t=trainer, n=name: epoch(t, n != "plain") for name, trainer in trainers.items()}
        seconds = take_turns(ways, repetitions)
    gc.collect()
    found = {"layers": layers, "seconds": seconds, "memory": memory, "weights": weights}
    return found | {"memory_batch_size": recipes_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file that gets the figures")
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {"machine": machine(), "models": {}}
    for name, (recipe, batch_size, depths) in MODELS.items():
        setting = {"recipe": recipe, "batch_size": batch_size, "batches": BATCHES, "depths": []}
        found["models"][name] = setting
        for layers in depths:
            setting["depths"].append(measure(name, layers, args.repetitions))
            median = {way: statistics.median(values) for way, values in setting["depths"][-1]["seconds"].items()}
            print(name, layers, {way: round(seconds, 2) for way, seconds in median.items()}, flush=True)
        record(args.output, "train_step", found)


if __name__ == "__main__":
    main()
