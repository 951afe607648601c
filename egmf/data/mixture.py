"""Mixtures of corpora and of labels: loading, checks, and a sampler that draws rows by weights."""

import logging
from collections.abc import Iterator

import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from corpora import load_corpus
from egmf.data.collator import LABEL_COLUMNS, check_labels, expand_by_task
from egmf.data.tasks import infer_tasks
from egmf.data.tower_cache import COLUMNS, PREPROCESSORS
from egmf.processing_egmf import AffectTask, EGMFProcessor
from egmf.recipe import CorpusPart, DataArguments, Recipe


def load_corpora(data: DataArguments) -> list[DatasetDict]:
    """The corpora of a recipe, in its order. Without tasks in the recipe, adds those that follow from the labels."""
    corpora = [load_corpus(part.name, part.source, **part.options) for part in data.parts]
    if not data.tasks:
        data.define(infer_tasks(corpora[0]))
    return corpora


def check_corpora(recipe: Recipe, corpora: list[DatasetDict], processor: EGMFProcessor) -> None:
    """Checks that each corpus's labels are answers of its tasks, and logs features and clips that will not be used.

    Raises:
        ValueError: If a label is not an answer, there are no rows to train on, or a recipe of one corpus names a
            modality that no row has in a form that the model reads.
    """
    parts, modalities = recipe.data.parts, recipe.data.modalities
    named = "modalities" in recipe.fields and len(parts) == 1
    for part, corpus in zip(parts, corpora, strict=True):
        if not len(corpus["train"]):
            raise ValueError(f"{part.name} / train: got no rows, wanted some to learn from")
        for name in part.tasks:
            processor.candidates(processor.tasks[name])  # that the tokenizer can spell them is known before training
            for split in ("train", "validation"):
                check_labels(f"{part.name} / {split}", corpus[split], processor.tasks[name])
            if part.name == "table":  # whose author can still correct it
                try:
                    check_labels(f"{part.name} / test", corpus["test"], processor.tasks[name])
                except ValueError as error:
                    logging.warning("%s", error)
        if named and "text" in modalities and not has_words(corpus["train"]):
            raise ValueError(f"modalities: got text, of which {part.name} / train has none, wanted them without text")
        for modality in [name for name in modalities if name != "text"]:
            columns = [f"{modality}_features", COLUMNS[modality]]
            features, clips = (has_any(corpus["train"], name) for name in columns)
            tower = getattr(processor, PREPROCESSORS[modality]) is not None
            unread = None
            if tower and features and not clips:
                unread = f"its {modality} features are not read: the recipe names {modality}_tower"
            elif clips and not tower and not features:
                unread = f"{modality} of its clips is not read: the recipe names no {modality}_tower"
            elif not clips and not features:
                unread = f"it has no {modality}"
            if unread and named:
                raise ValueError(f"modalities: got {modality}, wanted them without it. {part.name} / train: {unread}")
            if unread and (clips or features):
                logging.warning("%s: %s", part.name, unread)
        columns = [name if name == "text" else f"{name}_features" for name in modalities]
        columns += [COLUMNS[name] for name in modalities if name != "text"]
        if len(corpus["validation"]) and not any(has_any(corpus["validation"], name) for name in columns):
            got = "no row has any of the modalities, so what is measured and fitted there says nothing"
            logging.warning("%s / validation: %s", part.name, got)


def has_words(rows: Dataset) -> bool:
    """Whether a row has words or a context."""
    return any(rows["text"][:]) or any(rows["context"][:])


def has_any(rows: Dataset, column: str) -> bool:
    """Whether a column has a value other than null. Values are not converted to Python objects."""
    tables = rows.select_columns([column]).with_format("arrow").iter(1000)
    return any(table.column(column).null_count < len(table) for table in tables)


