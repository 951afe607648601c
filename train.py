"""Trains EGMF by a recipe.

    python train.py recipes/mosi_smollm2.yaml --corpus_dir DIR [--any_field value ...]
    accelerate launch --config_file recipes/accelerate/ddp.yaml train.py recipes/mosi_smollm2.yaml --corpus_dir DIR

Phases: each tower from scratch (`tower_epochs`); the fusion without the LLM (`fusion_epochs`); the LLM with LoRA and
the projector (without `fusion_epochs`, the whole fusion). `num_train_epochs: 0` stops before the LLM.

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
import math
import os
import platform
import sys
from collections.abc import Iterable
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
from egmf.data.mixture import check_corpora, has_words, load_corpora, mix_rows
from egmf.data.speakers import Centers, name_speakers, speaker_centers
from egmf.data.tower_cache import COLUMNS, TowerCache
from egmf.files import has_begun, writing
from egmf.modeling_egmf import EGMFForConditionalGeneration, undivided
from egmf.processes import are_sharded, in_turns, silence_other_ranks
from egmf.processing_egmf import AffectTask, EGMFProcessor
from egmf.recipe import DataArguments, Recipe
from egmf.recipe_reading import load_recipe
from egmf.training.assembly import (
    add_lora,
    build_model,
    build_processor,
    build_towers,
    describes_new_tower,
    gather_trained_model,
    merge_lora,
    set_trainable_towers,
    start_speech_tower,
    trained_towers,
)
from egmf.training.calibration import calibrate
from egmf.training.checkpoints import check_media, keep_settings
from egmf.training.dry_run import describe_model, describe_prompt
from egmf.training.language_models import resolve_language_model
from egmf.training.preemption import run_training
from egmf.training.pretraining import FusionPretraining, TowerPretraining, answer_prior
from egmf.training.shrinking import shrink
from egmf.training.statistics import check_clip_statistics, set_clip_statistics, set_feature_statistics
from egmf.training.trainer import RunTrainer
from egmf.training.validation import AffectTrainer, check_best_metric, validation_metrics


WARMUP = 0.06
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
        epochs, rate: Number of epochs and peak learning rate. A warm-up of a number of steps is meant for the last
            phase; this one then has that of the recipes, a share of its own steps.
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
        gradient_accumulation_steps=1,
        eval_strategy="no",
        save_strategy="epoch",
        save_total_limit=1,
        warmup_steps=recipe.training.warmup_steps if recipe.training.warmup_steps < 1 else WARMUP,
        load_best_model_at_end=False,
        train_sampling_strategy="random",
        lr_scheduler_kwargs=None,
        neftune_noise_alpha=None,
        eval_on_start=False,
        activation_checkpointing=False,  # a method of whole models only
        gradient_checkpointing=None,
    )
    own._n_gpu = recipe.training._n_gpu  # no field
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
    if are_sharded() and (precision := recipe.training.mixed_precision) != "no":
        wanted = "false: the inputs of the fusion, such as times, would be rounded"
        raise ValueError(f"{precision}: got true for a model that FSDP or DeepSpeed divides, wanted {wanted}")


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
            if not has_begun(output) and not (output / "model").exists():  # nothing was learned from a former table
                (output / SPLITS_FILE).unlink(missing_ok=True)
            write_splits(output / SPLITS_FILE, corpus)


@dataclasses.dataclass
class Run:
    """What the phases of a run share.

    Args:
        recipe, output: The recipe and the run's folder.
        corpora: The splits of each corpus.
        corpus: The training and the validation rows of all corpora.
        towers: The encoders with their feature extractors or image processors, by modality.
        processor, model: The processor and the model, whose weights the phases change.
        rows: The training rows, repeated for each of their tasks.
        mixture: How they are drawn, see [`MixtureTrainer`].
        inputs: A cache of the clips for the phases before the LLM; None without encoders.
        centers: Centers of the speakers; None if the recipe needs none.
    """

    recipe: Recipe
    output: Path
    corpora: list[DatasetDict]
    corpus: dict[str, Dataset]
    towers: dict[str, tuple]
    processor: EGMFProcessor
    model: EGMFForConditionalGeneration
    rows: Dataset
    mixture: tuple[list[int], list[float]] | None
    inputs: TowerCache | None = None
    centers: Centers | None = None

    @property
    def tasks(self) -> list[AffectTask]:
        return [self.processor.tasks[name] for name in self.recipe.data.tasks]

    @property
    def trained(self) -> list[str]:
        """Modalities whose encoders learn in the last phase."""
        return trained_towers(self.recipe, self.towers)

    @property
    def trained_early(self) -> list[str]:
        """Modalities whose encoders learn before the last phase; without such a phase, those that learn in it."""
        return list(self.towers) if self.recipe.phases.tower_epochs else self.trained

    @property
    def adapted(self) -> Centers | None:
        """The centers to which clips are adapted after training, too."""
        return self.centers if self.recipe.data.speaker_adaptation else None

    def collator(
        self, cache: TowerCache | None, with_answers: bool, augmented: tuple[str, ...] = ()
    ) -> AffectCollator:
        """The collator of a phase that trains the fusion or the LLM."""
        data = self.recipe.data
        return AffectCollator(
            self.processor,
            self.tasks,
            data.modalities,
            with_answers=with_answers,
            cache=cache,
            augmented=augmented,
            speeds=tuple(data.audio_speeds),
            modality_dropout=data.modality_dropout,
            centers=self.centers,
            speaker_mixing=data.speaker_mixing,
            blanks=self.recipe.training.world_size > 1,
        )


def prepare(recipe: Recipe) -> Run:
    """Loads the corpora, checks what can be checked before anything is computed, and builds the model."""
    training, data = recipe.training, recipe.data
    output = Path(training.output_dir)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir: got {output}, a file, wanted a folder")
    if not recipe.dry_run:
        output.mkdir(parents=True, exist_ok=True)
    with in_turns():  # creates generated corpora
        corpora = load_corpora(data)
    if "modalities" not in recipe.fields and not any(has_words(part["train"]) for part in corpora):
        logging.warning("modalities: no training row has words; the model learns without them")
        data.modalities = [name for name in data.modalities if name != "text"]
    if PartialState().is_main_process and not recipe.dry_run:
        keep_settings(output, recipe.settings())
    set_seed(training.seed)

    with in_turns():  # creates shrunk models and the converted LLM
        if recipe.model.shrink != 1:
            recipe = dataclasses.replace(recipe, model=shrink(recipe.model, output / "shrunk"))
        language_model = resolve_language_model(recipe.model.language_model)
    if PartialState().is_main_process:
        report_corpora(recipe, corpora, output)
    open_fields = None in (recipe.phases.expert_gain, recipe.phases.temperature)
    if open_fields and training.num_train_epochs and not any(len(part["validation"]) for part in corpora):
        logging.warning("no validation rows: expert_gain and temperature are not fitted; what the recipe lacks is 1")
    if data.by_speaker:
        for split in ("train", "validation") if data.speaker_adaptation else ("train",):
            for part, splits in zip(data.parts, corpora, strict=True):
                splits[split] = name_speakers(part.name, split, splits[split])
    corpus = {split: concatenate_datasets([part[split] for part in corpora]) for split in ("train", "validation")}
    with undivided():
        towers = build_towers(recipe)
    processor = build_processor(recipe, language_model, towers)
    check_corpora(recipe, corpora, processor)
    if training.eval_strategy != "no" and not len(corpus["validation"]):
        raise ValueError(f"eval_strategy: got {training.eval_strategy.value} without validation rows, wanted no")
    check_best_metric(training, {key: processor.tasks[name] for key, name, _ in validation_splits(data, corpora)})
    check_clip_statistics(recipe, corpus["train"])
    rows, mixture = mix_rows(data.parts, corpora, processor, data.balance_classes)
    with undivided():
        model = build_model(recipe, language_model, processor, towers, corpus["train"])
    heard, seconds = processor.audio_window if "audio" in towers else math.inf, processor.clip_seconds or 0.0
    if seconds > heard:
        why = "a twentieth or more of the training clips are longer, and only their beginning is heard"
        logging.warning("audio_window: got %g seconds, wanted up to %g: %s", heard, seconds, why)
    training.remove_unused_columns = False  # the collator reads the corpus's columns
    return Run(recipe, output, corpora, corpus, towers, processor, model, rows, mixture)


def describe(run: Run) -> None:
    """Prints what a dry run shows of the prompt and the model."""
    collator = AffectCollator(run.processor, run.tasks, run.recipe.data.modalities, with_answers=True)
    model = add_lora(run.recipe, run.model, run.trained)
    lines = [*describe_prompt(run.rows[0], collator), *describe_model(run.recipe, model, run.rows, collator)]
    print("\n".join(lines))


def save_towers(run: Run, model: EGMFForConditionalGeneration, modalities: Iterable[str]) -> None:
    """Saves encoders that have learned, each as a separate model with its feature extractor or image processor."""
    for modality in modalities if PartialState().is_main_process else ():
        folder = run.output / "towers" / modality
        with writing(folder):
            # A copy, because saving changes the configuration, which is part of the cache's key.
            copy.deepcopy(getattr(model.model, f"{modality}_tower")).save_pretrained(folder)
            run.towers[modality][1].save_pretrained(folder)


def read_clips(run: Run) -> None:
    """Caches the clips, and computes what depends on all of them: the start of a new encoder, and centers."""
    recipe, model, rows = run.recipe, run.model, run.corpus["train"]
    if run.towers:
        run.inputs = fill_cache(recipe, model, run.processor, run.towers, run.trained_early, run.corpus, None)
        if recipe.training.process_index == 0:
            parts = [run.corpus[split] for split in ("train", "validation")]
            errors = {
                (modality, row_id): error
                for modality in run.towers
                for rows in parts
                for row_id, error in run.inputs.errors_of(rows, [modality]).items()
            }
            check_media(run.output / "unreadable_rows.json", errors)
    if describes_new_tower(recipe.model.audio_tower) and "audio" in run.trained_early:
        set_seed(recipe.training.seed)
        heard = (run.inputs.load("audio", path)["audio"] for path in rows["audio"][:: max(1, len(rows) // 500)])
        start_speech_tower(model.model.audio_tower, [clip for clip in heard if clip is not None])
    if recipe.data.by_speaker:
        run.centers = compute_centers(recipe, model, run.processor, run.corpus, run.inputs)
    if run.adapted:
        set_feature_statistics(model, rows, run.adapted)


def train_towers(run: Run) -> None:
    """Trains each encoder alone, on the first task of the first corpus."""
    recipe, data = run.recipe, run.recipe.data
    for modality in run.towers:
        set_seed(recipe.training.seed)  # the readout starts with the same weights whether or not the cache was filled
        alone = TowerPretraining(run.model, modality, run.tasks[0]).requires_grad_()
        speeds = tuple(data.audio_speeds)
        collator = AffectCollator(
            run.processor, run.tasks[:1], [modality], with_answers=False, cache=run.inputs, speeds=speeds
        )
        first = [dataclasses.replace(data.parts[0], tasks=data.tasks[:1])]
        rows, mixture = mix_rows(first, run.corpora, run.processor, data.balance_classes)
        epochs, rate = recipe.phases.tower_epochs, recipe.phases.tower_learning_rate
        pretrain(recipe, alone, collator, rows, run.output / f"{modality}_tower", epochs, rate, mixture)
        alone.requires_grad_(False)


def train_fusion(run: Run) -> None:
    """Trains the fusion and the readout, and with them encoders that learn early, without the LLM."""
    phases = run.recipe.phases
    set_trainable_towers(run.model, run.trained_early)
    model = run.model.to(run.recipe.training.device)
    smoothing = phases.fusion_label_smoothing
    prior = answer_prior(run.rows, run.tasks, smoothing) if phases.fusion_without_prior else None
    experts = FusionPretraining(model, run.processor, run.tasks, smoothing, prior)
    collator = run.collator(run.inputs, with_answers=False, augmented=tuple(run.trained_early))
    epochs, rate = phases.fusion_epochs, phases.fusion_learning_rate
    pretrain(run.recipe, experts, collator, run.rows, run.output / "fusion", epochs, rate, run.mixture)


def train_language_model(run: Run) -> None:
    """Trains the LLM with LoRA, fits gain and temperatures, and saves the model."""
    recipe, training, data, processor = run.recipe, run.recipe.training, run.recipe.data, run.processor
    set_trainable_towers(run.model, run.trained)
    cache = None
    if run.towers:
        cache = fill_cache(recipe, run.model, processor, run.towers, run.trained, run.corpus, run.inputs)
    learning = run.collator(cache, with_answers=True)
    scoring = AffectCollator(
        processor, run.tasks, data.modalities, with_answers=False, cache=cache, centers=run.adapted
    )
    train_rows = with_lengths(run.rows, learning)
    validation = {
        key: with_lengths(expand_by_task(rows, [processor.tasks[name]]), learning)
        for key, name, rows in validation_splits(data, run.corpora)
    }
    set_seed(training.seed)  # the last phase starts alike whether earlier ones were trained or loaded
    model = add_lora(recipe, run.model, run.trained)
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
        compute_metrics=lambda predictions: validation_metrics(run.tasks, predictions),
        mixture=run.mixture,
        run_folder=run.output,
    )
    # Under autocast, LoRA's cast of its input to float32 takes a quarter of a step and has no effect.
    with disable_input_dtype_casting(model, active=training.mixed_precision == "bf16"):
        trainer.train_or_resume()
        calibrate(trainer, processor, data.tasks, validation.values(), recipe.phases)
    whole = gather_trained_model(recipe, trainer, run.trained)
    if whole is not None:
        with writing(run.output / "adapter"):
            whole.save_pretrained(run.output / "adapter")
        merged = merge_lora(whole)
        save_towers(run, merged, run.trained)
        save_model(recipe, merged, processor, run.output / "model")
        print(f"model: {run.output / 'model'}")


def main(arguments: list[str]) -> None:
    recipe = load_recipe(arguments)
    silence_other_ranks()
    check_sharding(recipe)
    run = prepare(recipe)
    if recipe.dry_run:
        describe(run)
        return
    read_clips(run)
    if recipe.phases.tower_epochs:
        train_towers(run)
    set_clip_statistics(run.model, run.corpus, run.inputs, run.adapted)
    if recipe.phases.fusion_epochs:
        train_fusion(run)
    if recipe.phases.tower_epochs:
        learn_on = run.trained if recipe.training.num_train_epochs else []
        save_towers(run, run.model, run.towers.keys() - learn_on)
    if recipe.training.num_train_epochs:
        train_language_model(run)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_training(main, sys.argv[1:])
