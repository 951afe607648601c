"""The rows of a table as samples: clips, and parts of recordings, each with its words, context and speaker."""

import logging
from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from corpora.clips import split_part
from corpora.sources import TABLES
from corpora.table import load_unlabelled
from egmf.data.clips import load_row_media
from egmf.media_egmf import MediaError, media_length
from egmf.samples_egmf import is_url


Sample = dict[str, Any]


def is_table(name: str) -> bool:
    """Whether an input is a table, by its suffix."""
    return Path(name).suffix.lower() in TABLES and not is_url(name)


def read_samples(table: str, options: dict[str, Any], speaker: str | None = None) -> list[Sample]:
    """The samples of a table, which [`fit_to_model`] completes.

    Args:
        table: A table as for training, but without labels.
        options: The options with which the model's corpus was loaded; `columns` and `context` are used.
        speaker: Who speaks in rows that name nobody.

    Returns:
        For each row what the answer repeats (`file` and `named`), the `clips` by column of the schema, `text`,
        `speaker` and `context`, or an `error`.

    Raises:
        ValueError: If the table cannot be read.
    """
    known = {name: options[name] for name in ("columns", "context") if name in options}
    samples = []
    for row in load_unlabelled(table, **known, speaker=speaker):
        sample: Sample = {"named": {name: row.get(name) for name in ("id", "text", "speaker")}, "file": None}
        sample["clips"] = {name: row[name] for name in ("audio", "video") if row.get(name)}
        if sample["clips"]:
            clip = next(iter(sample["clips"].values()))
            sample["file"], start, end = split_part(clip)
            sample["named"] |= {"start": start, "end": end} if sample["file"] != clip else {}
        samples.append(sample | {name: row[name] for name in ("text", "speaker", "context", "error") if name in row})
    return samples


def fit_to_model(recognize: Any, samples: list[Sample], is_transcribed: bool = False) -> list[Sample]:
    """Completes the samples of a table for a model.

    They get the media that the model reads, `start` and `end` of a part of a recording, and for a model that was
    trained with speaker adaptation the center of the speaker's clips in the table.

    Args:
        recognize: The pipeline of the model.
        samples: Samples of [`read_samples`], which are changed.
        is_transcribed: Whether a transcriber hears the clips without words.

    Returns:
        The samples; the parts of a recording stand together, at the place of the first one, sorted by their starts.

    Raises:
        ValueError: If the checkpoint's own code cannot answer tables.
    """
    processor = recognize.processor
    package = type(processor).__module__.rpartition(".")[0]
    if "context" not in import_module(f"{package}.recordings_egmf").SEGMENT_FIELDS:
        wanted = "files, or a model that this version trained"
        raise ValueError(f"INPUT: got a table for a model with older code, wanted {wanted}")
    hears, sees = processor.feature_extractor is not None, processor.image_processor is not None
    reads = {"audio": hears or is_transcribed and not sees, "video": sees}
    for sample in samples:
        sample["clips"] = {name: clip for name, clip in sample["clips"].items() if reads[name]}
        try:
            _add_media(sample, hears or not is_transcribed)
        except (MediaError, ValueError) as error:
            sample["error"] = f"{sample['named']['id']}: {error}"
    if recognize.model.config.speaker_adaptation:
        _add_speaker_centers(recognize, samples)
    if "text" not in (processor.trained_modalities or ["text"]):
        if any(sample.get("text") for sample in samples):
            logging.warning("text: got words for a model that was trained without them; they are ignored")
        for sample in samples:
            for name in ("text", "speaker", "context"):
                sample.pop(name, None)
    recordings: dict[Any, list[Sample]] = {}
    for sample in samples:
        recordings.setdefault(recording_of(sample) or id(sample), []).append(sample)
    return [one for parts in recordings.values() for one in sorted(parts, key=lambda part: part.get("start", 0.0))]


def recording_of(sample: Sample) -> tuple | None:
    """The recording that a sample is a part of; None for whole files, words, and rows that cannot be used."""
    return tuple(sample["media"].items()) if "start" in sample and "error" not in sample else None


def _add_media(sample: Sample, may_lack_words: bool) -> None:
    parts = {name: split_part(clip) for name, clip in sample["clips"].items()}
    media = {name: path for name, (path, _, _) in parts.items()}
    if len(media) == 2 and media["audio"] == media["video"]:
        media = {"file": media["audio"]}
    sample["media"] = media
    if not media:
        return
    path, start, end = next(iter(parts.values()))
    if path in sample["clips"].values():
        return
    if len(media) > 1:
        raise ValueError(f"got a part of two files, {' and '.join(media.values())}, wanted a part of one")
    if not sample["text"] and not may_lack_words:
        raise ValueError("text: got nothing for a part of a recording, wanted words: the model hears no sound")
    if end is None and (end := _length(path)) is None:
        raise ValueError("end: got nothing, wanted seconds, as the recording does not state its length")
    if end <= start:
        raise ValueError(f"start: got {start:g}, wanted less than the recording's {end:.1f} seconds")
    sample |= {"start": start, "end": end}
    sample["named"] |= {"start": start, "end": end}


@lru_cache(maxsize=1)  # the parts of a recording follow each other
def _length(path: str) -> float | None:
    return media_length(path)


def _add_speaker_centers(recognize: Any, samples: list[Sample]) -> None:
    """Adds `speaker_clips`, the center of all clips of the speaker; several processes share the speakers."""
    speakers: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample["clips"] and (speaker := sample["named"]["speaker"]):
            speakers.setdefault(speaker, []).append(sample)
    if single := [speaker for speaker, own in speakers.items() if len(own) == 1]:
        count = f"{len(single)} of {len(speakers)} speakers"
        logging.warning("speaker: %s have one clip, whose mean is their center (%s)", count, ", ".join(single[:3]))
    state, centers = PartialState(), {}
    shared = list(speakers)[state.process_index :: state.num_processes]
    for speaker in tqdm(shared, desc="speakers", disable=None if state.is_main_process else True):
        clips = _readable(recognize.processor, speakers[speaker])
        if (first := next(clips, None)) is None:
            continue  # the answers say why
        try:
            centers[speaker] = recognize.speaker_center(chain([first], clips))
        except recognize.processor.media_error as error:
            logging.warning("speaker %s: %s", speaker, error)
    for found in gather_object([centers]):
        for speaker, center in found.items():
            for sample in speakers[speaker]:
                sample["speaker_clips"] = center


def _readable(processor: Any, samples: list[Sample]) -> Iterator[dict[str, Any]]:
    for sample in samples:
        clips = {}
        for name, clip in sample["clips"].items():
            try:
                clips[name] = getattr(load_row_media(processor, name, clip), name)
            except processor.media_error:
                continue
        if clips:
            yield clips
