"""Trains EGMF by a recipe.

    python train.py recipes/mosi_smollm2.yaml --corpus_dir DIR [--any_field value ...]
    accelerate launch train.py recipes/mosi_smollm2.yaml --corpus_dir DIR

A recipe with `tower_epochs` first trains each tower alone, one with `expert_epochs` the fusion without the LLM, and
these towers with it, then the fusion and the LLM with LoRA. Writes to `output_dir`: a folder of checkpoints per phase
(the same command resumes from the last one), `log.jsonl`, the trained towers in `towers/`, for the `audio_tower` and
`vision_tower` of other recipes, and `model/`: merged and self-contained, for
`AutoModel.from_pretrained(..., trust_remote_code=True)`, with the recipe's fields in `recipe.json`. With
`num_train_epochs: 0` the towers are all that is made.
"""

import dataclasses
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from peft.helpers import disable_input_dtype_casting
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from assembly import add_lora, build_model, build_processor, build_towers, learn, set_clip_statistics, trained_towers
from evaluation import AffectCollator, ask, classification_metrics, prompt_lengths, regression_metrics
from language_models import resolve_language_model
from mixture import MixtureTrainer, ask_parts, check_parts, load_parts, mixture_of
from modeling_egmf import EGMFForConditionalGeneration
from pretraining import ExpertPretraining, TowerPretraining
from processing_egmf import EGMFProcessor
from recipes import Recipe, load_recipe
from shrinking import shrink
from tower_cache import COLUMNS, TowerCache


class JsonLinesLog(TrainerCallback):
    """Appends every log entry of the Trainer to a file, one JSON object a line, with `fields` in each."""

    def __init__(self, path: Path, **fields: str):
        self.path, self.fields = path, fields

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**self.fields, "step": state.global_step, **logs}) + "\n")


class AffectTrainer(MixtureTrainer):
    """Trainer whose evaluation scores every legal answer instead of comparing logits at the gold tokens.

    An evaluation data set asks one task; of several tasks there is a dict of them. Evaluation loss is the negative
    log-probability of the gold answer among the legal ones; selection sees the validation split alone.
    """

    def __init__(self, *args, scoring_collator: AffectCollator, **kwargs):
        super().__init__(*args, **kwargs)
        self.scoring_collator = scoring_collator

    def get_eval_dataloader(self, eval_dataset=None):
        training_collator, self.data_collator = self.data_collator, self.scoring_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training_collator

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        answers, tasks = inputs.pop("answer_index"), inputs.pop("task_index")
        candidates = self.scoring_collator.processor.candidates(self.scoring_collator.tasks[int(tasks[0])])
        with self.accelerator.autocast():
            scores = self.accelerator.unwrap_model(model).score_labels(candidates=candidates, **inputs)
        loss = -scores.log_probs.gather(1, answers.unsqueeze(1)).mean()
        return loss, scores.log_probs, torch.stack([answers, tasks], 1)


def pretrain(
    recipe: Recipe, module, collator: AffectCollator, rows, output: Path, epochs: int, rate: float, mixture=None
) -> None:
    """A phase without the LLM: see `pretraining.py`. An interrupted one goes on, a finished one is read.

    Args:
        module: What learns.
        collator: For scoring: prompts alone, and the places of task and answer.
        rows: The training split, asked.
        output: Folder of the phase's checkpoints.
        epochs, rate: How long, and the highest learning rate.
        mixture: See [`MixtureTrainer`].
    """
    own = dataclasses.replace(
        recipe.training,
        output_dir=str(output),
        num_train_epochs=epochs,
        max_steps=-1,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=recipe.experts.expert_batch_size,
        eval_strategy="no",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=False,
        train_sampling_strategy="random",
    )
    set_seed(own.seed)  # whatever was finished or interrupted before, a phase begins alike
    log = JsonLinesLog(output.parent / "log.jsonl", phase=output.name)
    trainer = MixtureTrainer(module, own, data_collator=collator, train_dataset=rows, callbacks=[log], mixture=mixture)
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(output))


