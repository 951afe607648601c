"""Several corpora at once: what is asked of each one's rows, and how often they come, by weights."""

import logging
from collections.abc import Iterator

import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from corpora import load_corpus
from egmf.data.collator import check_labels, expand_by_task
from egmf.data.tower_cache import COLUMNS, PREPROCESSORS
from egmf.processing_egmf import EGMFProcessor
from egmf.recipe import CorpusPart


def load_corpora(parts: list[CorpusPart]) -> list[DatasetDict]:
    """The corpora of a recipe, in its order."""
    return [load_corpus(part.name, part.source, **part.options) for part in parts]


def check_corpora(
    parts: list[CorpusPart], corpora: list[DatasetDict], processor: EGMFProcessor, modalities: list[str]
) -> None:
    """Raises a ValueError if a corpus has labels that are not answers of its own tasks; tells of what is not read."""
    for part, corpus in zip(parts, corpora, strict=True):
        for split in ("train", "validation"):
            for name in part.tasks:
                check_labels(f"{part.name} / {split}", corpus[split], processor.tasks[name])
        for modality in set(modalities) - {"text"}:
            columns = [f"{modality}_features", COLUMNS[modality]]
            features, clips = (_has_any(corpus["train"], name) for name in columns)
            tower = getattr(processor, PREPROCESSORS[modality]) is not None
            if tower and features and not clips:
                logging.warning("%s: its %s features are not read: the recipe names a tower", part.name, modality)
            if clips and not tower and not features:
                logging.warning("%s: %s of its clips is not read: the recipe names no tower", part.name, modality)


def _has_any(rows: Dataset, column: str) -> bool:
    """Whether a column has anything but nulls. Its values, which may be many, become no Python objects."""
    tables = rows.select_columns([column]).with_format("arrow").iter(1000)
    return any(table.column(column).null_count < len(table) for table in tables)


def expand_parts(parts: list[CorpusPart], corpora: list[DatasetDict], processor: EGMFProcessor, split: str) -> Dataset:
    """All rows of a split, corpus by corpus, each once for each of its corpus's tasks (see [`expand_by_task`])."""
    return concatenate_datasets(
        [
            expand_by_task(corpus[split], [processor.tasks[name] for name in part.tasks])
            for part, corpus in zip(parts, corpora, strict=True)
        ]
    )


class MixtureSampler(Sampler[int]):
    """Draws rows of several corpora that lie one after the other, by weights; for `set_epoch` of Trainer.

    An epoch has as many rows as all corpora together, of which each corpus has the share that its weight has in all
    weights. A corpus goes on in the next epoch where it was: each of its rows comes once before any comes again, in
    an order that is drawn anew every time. What an epoch brings is a function of its number and the seed, so that an
    interrupted run goes on alike.

    Args:
        sizes: Rows of each corpus.
        weights: Their weights.
        seed: Of the order.
        lengths: By row; rows of like lengths then come together, in random groups.
        batch_size: Of these groups.
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
        # Rounded so that the shares add up: the borders between them are.
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
        """A generator of its own for each corpus and round: equal numbers on every process."""
        seed = self.seed
        for number in place:
            seed = (seed * 1_000_003 + number + 1) % 2**63
        return torch.Generator().manual_seed(seed)


def mixture_of(parts: list[CorpusPart], corpora: list[DatasetDict]) -> tuple[list[int], list[float]] | None:
    """What [`MixtureTrainer`] draws by from [`expand_parts`]'s training rows; None where there is one corpus."""
    if len(parts) == 1:
        return None
    sizes = [len(part.tasks) * len(corpus["train"]) for part, corpus in zip(parts, corpora, strict=True)]
    return sizes, [part.weight for part in parts]
