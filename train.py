"""Trains EGMF by a recipe.

    python train.py recipes/mosi_smollm2.yaml --corpus_dir DIR [--any_field value ...]
    accelerate launch --config_file recipes/accelerate/ddp.yaml train.py recipes/mosi_smollm2.yaml --corpus_dir DIR

Phases: each tower from scratch (`tower_epochs`), the fusion without the LLM (`fusion_epochs`), the fusion and the LLM
with LoRA. `num_train_epochs: 0` stops after the towers.

`--dry_run` shows rows, a prompt, parameters and memory, and stops.

Writes to `output_dir`: checkpoints in a folder per phase (repeat the command to resume), `log.jsonl`, `training.png`,
the splits of a table in `splits.csv`, trained towers in `towers/` (for `audio_tower` and `vision_tower` of other
recipes), `model/` (merged, in float32, for `AutoModel.from_pretrained(..., trust_remote_code=True)`; `recipe.json` in
it has the recipe's fields and the packages' versions) and `adapter/` (the weights trained last, for `publish.py
--adapter_only`).
"""

import copy
import dataclasses
import json
import logging
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from datasets import Dataset, DatasetDict, concatenate_datasets
from peft.helpers import disable_input_dtype_casting
from transformers import TrainingArguments, set_seed

from corpora.report import describe_corpus, find_doubts
from corpora.splits import SPLITS_FILE, write_splits
from egmf.data.collator import AffectCollator, expand_by_task, prompt_lengths
from egmf.data.mixture import check_corpora, load_corpora, mix_rows
from egmf.data.speakers import Centers, name_speakers, speaker_centers
from egmf.data.tower_cache import COLUMNS, TowerCache
from egmf.files import writing
from egmf.modeling_egmf import EGMFForConditionalGeneration, undivided
from egmf.processes import are_sharded, in_turns, silence_other_ranks
from egmf.processing_egmf import EGMFProcessor
from egmf.recipe import DataArguments, Recipe, load_recipe
from egmf.training.assembly import (
    add_lora,
    build_model,
    build_processor,
    build_towers,
    check_clip_statistics,
    describes_new_tower,
    gather_trained_model,
    merge_lora,
    set_clip_statistics,
    set_feature_statistics,
    set_trainable_towers,
    start_speech_tower,
    trained_towers,
)
from egmf.training.calibration import calibrate
from egmf.training.checkpoints import has_begun, keep_settings
from egmf.training.dry_run import describe_model, describe_prompt
from egmf.training.language_models import resolve_language_model
from egmf.training.preemption import run_training
from egmf.training.pretraining import FusionPretraining, TowerPretraining
from egmf.training.shrinking import shrink
from egmf.training.trainer import AffectTrainer, RunTrainer, check_best_metric, check_media, metrics_of


# Packages whose versions are recorded with the model.
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")


def pretrain(
    recipe: Recipe, module, collator: AffectCollator, rows, output: Path, epochs: int, rate: float, mixture=None
) -> None:
    """Runs or resumes a phase without the LLM (`egmf/training/pretraining.py`), or loads a finished one.

    Args:
        module: The module to train.
        collator: A collator for scoring: prompts, with the indices of task and answer.
        rows: The training split, repeated for each task.
        output: Folder of the phase's checkpoints.
        epochs, rate: Number of epochs and peak learning rate.
        mixture: See [`MixtureTrainer`].
    """
    own = dataclasses.replace(
        recipe.training,
        output_dir=str(output),
        num_train_epochs=epochs,
        max_steps=-1,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=recipe.phases.fusion_batch_size,
        eval_strategy="no",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=False,
        train_sampling_strategy="random",
        lr_scheduler_kwargs=None,
        neftune_noise_alpha=None,
        eval_on_start=False,
        activation_checkpointing=False,  # a method of whole models only
        gradient_checkpointing=None,
    )
    set_seed(own.seed)  # a phase starts with the same random state whether or not earlier ones were resumed
    trainer = RunTrainer(
        module,
        own,
        data_collator=collator,
        train_dataset=rows,
        mixture=mixture,
        run_folder=output.parent,
        phase=output.name,
    )
    trainer.train_or_resume()
    if own.world_size > 1:  # running averages of batch normalisation differ between processes
        broadcast([*module.buffers()])


