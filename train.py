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

import copy
import dataclasses
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from transformers import (
    CONFIG_MAPPING,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from corpora import load_corpus
from evaluation import AffectCollator, ask, check_labels, classification_metrics, prompt_lengths, regression_metrics
from language_models import resolve_language_model
from modeling_egmf import EGMFForConditionalGeneration
from pretraining import ExpertPretraining, TowerPretraining
from processing_egmf import EGMFProcessor
from recipes import Recipe, load_recipe
from tower_cache import COLUMNS, PREPROCESSORS, TowerCache
from towers_egmf import encoder_of, load_tower


class JsonLinesLog(TrainerCallback):
    """Appends every log entry of the Trainer to a file, one JSON object a line, with `fields` in each."""

    def __init__(self, path: Path, **fields: str):
        self.path, self.fields = path, fields

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**self.fields, "step": state.global_step, **logs}) + "\n")


class AffectTrainer(Trainer):
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


def cut_window(tower: PreTrainedModel, extractor: Any, seconds: int) -> tuple[PreTrainedModel, Any]:
    """A speech encoder that reads fixed windows, such as Whisper's, with windows of the first `seconds` only.

    A window is read whole, silence included, so that short clips cost what the longest one costs.

    Raises:
        ValueError: If the encoder reads no fixed windows, or shorter ones.
    """
    tower, whole = encoder_of(tower, "audio"), getattr(extractor, "chunk_length", None)
    if not whole or not hasattr(tower.config, "max_source_positions") or not 0 < seconds <= whole:
        wanted = f"at most {whole} seconds" if whole else "none: it has no fixed window"
        raise ValueError(f"audio_window: got {seconds} seconds for {type(tower).__name__}, wanted {wanted}")
    config, weights = copy.deepcopy(tower.config), tower.state_dict()
    config.max_source_positions = config.max_source_positions * seconds // whole
    weights["embed_positions.weight"] = weights["embed_positions.weight"][: config.max_source_positions]
    shorter = type(tower)(config).to(tower.dtype)
    shorter.load_state_dict(weights)
    return shorter.eval(), type(extractor).from_dict(extractor.to_dict() | {"chunk_length": seconds})


def build_tower(modality: str, tower: str | dict[str, Any]) -> tuple[PreTrainedModel, Any]:
    """The tower that a recipe names or describes, and its feature extractor or image processor.

    Raises:
        ValueError: If a description is not `{"config": {"model_type", ...}, "feature_extractor" (of vision:
            "image_processor"): {"..._type", ...}}`.
    """
    kind = PREPROCESSORS[modality]
    if isinstance(tower, str):
        if modality == "audio":
            return load_tower(tower), AutoFeatureExtractor.from_pretrained(tower)
        # The PIL backend gives the same pixels with and without torchvision.
        return load_tower(tower), AutoImageProcessor.from_pretrained(tower, backend="pil")
    config, preprocessor = (dict(tower.get(name) or {}) for name in ("config", kind))
    model_type, name = config.pop("model_type", None), preprocessor.pop(f"{kind}_type", "")
    found = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name, None)
    if model_type not in CONFIG_MAPPING or found is None or tower.keys() != {"config", kind}:
        wanted = f"a config with `model_type` and a {kind} with `{kind}_type` of transformers"
        raise ValueError(f"{modality}_tower: got {tower}, wanted {wanted}")
    return AutoModel.from_config(CONFIG_MAPPING[model_type](**config)), found(**preprocessor)


def build_towers(recipe: Recipe) -> dict[str, tuple]:
    """Tower and preprocessor by modality, of those that the recipe names and the model may see.

    Raises:
        ValueError: If a recipe without an audio tower sets what only a tower can do.
    """
    needing = (("audio_window", recipe.model.audio_window, 0), ("audio_speeds", recipe.data.audio_speeds, [1.0]))
    for field, value, unset in needing:
        if value != unset and not recipe.model.audio_tower:
            raise ValueError(f"{field}: got {value} for precomputed features, wanted an audio_tower beside it")
    named = {"audio": recipe.model.audio_tower, "vision": recipe.model.vision_tower}
    towers = {name: build_tower(name, spec) for name, spec in named.items() if spec and name in recipe.data.modalities}
    if recipe.model.audio_window and "audio" in towers:
        towers["audio"] = cut_window(*towers["audio"], recipe.model.audio_window)
    return towers


def build_processor(recipe: Recipe, language_model: str, towers: dict[str, tuple]) -> EGMFProcessor:
    return EGMFProcessor(
        AutoTokenizer.from_pretrained(language_model),
        **{PREPROCESSORS[modality]: preprocessor for modality, (_, preprocessor) in towers.items()},
        num_pseudo_tokens=recipe.model.num_pseudo_tokens,
        num_frames=recipe.model.num_frames,
        max_context_tokens=recipe.data.max_context_tokens,
        default_task=recipe.data.tasks[0],
    )


