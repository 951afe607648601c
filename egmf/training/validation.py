"""The Trainer of the last phase, whose validation scores every legal answer."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import TrainingArguments
from transformers.trainer_utils import EvalPrediction

from egmf.data.collator import AffectCollator
from egmf.evaluation.measures import classification_metrics, regression_metrics
from egmf.processes import held_whole
from egmf.processing_egmf import AffectTask
from egmf.training.batches import ignoring_sigterm
from egmf.training.trainer import RunTrainer


class AffectTrainer(RunTrainer):
    """Trainer whose evaluation scores every legal answer instead of comparing logits at the gold tokens.

    Each evaluation data set contains one task; pass several tasks as a dict of data sets. The evaluation loss is the
    negative log-probability of the gold answer among the legal answers. The best checkpoint is selected on the
    validation split only.
    """

    unit = "tokens"

    def __init__(self, *args, scoring_collator: AffectCollator, **kwargs):
        super().__init__(*args, **kwargs)
        self.scoring_collator = scoring_collator

    def get_eval_dataloader(self, eval_dataset=None):
        training_collator, self.data_collator = self.data_collator, self.scoring_collator
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return ignoring_sigterm(super().get_eval_dataloader(eval_dataset))
        finally:
            self.data_collator, self.args.dataloader_drop_last = training_collator, drop_last

    @torch.no_grad()
    def scores_by_gain(self, dataset: Dataset, gains: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores a data set of one task with each gain of the expert readout.

        Returns:
            Log-probabilities (rows, gains, answers), and the indices of the gold answers (rows,).
        """
        self.model.eval()
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        for inputs in self.get_eval_dataloader(dataset):
            inputs = self._prepare_inputs(inputs)
            answers, scores = self._score(self.model, inputs, gains=gains.to(self.args.device))
            parts = self.accelerator.gather_for_metrics((scores.log_probs.contiguous(), answers[:, 0].contiguous()))
            found.append(tuple(part.cpu() for part in parts))
        return torch.cat([scores for scores, _ in found]), torch.cat([answers for _, answers in found])

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        answers, scores = self._score(model, self._prepare_inputs(inputs))
        # No loss here: Trainer would average over batches, and with several processes a row may occur twice.
        return None, scores.log_probs, answers

    def _score(self, model, inputs: dict, **options) -> tuple[torch.Tensor, Any]:
        """The indices of gold answer and task (B, 2), and the scores of a batch of one task."""
        answers, tasks = inputs.pop("answer_index"), inputs.pop("task_index")
        candidates = self.scoring_collator.processor.candidates(self.scoring_collator.tasks[int(tasks[0])])
        answering = self.accelerator.unwrap_model(model)
        if "score_labels" not in vars(answering):
            register_fsdp_forward_method(answering, "score_labels")  # needed by FSDP2, no effect on other models
        # Scoring reads rows of the head's weights, which ZeRO-3 gathers only for the head's own forward pass.
        with held_whole(answering.get_output_embeddings()), self.accelerator.autocast():
            scores = answering.score_labels(candidates=candidates, **options, **inputs)
        return torch.stack([answers, tasks], 1), scores


def validation_metrics(tasks: list, predictions) -> dict[str, float | None]:
    """The validation metrics of a task, for Trainer.

    Args:
        tasks: All tasks.
        predictions: Its `predictions` are the log-probabilities of the answers, its `label_ids` (N, 2) the index of
            the gold answer and the index of the task in `tasks`.
    """
    golds, places = predictions.label_ids.T
    task, loss = tasks[places[0]], -predictions.predictions[np.arange(len(golds)), golds].mean()
    figures: dict[str, float | None] = {"loss": float(loss)}
    gold = [task.parse(task.answers[index]) for index in golds]
    if task.kind == "classification":
        best = [task.answers[index] for index in predictions.predictions.argmax(-1)]
        return figures | classification_metrics(gold, best)
    scores = np.asarray([task.parse(answer) for answer in task.answers])
    return figures | regression_metrics(gold, list(np.exp(predictions.predictions) @ scores))


def check_best_metric(training: TrainingArguments, tasks: dict[str, AffectTask]) -> None:
    """Raises a ValueError if `metric_for_best_model` is no metric of the validation, before anything is computed.

    Args:
        training: The arguments.
        tasks: The task of each validation split, by the name under which it is logged if there are several.
    """
    if training.metric_for_best_model is None or not tasks:
        return
    names = []
    for key, task in tasks.items():
        rows = EvalPrediction(np.zeros((2, len(task.answers))), np.zeros((2, 2), int))
        figures = [name for name in validation_metrics([task], rows) if name != "corr"]  # None for equal scores
        names += [name if len(tasks) == 1 else f"{key}_{name}" for name in figures]
    if training.metric_for_best_model.removeprefix("eval_") not in names:
        got = training.metric_for_best_model
        raise ValueError(f"metric_for_best_model: got {got!r}, wanted one of {', '.join(names)}")
