"""The rows of a table as samples: clips, and parts of recordings, each with its words, context and speaker."""

import logging
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from corpora.clips import split_part
from corpora.table import TABLES, load_unlabelled
from egmf.data.clips import load_row_media
from egmf.media_egmf import MediaError, media_length


def is_table(name: str) -> bool:
    """Whether an input is a table, by its suffix."""
    return Path(name).suffix.lower() in TABLES


def read_samples(table: str, options: dict[str, Any], speaker: str | None = None) -> list[dict[str, Any]]:
    """The samples of a table for [`Answerer`], in its order.

    Args:
        table: A table as for training, but without labels.
        options: The options with which the model's corpus was loaded; `columns` and `context` are used.
        speaker: Who speaks in rows that name nobody.

    Raises:
        ValueError: If the table cannot be read.
    """
    known = {name: options[name] for name in ("columns", "context") if name in options}
    return [_sample(row, speaker) for row in load_unlabelled(table, **known)]


def _sample(row: dict[str, Any] | str, speaker: str | None) -> dict[str, Any]:
    if isinstance(row, str):
        return {"named": {"id": None, "text": None, "speaker": None}, "file": None, "clips": {}, "error": row}
    words = {"text": row["text"], "speaker": row["speaker"] or speaker}
    clips = {name: row[name] for name in ("audio", "video") if row[name]}
    sample = {"named": {"id": row["id"], **words}, **words, "context": row["context"]}
    sample |= {"file": None, "clips": clips, "media": {}}
    if not clips:
        return sample
    parts = {name: split_part(clip) for name, clip in clips.items()}
    media = {name: path for name, (path, _, _) in parts.items()}
    if media.get("audio") == media.get("video"):
        media = {"file": media["audio"]}
    path, start, end = next(iter(parts.values()))
    sample |= {"file": path, "media": media}
    if path not in clips.values():
        try:
            sample |= {"start": start, "end": _end(row["id"], media, path, start, end)}
        except (MediaError, ValueError) as error:
            sample["error"] = str(error)
    return sample


def _end(name: str, media: dict[str, str], path: str, start: float, end: float | None) -> float:
    if len(media) > 1:
        raise ValueError(f"{name}: got a part of two files, {' and '.join(media.values())}, wanted a part of one")
    if end is not None:
        return end
    length = _length(path)
    if length is None:
        raise ValueError(f"{name}: end: got nothing, wanted seconds, as the recording does not state its length")
    if length <= start:
        raise ValueError(f"{name}: start: got {start:g}, wanted less than the recording's {length:.1f} seconds")
    return length


@lru_cache(maxsize=1)  # the parts of a recording follow each other
def _length(path: str) -> float | None:
    return media_length(path)


def fit_to_model(recognize: Any, samples: list[dict[str, Any]]) -> None:
    """Gives the samples of a table what a model needs, and takes from them what it does not read.

    A model that was trained with speaker adaptation gets the center of each speaker, that of all clips of the speaker
    in the table. A clip that cannot be read is left out of it.

    Args:
        recognize: The pipeline of the model.
        samples: The samples, which are changed.
    """
    if recognize.model.config.speaker_adaptation:
        _add_speaker_centers(recognize, samples)
    tools = _tools(recognize.processor)
    for sample in samples:
        # What the model does not read is missing, as in training.
        media = {name: clip for name, clip in sample.get("media", {}).items() if tools[name]}
        if not media:
            sample.pop("start", None)
        sample["media"] = media
    if "text" in (recognize.processor.trained_modalities or ["text"]):
        return
    if any(sample.get("text") for sample in samples):
        logging.warning("text: got words for a model that was trained without them; they are ignored")
    for sample in samples:
        for name in ("text", "speaker", "context"):
            sample.pop(name, None)


def _add_speaker_centers(recognize: Any, samples: list[dict[str, Any]]) -> None:
    speakers: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        if sample["clips"] and (speaker := sample["named"]["speaker"]):
            speakers.setdefault(speaker, []).append(sample)
    for speaker, own in speakers.items():
        if len(own) == 1:
            logging.warning("speaker %s: has one clip, whose mean is the center", speaker)
        try:
            center = recognize.speaker_center(_readable(recognize.processor, own))
        except ValueError:  # none can be read: each answer says why
            continue
        for sample in own:
            sample["speaker_clips"] = center


def _tools(processor: Any) -> dict[str, bool]:
    """Whether a model reads the sound, the pictures, and any of them, by the field of a sample."""
    own = {"audio": processor.feature_extractor is not None, "video": processor.image_processor is not None}
    return own | {"file": any(own.values())}


def _readable(processor: Any, samples: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    tools = _tools(processor)
    for sample in samples:
        clips = {}
        for name, clip in sample["clips"].items():
            if tools[name]:
                try:
                    clips[name] = getattr(load_row_media(processor, name, clip), name)
                except processor.media_error:
                    continue
        if clips:
            yield clips
