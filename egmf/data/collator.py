"""From rows to figures: batches for the model, its answers, and what they are worth by a corpus's own measures."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from augmentation import augment
from label_maps import LabelMap
from media_egmf import AudioClip, VideoClip
from metrics.emotion.measures import emotion_metrics
from metrics.sentiment_mosei.measures import mosei_metrics
from metrics.sentiment_sims.measures import sims_metrics
from pipeline_egmf import gate_names
from processing_egmf import AffectTask, EGMFProcessor
from tower_cache import COLUMNS, PREPROCESSORS, TowerCache


FEATURE_COLUMNS = ("audio_features", "vision_features", "audio_times", "vision_times")
LABEL_COLUMNS = {"classification": "emotion", "regression": "sentiment"}


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
        raise ValueError(f"{name}: {column}: got {got}, wanted a label of task {task.name!r}: {wanted}")


def gold_answer(row: dict, task: AffectTask) -> str | float:
    """The row's label for a task.

    Raises:
        ValueError: If the row has none of the task's kind, or one outside the task.
    """
    column = LABEL_COLUMNS[task.kind]
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
            None: prompts alone; the rows' labels, which may be those of another task, are not looked at.
        cache: What is known of the rows' files; media that are not in it are decoded.
        augmented: Modalities whose tower inputs are changed at random, for training; they have to be in the cache.
        distort: Called with modality, row id and decoded clip of each file; what it returns takes the clip's place.
        speeds: Speeds at which the cache has the rows' sound, for training: a random one each time that a row comes.

    Attributes:
        errors: Why a row's file gave nothing, by row id; it counts as a missing modality. (In this process only.)
    """

    processor: EGMFProcessor
    tasks: list[AffectTask]
    modalities: list[str]
    with_answers: bool | None
    cache: TowerCache | None = None
    augmented: tuple[str, ...] = ()
    distort: Callable[[str, str, Any], Any] | None = None
    speeds: tuple[float, ...] = (1.0,)
    errors: dict[str, str] = field(default_factory=dict)

    def __call__(self, rows: list[dict]):
        columns = {}
        # In order: what is drawn at random for the modalities must not change places from run to run.
        for modality in (name for name in self.modalities if name != "text"):
            if getattr(self.processor, PREPROCESSORS[modality]) is None:
                names = (f"{modality}_features", f"{modality}_times")
                columns |= {name: [row[name] for row in rows] for name in names}
            elif self.cache is not None:
                for row in rows:
                    speed = 1.0
                    if modality == "audio" and len(self.speeds) > 1:
                        speed = self.speeds[int(torch.randint(len(self.speeds), ()))]
                    for name, value in self.cache.load(modality, row[COLUMNS[modality]], speed).items():
                        value = augment(modality, value) if modality in self.augmented else value
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
        if self.with_answers is None:
            return self.processor(text=text, task=asked, **columns)
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
        clip = media.audio if modality == "audio" else media.video
        return clip if clip is None or self.distort is None else self.distort(modality, row["id"], clip)


def prompt_lengths(dataset: Dataset, collator: AffectCollator) -> list[int]:
    """Tokens of each row's prompt, for length-grouped batches."""
    if "text" not in collator.modalities:
        return [1] * len(dataset)
    light = AffectCollator(collator.processor, collator.tasks, ["text"], with_answers=None)
    rows = dataset.select_columns([name for name in dataset.column_names if name not in FEATURE_COLUMNS])
    return [int(light([row])["input_ids"].shape[1]) for row in rows]


