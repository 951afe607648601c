"""Centers of the speakers of a split, to which the model adapts its audio and vision.

A center is the mean and the deviation of the frames of a speaker's clips ([`EGMFModel.speaker_center`]). It needs no
labels, but all clips of the speaker in the split.

Speaker adaptation subtracts the mean of each clip's speaker and divides by the deviation, in training and afterwards.
Speaker mixing subtracts a part of the difference to another speaker's mean, in training only: the model meets more
voices and faces than the corpus has, and must not rely on those it knows.
"""

import dataclasses
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, Value
from torch.utils.data import DataLoader

from corpora import speakers_of


if TYPE_CHECKING:  # the collator imports this file
    from egmf.data.collator import AffectCollator


SPEAKER = "adapted_speaker"  # the column with the speaker, unique over corpora and splits
# Center by modality, and by speaker (column `SPEAKER`) and speed of the audio: (1, 2, layers, size) for a tower,
# (1, 2, feature size) for features.
Centers = dict[str, dict[tuple[str, float], torch.Tensor]]


def name_speakers(corpus: str, split: str, rows: Dataset) -> Dataset:
    """Adds the column `SPEAKER` to the rows of a split.

    Raises:
        ValueError: If the corpus does not name the speaker of every row.
    """
    speakers = speakers_of(corpus, rows["id"][:], rows["speaker"][:])
    return rows.add_column(SPEAKER, [f"{corpus}/{split}/{name}" for name in speakers], feature=Value("string"))


def speaker_centers(
    model, rows: Dataset, collator: "AffectCollator", batch_size: int, speeds: Iterable[float] = (1.0,)
) -> Centers:
    """Computes the centers of all speakers of a split. Several processes share the speakers.

    Args:
        model: An [`EGMFForConditionalGeneration`] whose towers are frozen.
        rows: The split, with the columns `SPEAKER` and `task`.
        collator: A collator for these rows. Its modalities are those with centers.
        batch_size: Number of clips that the towers encode at a time.
        speeds: Speeds of the audio. Clips at another speed have another voice, and so another center.
    """
    places: dict[str, list[int]] = {}
    for place, speaker in enumerate(rows[SPEAKER][:]):
        places.setdefault(speaker, []).append(place)
    if single := [speaker for speaker, own in places.items() if len(own) == 1]:
        logging.warning(
            "centers of speakers: %d of %d speakers have one clip, whose mean is their center (%s)",
            *(len(single), len(places), ", ".join(single[:3])),
        )
    state = PartialState()
    found: Centers = {}
    for speaker in list(places)[state.process_index :: state.num_processes]:
        own = places[speaker]
        batches = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
        for speed in speeds:
            names = [name for name in collator.modalities if name == "audio" or name != "text" and speed == 1.0]
            collate = dataclasses.replace(collator, modalities=names, speeds=(speed,), centers=None)
            loader = DataLoader(rows, batch_sampler=batches, collate_fn=collate)
            moved = ({name: value.to(model.device) for name, value in batch.items()} for batch in loader)
            for field, center in model.model.speaker_center(moved).items():
                found.setdefault(field.removesuffix("_center"), {})[speaker, speed] = center.cpu()
    merged: Centers = {}
    for part in gather_object([found]):
        for modality, centers in part.items():
            merged.setdefault(modality, {}).update(centers)
    return merged


def stack_centers(centers: Centers, modality: str, keys: list[tuple[str, float]]) -> torch.Tensor:
    """The centers of several rows by (speaker, speed): (rows, ...). A speaker without the modality has zeros."""
    known = centers[modality]
    nothing = torch.zeros_like(next(iter(known.values())))
    return torch.cat([known.get(key, nothing) for key in keys])


def mix_centers(
    centers: Centers, modality: str, keys: list[tuple[str, float]], others: list[str], shares: torch.Tensor
) -> torch.Tensor:
    """Centers that move clips towards other speakers: (rows, 2, ...), with deviations of 0, which change nothing.

    Args:
        keys: Speaker and speed of each row.
        others: Another speaker for each row; one without the modality leaves the row as it is.
        shares: (rows,), 0 for no move, 1 for the whole way between the two centers.
    """
    pairs = zip(others, keys, strict=True)
    ends = [(other, key[1]) if (other, key[1]) in centers[modality] else key for other, key in pairs]
    moves = stack_centers(centers, modality, keys) - stack_centers(centers, modality, ends)
    moves[:, 1] = 0.0
    return shares.view(-1, *[1] * (moves.ndim - 1)) * moves
