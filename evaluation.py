"""From predictions to figures: batches for the model, metrics, and a paired test between two runs."""

from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, f1_score

from media_egmf import AudioClip, VideoClip
from processing_egmf import AffectTask, EGMFProcessor
from tower_cache import COLUMNS, PREPROCESSORS, TowerCache


FEATURE_COLUMNS = ("audio_features", "vision_features", "audio_times", "vision_times")


def gold_answer(row: dict, task: AffectTask) -> str | float:
    """The row's label for a task.

    Raises:
        ValueError: If the row has none of the task's kind, or one outside the task.
    """
    column = "emotion" if task.kind == "classification" else "sentiment"
    if row[column] is None:
        raise ValueError(f"{row['id']}: {column} is null, wanted a label of task {task.name!r}")
    task.format(row[column])
    return row[column]


def ask(rows: Dataset, tasks: list[AffectTask]) -> Dataset:
    """Every row once for each task, whose name is in the new column `task`."""
    return concatenate_datasets([rows.add_column("task", [task.name] * len(rows)) for task in tasks])


@dataclass
class AffectCollator:
    """Rows of the corpus schema, with what is asked of each (see [`ask`]) -> the processor's batch.

    Args:
        processor: The processor.
        tasks: The tasks that may be asked.
        modalities: What the model may see; the columns of others are left out, with the text its context too.
        with_answers: True for training: answers are appended and `labels` returned. False for scoring: prompts alone,
            `task_index` (B,), the task's place in `tasks`, and `answer_index` (B,), the gold answer's in its answers.
        cache: What is known of the rows' files; media that are not in it are decoded.
        speeds: Speeds at which the cache has the rows' sound, for training: a random one each time that a row comes.

    Attributes:
        errors: Why a row's file gave nothing, by row id; it counts as a missing modality. (In this process only.)
    """

    processor: EGMFProcessor
    tasks: list[AffectTask]
    modalities: list[str]
    with_answers: bool
    cache: TowerCache | None = None
    speeds: tuple[float, ...] = (1.0,)
    errors: dict[str, str] = field(default_factory=dict)

    def __call__(self, rows: list[dict]):
        columns = {}
        for modality in set(self.modalities) - {"text"}:
            if getattr(self.processor, PREPROCESSORS[modality]) is None:
                names = (f"{modality}_features", f"{modality}_times")
                columns |= {name: [row[name] for row in rows] for name in names}
            elif self.cache is not None:
                for row in rows:
                    speed = 1.0
                    if modality == "audio" and len(self.speeds) > 1:
                        speed = self.speeds[int(torch.randint(len(self.speeds), ()))]
                    for name, value in self.cache.load(modality, row[COLUMNS[modality]], speed).items():
                        columns.setdefault(name, []).append(value)
            else:
                columns[COLUMNS[modality]] = [self._load(modality, row) for row in rows]
        columns["sound_track"] = False  # what is to be heard, the rows say
        text = [None] * len(rows)
        if "text" in self.modalities:
            text = [row["text"] for row in rows]
            columns |= {name: [row[name] for row in rows] for name in ("context", "following", "speaker")}
        places = {task.name: index for index, task in enumerate(self.tasks)}
        asked = [self.tasks[places[row["task"]]] for row in rows]
        gold = [gold_answer(row, task) for row, task in zip(rows, asked, strict=True)]
        if self.with_answers:
            return self.processor(text=text, task=asked, answer=gold, **columns)
        batch = self.processor(text=text, task=asked, **columns)
        pairs = zip(gold, asked, strict=True)
        batch["answer_index"] = torch.tensor([task.answers.index(task.format(answer)) for answer, task in pairs])
        batch["task_index"] = torch.tensor([places[task.name] for task in asked])
        return batch

    def _load(self, modality: str, row: dict) -> AudioClip | VideoClip | None:
        """The row's clip; None where there is none, or where its file gives nothing."""
        file = {COLUMNS[modality]: row[COLUMNS[modality]]}
        try:
            media = self.processor.load_media(**file, sound_track=False)
        except self.processor.media_error as error:
            self.errors[row["id"]] = str(error)
            return None
        return media.audio if modality == "audio" else media.video


def prompt_lengths(dataset: Dataset, collator: AffectCollator) -> list[int]:
    """Tokens of each row's prompt, for length-grouped batches."""
    if "text" not in collator.modalities:
        return [1] * len(dataset)
    light = AffectCollator(collator.processor, collator.tasks, ["text"], with_answers=False)
    rows = dataset.select_columns([name for name in dataset.column_names if name not in FEATURE_COLUMNS])
    return [int(light([row])["input_ids"].shape[1]) for row in rows]


def classification_metrics(gold: list[str], predicted: list[str | None]) -> dict[str, float]:
    """Accuracy and weighted F1 over the gold classes, and the number of unparsable answers.

    An unparsable answer (None) is a wrong answer of no class. Weighted F1 is the mean of the classes' F1 weighted by
    their gold counts (scikit-learn's `average="weighted"`; the measure of the MELD and CHERMA papers).
    """
    answers = ["<unparsable>" if answer is None else answer for answer in predicted]
    return {
        "accuracy": float(accuracy_score(gold, answers)),
        "weighted_f1": float(f1_score(gold, answers, labels=sorted(set(gold)), average="weighted", zero_division=0)),
        "unparsable": sum(answer is None for answer in predicted),
    }


def regression_metrics(gold: list[float], predicted: list[float | None]) -> dict[str, float | None]:
    """Mean absolute error and Pearson correlation over the parsable answers, and the number of the others.

    A correlation with a constant is not defined: None.
    """
    kept = [(g, p) for g, p in zip(gold, predicted, strict=True) if p is not None]
    metrics = {"mae": None, "corr": None, "unparsable": len(predicted) - len(kept)}
    if kept:
        y, p = np.asarray(kept, dtype=np.float32).T
        metrics["mae"] = float(np.abs(y - p).mean())
        if len(kept) > 1 and y.std() > 0 and p.std() > 0:
            metrics["corr"] = float(np.corrcoef(y, p)[0, 1])
    return metrics


def mcnemar(first_correct: list[bool], second_correct: list[bool]) -> dict[str, float]:
    """Exact two-sided McNemar test of two runs' answers to the same samples (McNemar 1947, Psychometrika 12).

    Of the samples that exactly one run has right, each run has about half if the runs are equally good: a binomial
    test. `first_only` and `second_only` count those samples.
    """
    pairs = list(zip(first_correct, second_correct, strict=True))
    first_only = sum(a and not b for a, b in pairs)
    second_only = sum(b and not a for a, b in pairs)
    total = first_only + second_only
    p_value = binomtest(first_only, total).pvalue if total else 1.0
    return {"first_only": first_only, "second_only": second_only, "p_value": float(p_value)}