def autocast_of(training: TrainingArguments) -> torch.dtype | None:
    """The dtype of the autocast that Trainer's steps run under; None without one, as float16 has none on a CPU."""
    if training.mixed_precision == "fp16" and training.device.type == "cpu":
        return None
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(training.mixed_precision)


def fill_cache(
    recipe: Recipe, model, processor, towers: dict[str, tuple], trained: list[str], corpus, inputs: TowerCache | None
) -> TowerCache:
    """Caches the clips of train and validation. Logs files that cannot be read; they count as missing modalities."""
    training = recipe.training
    frozen = towers.keys() - trained
    inputs = inputs or TowerCache(model, processor, frozen=(), trained=towers)
    for part in [getattr(model.model, f"{name}_tower") for name in towers] if are_sharded() else [model]:
        part.to(training.device)  # the LLM of a divided model may be too large for one device
    cache = TowerCache(model, processor, frozen, trained, autocast_of(training), inputs=inputs)
    for split, speeds in (("train", recipe.data.audio_speeds), ("validation", (1.0,))):
        cache.fill(corpus[split].select_columns([*COLUMNS.values()]), training.device, speeds)
    for error in cache.errors.values():
        logging.warning("%s It counts as a missing modality.", error)
    return cache


def compute_centers(recipe: Recipe, model, processor, corpus: dict[str, Dataset], cache: TowerCache | None) -> Centers:
    """Computes the centers of all speakers of train, at each speed, and for speaker adaptation of validation."""
    tasks = [processor.tasks[recipe.data.tasks[0]]]
    collator = AffectCollator(processor, tasks, recipe.data.modalities, with_answers=None, cache=cache)
    centers: Centers = {}
    splits = {"train": recipe.data.audio_speeds, **({"validation": [1.0]} if recipe.data.speaker_adaptation else {})}
    for split, speeds in splits.items():
        if len(corpus[split]):
            rows = expand_by_task(corpus[split], tasks)
            found = speaker_centers(model, rows, collator, recipe.phases.fusion_batch_size, speeds)
            for modality, own in found.items():
                centers.setdefault(modality, {}).update(own)
    return centers


def with_lengths(rows: Dataset, collator: AffectCollator) -> Dataset:
    """Adds a column `length`, the number of prompt tokens, by which rows are grouped."""
    return rows.add_column("length", prompt_lengths(rows, collator))


def validation_splits(data: DataArguments, corpora: list[DatasetDict]) -> list[tuple[str, str, Dataset]]:
    """Each corpus's validation rows with each of its tasks: the name in the log, the task's name and the rows."""
    return [
        (f"{part.name}_{name}" if data.corpora else name, name, rows["validation"])
        for part, rows in zip(data.parts, corpora, strict=True)
        for name in (part.tasks if len(rows["validation"]) else ())
    ]


def check_sharding(recipe: Recipe) -> None:
    """Raises a ValueError if a recipe uses features that FSDP and DeepSpeed do not support."""
    epochs = {name: getattr(recipe.phases, name) for name in ("tower_epochs", "fusion_epochs")}
    for name, count in epochs.items() if are_sharded() else ():
        if count:
            wanted = "0, or recipes/accelerate/ddp.yaml"
            raise ValueError(f"{name}: got {count} for a model that FSDP or DeepSpeed divides, wanted {wanted}")
    if are_sharded() and recipe.model.load_in_4bit:
        raise ValueError("load_in_4bit: got true for a model that FSDP or DeepSpeed divides, wanted false")


def save_tower(model: EGMFForConditionalGeneration, modality: str, preprocessor, folder: Path) -> None:
    """Saves a tower as a separate model, with its feature extractor or image processor."""
    with writing(folder):
        # A copy, because saving changes the configuration, which is part of the cache's key.
        copy.deepcopy(getattr(model.model, f"{modality}_tower")).save_pretrained(folder)
        preprocessor.save_pretrained(folder)


