"""From rows of the corpus schema to the processor's batches."""

import logging
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets

from egmf.data.augmentation import augment
from egmf.data.clips import load_row_media
from egmf.data.speakers import SPEAKER, Centers, mix_centers, stack_centers
from egmf.data.tower_cache import COLUMNS, PREPROCESSORS, TowerCache
from egmf.media_egmf import AudioClip, VideoClip
from egmf.processing_egmf import AffectTask, EGMFProcessor


SEQUENCE_COLUMNS = ("audio_features", "vision_features", "audio_times", "vision_times")
PROMPT_CHUNK = 256  # rows whose prompts are tokenised together
HIDDEN_COLUMNS = {  # what a row loses with a modality
    "text": ("text", "context", "speaker"),
    "audio": ("audio", "audio_features", "audio_times"),
    "vision": ("video", "vision_features", "vision_times"),
}
LABEL_COLUMNS = {"classification": "emotion", "regression": "sentiment"}
CALLED = {"classification": "label", "regression": "score"}  # in messages


def check_labels(name: str, rows: Dataset, task: AffectTask) -> None:
    """Raises a ValueError if rows (of the corpus and split `name`) have labels that are not answers of `task`."""
    column, wrong = LABEL_COLUMNS[task.kind], []
    for value, count in Counter(rows[column][:]).most_common():
        try:
            task.format(value)
        except ValueError:
            wrong.append(f"{value!r} in {count} rows")
    if wrong:
        wanted = list(task.labels) if task.labels else f"a score from {task.low} to {task.high}"
        got = ", ".join(wrong[:10]) + (", ..." if len(wrong) > 10 else "")
        raise ValueError(f"{name}: {CALLED[task.kind]}: got {got}, wanted one of task {task.name!r}: {wanted}")


def gold_answer(row: dict, task: AffectTask) -> str | float:
    """The row's label for a task.

    Raises:
        ValueError: If the row has none of the task's kind, or one outside the task.
    """
    column = LABEL_COLUMNS[task.kind]
    if row[column] is None:
        raise ValueError(f"{row['id']}: {CALLED[task.kind]}: got nothing, wanted one of task {task.name!r}")
    try:
        task.format(row[column])
    except ValueError as error:
        raise ValueError(f"{row['id']}: {error}") from None
    return row[column]


def expand_by_task(rows: Dataset, tasks: list[AffectTask]) -> Dataset:
    """Repeats every row for each task; the new column `task` has the task's name."""
    return concatenate_datasets([rows.add_column("task", [task.name] * len(rows)) for task in tasks])