def feature_statistics(sequences: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (D,) over all frames of the clips' features (T, D); absent clips are None."""
    frames = np.concatenate([np.asarray(sequence, dtype=np.float64) for sequence in sequences if sequence is not None])
    return torch.from_numpy(frames.mean(0)), torch.from_numpy(frames.std(0))


def set_clip_statistics(model: EGMFForConditionalGeneration, corpus, cache: TowerCache | None) -> None:
    """Sets what the fusion's clip statistics are standardised by: those of the training split's clips.

    Raises:
        ValueError: If a modality has no clips, or a tower that is still to learn.
    """
    for modality, module in model.model.fusion.clip_statistics.items():
        clips = []
        for row in corpus["train"]:
            features = row[f"{modality}_features"]
            if cache is not None and modality in cache.frozen:
                features = cache.load(modality, row[COLUMNS[modality]])[f"{modality}_features"]
            if features is not None:
                frames = torch.as_tensor(features, device="cpu").unsqueeze(0)  # (1, T, layers, size) or (1, T, size)
                layers = frames.unbind(2) if frames.ndim == 4 else (frames,)
                clips.append(module.measure(layers, torch.ones(frames.shape[:2]))[0].double())
        if not clips:
            raise ValueError(f"clip_statistics: got {modality}, wanted one with clips, and features or a frozen tower")
        std, mean = torch.std_mean(torch.stack(clips), 0, correction=0)
        model.model.fusion.set_clip_statistics(modality, mean, std)


def trained_towers(recipe: Recipe, towers: dict[str, tuple]) -> list[str]:
    """Modalities whose towers are trained."""
    return [modality for modality in towers if getattr(recipe.model, f"train_{modality}_tower")]


def build_model(
    recipe: Recipe, language_model: str, processor: EGMFProcessor, towers: dict[str, tuple], train_split
) -> EGMFForConditionalGeneration:
    """The LLM with a new fusion and the towers, before any training."""
    arguments = recipe.model
    statistics = {}
    for modality in {"audio", "vision"} - towers.keys():
        sequences = train_split[f"{modality}_features"]
        if modality in recipe.data.modalities and any(sequence is not None for sequence in sequences):
            statistics[modality] = feature_statistics(sequences)
    model = EGMFForConditionalGeneration.from_language_model(
        AutoModelForCausalLM.from_pretrained(language_model, attn_implementation=arguments.attn_implementation),
        pseudo_token_id=processor.pseudo_token_id,
        num_pseudo_tokens=arguments.num_pseudo_tokens,
        fusion_hidden_size=arguments.fusion_hidden_size,
        fusion_intermediate_size=arguments.fusion_intermediate_size,
        fusion_dropout=arguments.fusion_dropout,
        experts=arguments.experts,
        local_kernel_sizes=arguments.local_kernel_sizes,
        gating=arguments.gating,
        modality_dropout=arguments.modality_dropout,
        feature_noise=arguments.feature_noise,
        clip_statistics=arguments.clip_statistics,
        audio_input_rate=processor.audio_input_rate if "audio" in towers else None,
        **{f"{modality}_tower": tower for modality, (tower, _) in towers.items()},
        **{f"{modality}_feature_size": len(mean) for modality, (mean, _) in statistics.items()},
    )
    for modality, (mean, std) in statistics.items():
        model.model.fusion.set_feature_statistics(modality, mean, std)
    for modality in trained_towers(recipe, towers) + list(towers) * bool(recipe.experts.tower_epochs):
        # Small steps would be lost in half precision.
        getattr(model.model, f"{modality}_tower").float()
    return model


def learn(model: EGMFForConditionalGeneration, towers: list[str]) -> None:
    """Which towers learn from now on, by modality; the others are frozen."""
    model.model.freeze_towers()
    for modality in towers:
        getattr(model.model, f"{modality}_tower").requires_grad_()
    model.train()  # a frozen tower has no dropout and keeps its statistics


def add_lora(recipe: Recipe, model: EGMFForConditionalGeneration, trained: list[str]) -> PeftModel:
    """LoRA on the LLM's projections; the fusion, and the towers of the `trained` modalities, are trained whole."""
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.model.lora_r,
        lora_alpha=recipe.model.lora_alpha,
        target_modules=recipe.model.lora_target_modules,
        modules_to_save=["fusion", *(f"{modality}_tower" for modality in trained)],
    )
    return get_peft_model(model, lora)


def pretrain(recipe: Recipe, module, collator: AffectCollator, rows, output: Path, epochs: int, rate: float) -> None:
    """A phase without the LLM: see `pretraining.py`. An interrupted one goes on, a finished one is read.

    Args:
        module: What learns.
        collator: For scoring: prompts alone, and the places of task and answer.
        rows: The training split, asked.
        output: Folder of the phase's checkpoints.
        epochs, rate: How long, and the highest learning rate.
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
    trainer = Trainer(module, own, data_collator=collator, train_dataset=rows, callbacks=[log])
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

    corpus = load_corpus(data.corpus, data.corpus_dir, **data.corpus_options)
    language_model = resolve_language_model(recipe.model.language_model)
    towers = build_towers(recipe)
    processor = build_processor(recipe, language_model, towers)
    tasks = [processor.tasks[name] for name in data.tasks]
    for split in ("train", "validation"):
        for task in tasks:
            check_labels(f"{data.corpus} / {split}", corpus[split], task)
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
        pretrain(recipe, experts, collator, ask(corpus["train"], tasks), output / "experts", epochs, rate)
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
    train_rows = with_lengths(ask(corpus["train"], tasks), learning)
    validation = {}
    if len(corpus["validation"]):
        validation = {task.name: with_lengths(ask(corpus["validation"], [task]), learning) for task in tasks}
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
        eval_dataset=validation if len(validation) > 1 else validation.get(tasks[0].name),
        processing_class=processor,
        compute_metrics=lambda predictions: metrics_of(tasks, predictions),
        callbacks=[JsonLinesLog(output / "log.jsonl")],
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