def fill_cache(
    recipe: Recipe, model, processor, towers: dict[str, tuple], trained: list[str], corpus, inputs: TowerCache | None
) -> TowerCache:
    """What training needs of every clip that it sees; one that gives nothing is named, and missing."""
    training = recipe.training
    # As the training steps run: a hidden layer does not depend on where it is computed.
    precision = torch.autocast(training.device.type, torch.bfloat16, enabled=training.bf16)
    frozen = towers.keys() - trained
    inputs = inputs or TowerCache(model, processor, frozen=(), trained=towers)
    cache = TowerCache(model.to(training.device), processor, frozen, trained, precision, inputs=inputs)
    for split, speeds in (("train", recipe.data.audio_speeds), ("validation", (1.0,))):
        cache.fill(corpus[split].select_columns([*COLUMNS.values()]), training.device, speeds)
    for error in cache.errors.values():
        logging.warning("%s It counts as a missing modality.", error)
    return cache


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; None if there is none. Later ones are removed."""
    numbered = ((int(path.name.rpartition("-")[2]), path) for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*[0-9]"))
    for step, path in sorted(numbered, reverse=True):
        try:
            # Trainer writes its state last.
            if json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["global_step"] == step:
                return str(path)
        except (OSError, ValueError):
            pass
        logging.warning("%s was not written to its end, and is removed", path)
        shutil.rmtree(path)
    return None


def steps_of(checkpoint: str | None) -> int:
    """How many steps led to a checkpoint."""
    return int(checkpoint.rpartition("-")[2]) if checkpoint else 0


def with_lengths(rows: Dataset, collator: AffectCollator) -> Dataset:
    """Rows with the number of tokens of each one's prompt, by which Trainer groups them."""
    return rows.add_column("length", prompt_lengths(rows, collator))


def metrics_of(tasks: list, predictions) -> dict[str, float]:
    """Trainer's validation metrics of a task, from the answers' log-probabilities and the places of gold and task."""
    golds, places = predictions.label_ids.T
    task = tasks[places[0]]
    gold = [task.parse(task.answers[index]) for index in golds]
    if task.kind == "classification":
        best = [task.answers[index] for index in predictions.predictions.argmax(-1)]
        return classification_metrics(gold, best)
    scores = np.asarray([task.parse(answer) for answer in task.answers])
    return regression_metrics(gold, list(np.exp(predictions.predictions) @ scores))


def save_tower(model: EGMFForConditionalGeneration, modality: str, preprocessor, folder: Path) -> None:
    """A tower as a model of its own, with its feature extractor or image processor."""
    getattr(model.model, f"{modality}_tower").save_pretrained(folder)
    preprocessor.save_pretrained(folder)