def weights_digest(folder: Path) -> str:
    """SHA-256 of a model folder's weights, by which a report of figures says what it measured."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


Change = Callable[[dict[str, torch.Tensor], list[str]], dict[str, torch.Tensor]]


@dataclass
class Predictor:
    """Asks a model one task about rows.

    Args:
        model, processor: The model in eval mode, and its processor.
        task: What is asked.
        label_map: Where the rows have labels of another task, from the answers to those.
        batch_size: Rows at a time; it changes no answer.
        device: Where the model is.
    """

    model: torch.nn.Module
    processor: EGMFProcessor
    task: AffectTask
    label_map: LabelMap | None
    batch_size: int
    device: torch.device

    @property
    def judged(self) -> AffectTask:
        """The task that the rows' labels and the predictions' `answers` belong to."""
        return self.task if self.label_map is None else self.label_map.target

    @torch.no_grad()
    def __call__(
        self,
        rows: Dataset,
        modalities: list[str],
        distort: Callable[[str, str, Any], Any] | None = None,
        changes: Sequence[Change | None] = (None,),
    ) -> list[list[dict]]:
        """One prediction per row, in the rows' order, for every one of `changes`.

        Of several processes (`accelerate launch`) each takes its share of the batches, and all return all predictions.
        The batches are those of one process, and so are the numbers.

        Args:
            rows: Of the corpus schema, with labels of `judged`.
            modalities: What the model may see.
            distort: See [`AffectCollator`].
            changes: Each makes other inputs from those of a batch, whose towers have run, and the rows' ids; it leaves
                those that it is given as they are. None: no change.
        """
        collator = AffectCollator(self.processor, [self.task], modalities, with_answers=None, distort=distort)
        asked = ask(rows, [self.task])
        # Alike lengths together: less padding, the same numbers.
        order = sorted(range(len(asked)), key=prompt_lengths(asked, collator).__getitem__)
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        state = PartialState()
        share = batches[state.process_index :: state.num_processes]
        loader = DataLoader(asked, batch_sampler=share, collate_fn=collator)
        ids, gold = rows["id"][:], rows[LABEL_COLUMNS[self.judged.kind]][:]
        results: list[dict[int, dict]] = [{} for _ in changes]
        quiet = None if state.is_main_process else True
        for places, batch in zip(share, tqdm(loader, desc="evaluating", unit="batch", disable=quiet), strict=True):
            # Once for all answers.
            inputs = self.model.encode_media({name: value.to(self.device) for name, value in batch.items()})
            for predictions, change in zip(results, changes, strict=True):
                changed = inputs if change is None else change(inputs, [ids[place] for place in places])
                for place, answered in zip(places, self._answers(changed), strict=True):
                    predictions[place] = {"id": ids[place], "gold": gold[place]} | answered
                    if error := collator.errors.get(ids[place]):
                        predictions[place]["media_error"] = error
        shares = gather_object([results])
        everything = [
            {place: row for part in parts for place, row in part.items()} for parts in zip(*shares, strict=True)
        ]
        return [[predictions[place] for place in range(len(order))] for predictions in everything]

    def _answers(self, inputs: dict[str, torch.Tensor]) -> list[dict]:
        """What the model says of each row of a batch."""
        model, processor, task = self.model, self.processor, self.task
        scores = model.score_labels(candidates=processor.candidates(task), **inputs)
        read = {"past_key_values": scores.past_key_values} if scores.past_key_values is not None else {}
        generated = model.generate(**inputs, **read, max_new_tokens=processor.max_answer_tokens(task), do_sample=False)
        texts = processor.decode_answers(generated[:, inputs["input_ids"].shape[1] :], task)
        distributions = processor.summarize(scores.log_probs, task)
        gates = gate_names(scores.gate_weights, model.config.experts, model.config.modalities)
        said = []
        for greedy, distribution, gate in zip(texts, distributions, gates, strict=True):
            answers = {"greedy": greedy.value, "distribution": task.parse(distribution.top)}
            if task.kind == "regression":
                answers |= {"expected": distribution.expected, "median": distribution.median}
            if self.label_map is not None:
                answers = {name: self.label_map(answer) for name, answer in answers.items()}
            row = {"greedy_text": greedy.text, "answers": answers, "distribution": distribution.probabilities}
            said.append(row | {"gate_weights": gate})
        return said


def measure_of(task: AffectTask) -> Callable[[Sequence, Sequence], dict[str, Any]]:
    """What a task's answers are judged by, called with gold labels and answers.

    Classes: [`emotion_metrics`]. Scores from -3 to 3: the protocol of MOSI and MOSEI, [`mosei_metrics`]; from -1 to 1:
    that of SIMS, [`sims_metrics`]; on any other scale, [`regression_metrics`].
    """
    if task.kind == "classification":
        return partial(emotion_metrics, labels=task.answers)
    return {(-3.0, 3.0): mosei_metrics, (-1.0, 1.0): sims_metrics}.get((task.low, task.high), regression_metrics)


def metrics_of(predictions: list[dict], task: AffectTask) -> dict[str, dict]:
    """Figures by kind of answer, for predictions whose labels are those of `task`."""
    gold, measure = [row["gold"] for row in predictions], measure_of(task)
    return {
        answer: measure(gold, [row["answers"][answer] for row in predictions]) for answer in predictions[0]["answers"]
    }


def classification_metrics(gold: Sequence[str], predicted: Sequence[str | None]) -> dict[str, float]:
    """What training watches of classes: `accuracy`, `weighted_f1` and `unparsable` of [`emotion_metrics`]."""
    metrics = emotion_metrics(gold, predicted)
    return {name: metrics[name] for name in ("accuracy", "weighted_f1", "unparsable")}


def regression_metrics(gold: Sequence[float], predicted: Sequence[float | None]) -> dict[str, float | None]:
    """What means the same on every scale: `mae`, `corr` and `unparsable` of [`mosei_metrics`], which clips neither."""
    metrics = mosei_metrics(gold, predicted)
    return {name: metrics[name] for name in ("mae", "corr", "unparsable")}