def save_model(recipe: Recipe, model: EGMFForConditionalGeneration, processor: EGMFProcessor, folder: Path) -> None:
    """Saves the merged model with its processor, code and `recipe.json`."""
    fields = recipe.record()
    del fields["corpus_dir"]  # a local path
    for name in ("language_model", "audio_tower", "vision_tower"):
        if isinstance(fields[name], str) and os.path.isdir(fields[name]):
            fields[name] = Path(fields[name]).name
    fields["training"] = recipe.training_record()
    fields["packages"] = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    with writing(folder):
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "recipe.json").write_text(json.dumps(fields, indent=2) + "\n")


def report_corpora(recipe: Recipe, corpora: list[DatasetDict], output: Path) -> None:
    """Says what tables (in a dry run: all corpora) contain, and writes down the splits of a table.

    Raises:
        ValueError: If the run began with other rows or splits.
    """
    for part, corpus in zip(recipe.data.parts, corpora, strict=True):
        if part.name == "table" or recipe.dry_run:
            print("\n".join([f"{part.name}: {part.source or 'no files'}", *describe_corpus(corpus)]), flush=True)
            for doubt in find_doubts(corpus):
                logging.warning("%s: %s", part.name, doubt)
        if part.name == "table" and not recipe.dry_run:
            if not has_begun(output):  # nothing was learned from the former table
                (output / SPLITS_FILE).unlink(missing_ok=True)
            write_splits(output / SPLITS_FILE, corpus)