@dataclass
class AffectCollator:
    """Converts rows of the corpus schema with a column `task` (see [`expand_by_task`]) to the processor's batch.

    Args:
        processor: The processor.
        tasks: The tasks that rows may name.
        modalities: Modalities that the model may see. Without "text", context and speaker are left out too.
        with_answers: True for training: answers are appended, and `labels` are returned. False for scoring: prompts,
            `task_index` (B,), the index of the task in `tasks`, and `answer_index` (B,), the index of the gold answer.
            None: prompts only; labels, which may belong to another task, are ignored.
        cache: Cache of the rows' files. Without one, files are decoded.
        augmented: Modalities whose cached tower inputs are augmented, for training.
        distort: Called with modality, row id and decoded clip of each file; its result replaces the clip.
        speeds: Speeds of audio in the cache, for training; each use of a row draws one.
        modality_dropout: Probability, by modality, of hiding it from a row, for training. A row keeps at least one of
            its modalities. Hiding the text also hides context and speaker, as in a row that has no text.
        centers: Centers of the rows' speakers (column `SPEAKER`), for speaker adaptation or mixing.
        speaker_mixing: For training; if it is not 0, each use of a row draws another speaker, and a share up to this
            by which the clip moves towards the speaker ([`mix_centers`]).
        blanks: Whether to add masked inputs for trained towers that have none in a batch, so that all processes use
            the same parameters.

    Attributes:
        errors: Errors of files that could not be read, by row id (in this process only). Such a modality is missing.
    """

    processor: EGMFProcessor
    tasks: list[AffectTask]
    modalities: list[str]
    with_answers: bool | None
    cache: TowerCache | None = None
    augmented: tuple[str, ...] = ()
    distort: Callable[[str, str, Any], Any] | None = None
    speeds: tuple[float, ...] = (1.0,)
    modality_dropout: dict[str, float] = field(default_factory=dict)
    centers: Centers | None = None
    speaker_mixing: float = 0.0
    blanks: bool = False
    errors: dict[str, str] = field(default_factory=dict)

    def __call__(self, rows: list[dict]):
        if self.modality_dropout:
            rows = [self._drop(row) for row in rows]
        try:
            with self.processor.kept_warnings() as kept:
                batch = self._batch(rows)
        finally:
            for warning in kept:
                if not hasattr(warning, "index"):  # `prompt_lengths` has logged which texts are too long
                    warnings.warn(warning, stacklevel=2)
        return batch | self._blanks(batch) if self.blanks else batch

    def _drop(self, row: dict) -> dict:
        """The row without the modalities that are hidden this time."""
        draws = torch.rand(len(self.modalities)).tolist()
        present = {name: draw for name, draw in zip(self.modalities, draws, strict=True) if self._has(row, name)}
        hidden = [name for name, draw in present.items() if draw < self.modality_dropout.get(name, 0.0)]
        if len(hidden) == len(present):
            return row
        return row | {column: None for name in hidden for column in HIDDEN_COLUMNS[name]}

    def _has(self, row: dict, modality: str) -> bool:
        if modality == "text":
            return bool(row["text"] and row["text"].strip())
        if getattr(self.processor, PREPROCESSORS[modality]) is None:
            return row[f"{modality}_features"] is not None
        path = row[COLUMNS[modality]]
        return path is not None and (self.cache is None or (modality, path) not in self.cache.errors)

    def _blanks(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Masked inputs of the trained towers that have none in the batch."""
        blanks = {}
        for modality in sorted(self.cache.trained) if self.cache else ():
            if f"{modality}_mask" not in batch:
                blank, count = self.processor.blank_media(modality), len(batch["input_ids"])
                # Copies, because memory that rows share cannot be pinned.
                blanks |= {name: value.repeat(count, *[1] * (value.ndim - 1)) for name, value in blank.items()}
        return blanks

    def _batch(self, rows: list[dict]):
        columns, drawn = self._media(rows)
        columns["sound_track"] = False  # a row names its audio
        text = [None] * len(rows)
        if "text" in self.modalities:
            text = [row["text"] for row in rows]
            columns |= {name: [row[name] for row in rows] for name in ("context", "speaker")}
        places = {task.name: index for index, task in enumerate(self.tasks)}
        asked = [self.tasks[places[row["task"]]] for row in rows]
        gold = []
        if self.with_answers is not None:
            gold = [gold_answer(row, task) for row, task in zip(rows, asked, strict=True)]
        batch = self.processor(text=text, task=asked, answer=gold if self.with_answers else None, **columns)
        if self.centers:
            self._add_centers(batch, self.centers, rows, drawn)
        if self.with_answers is False:
            pairs = zip(gold, asked, strict=True)
            batch["answer_index"] = torch.tensor([task.answers.index(task.format(answer)) for answer, task in pairs])
            batch["task_index"] = torch.tensor([places[task.name] for task in asked])
        return batch

    def _media(self, rows: list[dict]) -> tuple[dict[str, Any], list[float]]:
        """The processor's arguments for sound and pictures, and the speed of each row's sound."""
        columns: dict[str, Any] = {}
        drawn = [1.0] * len(rows)
        # In a fixed order, so that random draws are the same in every run.
        for modality in (name for name in self.modalities if name != "text"):
            if getattr(self.processor, PREPROCESSORS[modality]) is None:
                names = (f"{modality}_features", f"{modality}_times")
                columns |= {name: [row[name] for row in rows] for name in names}
            elif self.cache is not None:
                for place, row in enumerate(rows):
                    speed = 1.0
                    if modality == "audio":
                        several = len(self.speeds) > 1
                        speed = drawn[place] = self.speeds[int(torch.randint(len(self.speeds), ())) if several else 0]
                    for name, value in self.cache.load(modality, row[COLUMNS[modality]], speed).items():
                        value = augment(modality, value) if modality in self.augmented else value
                        columns.setdefault(name, []).append(value)
            else:
                columns[COLUMNS[modality]] = [self._load(modality, row) for row in rows]
        return columns, drawn

    def _add_centers(self, batch: dict, centers: Centers, rows: list[dict], drawn: list[float]) -> None:
        """Adds the speakers' centers of the modalities in a batch, at the speeds of the rows' sound."""
        if self.speaker_mixing:
            speakers = list(dict.fromkeys(speaker for known in centers.values() for speaker, _ in known))
            others = [speakers[index] for index in torch.randint(len(speakers), (len(rows),)).tolist()]
            shares = self.speaker_mixing * torch.rand(len(rows))
        for modality in centers:
            if f"{modality}_mask" in batch:
                speeds = drawn if modality == "audio" else [1.0] * len(rows)
                keys = [(row[SPEAKER], speed) for row, speed in zip(rows, speeds, strict=True)]
                center = stack_centers(centers, modality, keys)
                if self.speaker_mixing:
                    center = mix_centers(centers, modality, keys, others, shares)
                batch[f"{modality}_center"] = center

    def _load(self, modality: str, row: dict) -> AudioClip | VideoClip | None:
        """The row's clip; None if there is none or its file cannot be read."""
        name = row[COLUMNS[modality]]
        if name is None:
            return None
        try:
            media = load_row_media(self.processor, COLUMNS[modality], name)
        except self.processor.media_error as error:
            self.errors[row["id"]] = str(error)
            return None
        clip = media.audio if modality == "audio" else media.video
        return clip if clip is None or self.distort is None else self.distort(modality, row["id"], clip)


def prompt_lengths(dataset: Dataset, collator: AffectCollator) -> list[int]:
    """Tokens of each row's prompt, for length-grouped batches. Logs which rows do not fit into the LLM's context."""
    if "text" not in collator.modalities:
        return [1] * len(dataset)
    light = AffectCollator(collator.processor, collator.tasks, ["text"], with_answers=None)
    rows = dataset.select_columns([name for name in dataset.column_names if name not in SEQUENCE_COLUMNS])
    lengths: list[int] = []
    cut: dict[str, str] = {}
    for start in range(0, len(rows), PROMPT_CHUNK):
        chunk = list(rows.select(range(start, min(start + PROMPT_CHUNK, len(rows)))))
        with collator.processor.kept_warnings() as found:
            lengths += light._batch(chunk)["attention_mask"].sum(1).tolist()
        for warning in found:
            cut.setdefault(chunk[warning.index]["id"], str(warning))
    if cut:
        named = "; ".join(f"{row_id}: {message}" for row_id, message in list(cut.items())[:3])
        logging.warning("%d rows are longer than the language model's context. %s", len(cut), named)
    return lengths
