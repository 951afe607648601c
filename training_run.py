"""What every phase of a training run shares: its Trainer, its log, and going on from the last whole checkpoint."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from evaluation import AffectCollator, classification_metrics, regression_metrics
from mixture import MixtureTrainer


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


class JsonLinesLog(TrainerCallback):
    """Appends every log entry of the Trainer to a file, one JSON object a line, with `fields` in each."""

    def __init__(self, path: Path, **fields: str):
        self.path, self.fields = path, fields

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**self.fields, "step": state.global_step, **logs}) + "\n")


class RunTrainer(MixtureTrainer):
    """Trainer of every phase of a run."""


class AffectTrainer(RunTrainer):
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