def save_model(recipe: Recipe, model: EGMFForConditionalGeneration, processor: EGMFProcessor, folder: Path) -> None:
    """The merged model, self-contained, with the recipe's fields in `recipe.json`."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    fields = vars(recipe.data) | vars(recipe.model) | vars(recipe.experts)
    del fields["corpus_dir"]  # a path of this machine is nobody else's business
    for name in ("language_model", "audio_tower", "vision_tower"):
        if isinstance(fields[name], str) and os.path.isdir(fields[name]):
            fields[name] = Path(fields[name]).name
    (folder / "recipe.json").write_text(json.dumps(fields, indent=2) + "\n")


def main(arguments: list[str]) -> None:
    recipe = load_recipe(arguments)
    training, data = recipe.training, recipe.data
    output = Path(training.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    set_seed(training.seed)

    corpora = load_parts(data.parts)
    corpus = {split: concatenate_datasets([part[split] for part in corpora]) for split in ("train", "validation")}
    if recipe.model.shrink != 1:
        shrink(recipe.model, output / "shrunk")
    language_model = resolve_language_model(recipe.model.language_model)
    towers = build_towers(recipe)
    processor = build_processor(recipe, language_model, towers)
    tasks = [processor.tasks[name] for name in data.tasks]
    check_parts(data.parts, corpora, processor, data.modalities)
    asked, mixture = ask_parts(data.parts, corpora, processor, "train"), mixture_of(data.parts, corpora)
    model = build_model(recipe, language_model, processor, towers, corpus["train"])

    training.remove_unused_columns = False  # the collator reads the corpus's columns
    learns_on = trained_towers(recipe, towers)
    with_experts = list(towers) if recipe.experts.tower_epochs else learns_on
    inputs = fill_cache(recipe, model, processor, towers, with_experts, corpus, None) if towers else None
    if recipe.experts.tower_epochs:
        for modality in towers:
            set_seed(training.seed)  # for the readout: whatever was computed or read before, it begins alike
            alone = TowerPretraining(model, modality, tasks[0]).requires_grad_()
            collator = AffectCollator(processor, tasks[:1], [modality], with_answers=False, cache=inputs)
            rows, phase = ask(corpus["train"], tasks[:1]), output / f"{modality}_tower"
            epochs, rate = recipe.experts.tower_epochs, recipe.experts.tower_learning_rate
            pretrain(recipe, alone, collator, rows, phase, epochs, rate)
            alone.requires_grad_(False)
    set_clip_statistics(model, corpus, inputs)
    speeds = tuple(data.audio_speeds)
    if recipe.experts.expert_epochs:
        learn(model, with_experts)
        experts = ExpertPretraining(model.to(training.device), processor, tasks)
        collator = AffectCollator(processor, tasks, data.modalities, with_answers=False, cache=inputs)
        collator.speeds, collator.augmented = speeds, tuple(with_experts)
        epochs, rate = recipe.experts.expert_epochs, recipe.experts.expert_learning_rate
        pretrain(recipe, experts, collator, asked, output / "experts", epochs, rate, mixture)
    for modality in with_experts:
        save_tower(model, modality, towers[modality][1], output / "towers" / modality)
    if not training.num_train_epochs:
        return
    learn(model, learns_on)
    cache = fill_cache(recipe, model, processor, towers, learns_on, corpus, inputs) if towers else None
    learning, scoring = (
        AffectCollator(processor, tasks, data.modalities, with_answers=flag, cache=cache) for flag in (True, False)
    )
    learning.speeds = speeds
    train_rows, validation = with_lengths(asked, learning), {}
    for part, rows in zip(data.parts, corpora, strict=True):
        for name in part.tasks if len(rows["validation"]) else ():
            key = f"{part.name}_{name}" if data.corpora else name
            validation[key] = with_lengths(ask(rows["validation"], [processor.tasks[name]]), learning)
    checkpoint = last_whole_checkpoint(output)
    set_seed(training.seed)  # whatever was read and not computed until here, the last phase begins alike
    model = add_lora(recipe, model, learns_on)
    model.print_trainable_parameters()

    trainer = AffectTrainer(
        model,
        training,
        data_collator=learning,
        scoring_collator=scoring,
        train_dataset=train_rows,
        eval_dataset=validation if len(validation) > 1 else next(iter(validation.values()), None),
        processing_class=processor,
        compute_metrics=lambda predictions: metrics_of(tasks, predictions),
        callbacks=[JsonLinesLog(output / "log.jsonl")],
        mixture=mixture,
    )
    # Under autocast LoRA's own cast of its input to float32 and back is a quarter of a step's time, for nothing.
    with disable_input_dtype_casting(model, active=training.bf16):
        if steps_of(checkpoint) == training.max_steps:  # killed before it was saved; Trainer would take another step
            trainer._load_from_checkpoint(checkpoint)
        else:
            trainer.train(resume_from_checkpoint=checkpoint)

    if trainer.is_world_process_zero():
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        save_model(recipe, merged, processor, output / "model")
        print(f"model: {output / 'model'}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(sys.argv[1:])