def mix_rows(
    parts: list[CorpusPart], corpora: list[DatasetDict], processor: EGMFProcessor, balanced: bool
) -> tuple[Dataset, tuple[list[int], list[float]] | None]:
    """All training rows, corpus by corpus, each repeated for each task of its corpus ([`expand_by_task`]).

    Args:
        parts, corpora: The recipe's corpora.
        processor: The processor, with the tasks.
        balanced: Whether to draw all labels of a task equally often. Scores are drawn as they come.

    Returns:
        The rows, and (sizes, weights) of the groups in them for [`MixtureTrainer`]. A group is a corpus or, if
        balanced, one label of a task. None for one corpus that is not balanced.
    """
    groups: list[tuple[Dataset, float]] = []
    for part, corpus in zip(parts, corpora, strict=True):
        tasks = [processor.tasks[name] for name in part.tasks]
        if not balanced:
            groups.append((expand_by_task(corpus["train"], tasks), part.weight))
            continue
        for task in tasks:
            by_label = _by_label(expand_by_task(corpus["train"], [task]), task)
            groups += [(rows, part.weight / len(tasks) / len(by_label)) for rows in by_label]
    rows = concatenate_datasets([group for group, _ in groups])
    if len(groups) == 1:
        return rows, None
    return rows, ([len(group) for group, _ in groups], [weight for _, weight in groups])


def _by_label(rows: Dataset, task: AffectTask) -> list[Dataset]:
    """The rows of each label; scores are not divided."""
    if task.kind != "classification":
        return [rows]
    places: dict[str, list[int]] = {}
    for place, label in enumerate(rows[LABEL_COLUMNS[task.kind]][:]):
        places.setdefault(label, []).append(place)
    return [rows.select(own) for own in places.values()]


class MixtureSampler(Sampler[int]):
    """Draws rows of several groups (corpora or labels), which follow each other in the dataset, by weights.

    An epoch has as many rows as all groups together; the share of each group is its weight divided by the sum of the
    weights. Across epochs, each row of a group is drawn once before any is drawn again, in a new random order each
    round. The rows of an epoch depend only on its number and the seed, so a resumed run draws the same rows.

    Args:
        sizes: Number of rows of each group.
        weights: Weight of each group.
        seed: Seed of the order.
        lengths: Length of each row; rows of similar lengths are then grouped at random.
        batch_size: Size of these groups.
    """

    def __init__(
        self,
        sizes: list[int],
        weights: list[float],
        seed: int,
        lengths: list[int] | None = None,
        batch_size: int = 1,
    ):
        self.sizes, self.seed, self.lengths, self.batch_size = sizes, seed, lengths, batch_size
        self.epoch = 0
        # Rounding the borders, not the shares, makes the shares add up.
        borders = [round(len(self) * sum(weights[:place]) / sum(weights)) for place in range(len(weights) + 1)]
        self.shares = [after - before for before, after in zip(borders, borders[1:], strict=False)]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return sum(self.sizes)

    def __iter__(self) -> Iterator[int]:
        drawn, first = [], 0
        for place, (size, share) in enumerate(zip(self.sizes, self.shares, strict=True)):
            begin, end = self.epoch * share, (self.epoch + 1) * share  # of the corpus's rows, round after round
            while begin < end:
                order = torch.randperm(size, generator=self._generator(place, begin // size))
                some = order[begin % size :][: end - begin]
                drawn.append(first + some)
                begin += len(some)
            first += size
        generator = self._generator(len(self.sizes), self.epoch)
        indices = torch.cat(drawn)
        indices = indices[torch.randperm(len(indices), generator=generator)].tolist()
        if self.lengths is not None:
            lengths = [self.lengths[index] for index in indices]
            grouped = get_length_grouped_indices(lengths, self.batch_size, generator=generator)
            indices = [indices[place] for place in grouped]
        return iter(indices)

    def _generator(self, *place: int) -> torch.Generator:
        """A generator for each corpus and round, with equal numbers on every process."""
        seed = self.seed
        for number in place:
            seed = (seed * 1_000_003 + number + 1) % 2**63
        return torch.Generator().manual_seed(seed)