def main(arguments: list[str]) -> None:
    recipe = load_recipe(arguments)
    training, data = recipe.training, recipe.data
    silence_other_ranks()
    check_sharding(recipe)
    output = Path(training.output_dir)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir: got {output}, a file, wanted a folder")
    if not recipe.dry_run:
        output.mkdir(parents=True, exist_ok=True)
        if PartialState().is_main_process:
            keep_settings(output, recipe.settings())
    set_seed(training.seed)

    with in_turns():  # creates generated corpora, shrunk models and the converted LLM
        corpora = load_corpora(data)
        if recipe.model.shrink != 1:
            recipe = dataclasses.replace(recipe, model=shrink(recipe.model, output / "shrunk"))
        language_model = resolve_language_model(recipe.model.language_model)
    if PartialState().is_main_process:
        report_corpora(recipe, corpora, output)
    if data.by_speaker:
        for split in ("train", "validation") if data.speaker_adaptation else ("train",):
            for part, splits in zip(data.parts, corpora, strict=True):
                splits[split] = name_speakers(part.name, split, splits[split])
    corpus = {split: concatenate_datasets([part[split] for part in corpora]) for split in ("train", "validation")}
    with undivided():
        towers = build_towers(recipe)
    processor = build_processor(recipe, language_model, towers)
    tasks = [processor.tasks[name] for name in data.tasks]
    check_corpora(data.parts, corpora, processor, data.modalities)
    if training.eval_strategy != "no" and not len(corpus["validation"]):
        raise ValueError(f"eval_strategy: got {training.eval_strategy.value} without validation rows, wanted no")
    check_best_metric(training, {key: processor.tasks[name] for key, name, _ in validation_splits(data, corpora)})
    check_clip_statistics(recipe, corpus["train"])
    asked, mixture = mix_rows(data.parts, corpora, processor, data.balance_classes)
    with undivided():
        model = build_model(recipe, language_model, processor, towers, corpus["train"])

    training.remove_unused_columns = False  # the collator reads the corpus's columns
    learns_on = trained_towers(recipe, towers)
    if recipe.dry_run:
        collator = AffectCollator(processor, tasks, data.modalities, with_answers=True)
        model = add_lora(recipe, model, learns_on)
        print("\n".join([*describe_prompt(asked[0], collator), *describe_model(recipe, model, asked, collator)]))
        return
    with_experts = list(towers) if recipe.phases.tower_epochs else learns_on
    inputs = fill_cache(recipe, model, processor, towers, with_experts, corpus, None) if towers else None
    if inputs is not None and training.process_index == 0:
        check_media(output / "unreadable.json", inputs.errors)
    if describes_new_tower(recipe.model.audio_tower) and "audio" in with_experts:
        set_seed(training.seed)
        some = corpus["train"]["audio"][:: max(1, len(corpus["train"]) // 500)]
        heard = (inputs.load("audio", path)["audio"] for path in some)
        start_speech_tower(model.model.audio_tower, [clip for clip in heard if clip is not None])
    speeds, adapted, centers = tuple(data.audio_speeds), None, None
    if data.by_speaker:
        centers = compute_centers(recipe, model, processor, corpus, inputs)
    if data.speaker_adaptation:
        adapted = centers
        set_feature_statistics(model, corpus["train"], adapted)
    if recipe.phases.tower_epochs:
        for modality in towers:
            set_seed(training.seed)  # the readout starts with the same weights whether or not the cache was filled
            alone = TowerPretraining(model, modality, tasks[0]).requires_grad_()
            collator = AffectCollator(
                processor, tasks[:1], [modality], with_answers=False, cache=inputs, speeds=speeds
            )
            first = [dataclasses.replace(data.parts[0], tasks=data.tasks[:1])]
            rows, own_mixture = mix_rows(first, corpora, processor, data.balance_classes)
            epochs, rate = recipe.phases.tower_epochs, recipe.phases.tower_learning_rate
            pretrain(recipe, alone, collator, rows, output / f"{modality}_tower", epochs, rate, own_mixture)
            alone.requires_grad_(False)
    set_clip_statistics(model, corpus, inputs, adapted)
    if recipe.phases.fusion_epochs:
        set_trainable_towers(model, with_experts)
        experts = FusionPretraining(model.to(training.device), processor, tasks, recipe.phases.fusion_label_smoothing)
        collator = AffectCollator(
            processor,
            tasks,
            data.modalities,
            with_answers=False,
            cache=inputs,
            augmented=tuple(with_experts),
            speeds=speeds,
            modality_dropout=data.modality_dropout,
            centers=centers,
            speaker_mixing=data.speaker_mixing,
            blanks=training.world_size > 1,
        )
        epochs, rate = recipe.phases.fusion_epochs, recipe.phases.fusion_learning_rate
        pretrain(recipe, experts, collator, asked, output / "fusion", epochs, rate, mixture)
    for modality in with_experts if PartialState().is_main_process else ():
        save_tower(model, modality, towers[modality][1], output / "towers" / modality)
    if not training.num_train_epochs:
        return
    set_trainable_towers(model, learns_on)
    cache = fill_cache(recipe, model, processor, towers, learns_on, corpus, inputs) if towers else None
    learning = AffectCollator(
        processor,
        tasks,
        data.modalities,
        with_answers=True,
        cache=cache,
        speeds=speeds,
        modality_dropout=data.modality_dropout,
        centers=centers,
        speaker_mixing=data.speaker_mixing,
        blanks=training.world_size > 1,
    )
    scoring = AffectCollator(processor, tasks, data.modalities, with_answers=False, cache=cache, centers=adapted)
    train_rows = with_lengths(asked, learning)
    validation = {
        key: with_lengths(expand_by_task(rows, [processor.tasks[name]]), learning)
        for key, name, rows in validation_splits(data, corpora)
    }
    set_seed(training.seed)  # the last phase starts alike whether earlier ones were trained or loaded
    model = add_lora(recipe, model, learns_on)
    if PartialState().is_main_process:
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
        mixture=mixture,
        run_folder=output,
    )
    # Under autocast, LoRA's cast of its input to float32 takes a quarter of a step and has no effect.
    with disable_input_dtype_casting(model, active=training.mixed_precision == "bf16"):
        trainer.train_or_resume()
        calibrate(trainer, processor, data.tasks, validation.values(), recipe.phases)
    whole = gather_trained_model(recipe, trainer, learns_on)
    if whole is not None:
        with writing(output / "adapter"):
            whole.save_pretrained(output / "adapter")
        save_model(recipe, merge_lora(whole), processor, output / "model")
        print(f"model: {output / 'model'}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_training(main, sys.argv[1:])
