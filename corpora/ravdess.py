"""RAVDESS (Livingstone and Russo 2018): 24 actors speak two sentences in eight emotions. Only the speech is read.

The names of the published audio files encode all labels: `03-01-06-01-02-01-12.wav` is modality (03: audio only),
channel (01: speech), emotion, intensity, statement, repetition and actor. Other audio formats are accepted, and the
folders `Actor_01` to `Actor_24` are not required. Other modalities and songs are ignored.

There are six folds of four actors: 1-4, 5-8 and so on. One fold is the test split. The next fold is the validation
split or, once all settings are chosen, part of the training split.
"""

import os
from pathlib import Path

from datasets import DatasetDict

from corpora.reading import part_of_id
from corpora.schema import build_split


EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")  # 01 to 08
STATEMENTS = ("Kids are talking by the door.", "Dogs are sitting by the door.")
FOLDS, ACTORS = 6, 24


CLUSTERS = ("actors", part_of_id(r".+-(\d+)"))


def load(source: str | os.PathLike, fold: int = 1, validation: bool = True) -> DatasetDict:
    """Load RAVDESS as emotion classification over `EMOTIONS`.

    Args:
        source: the folder that contains the audio files, at any depth.
        fold: 1 to 6; the fold whose four actors are the test split.
        validation: whether to make a validation split. If False, it is empty and all other actors are in train.

    Raises:
        FileNotFoundError: if the folder does not exist or contains no RAVDESS speech.
        ValueError: if `fold` is out of range, or a file name has codes that RAVDESS does not define (the message
            names the file).
    """
    if not isinstance(fold, int) or isinstance(fold, bool) or not 1 <= fold <= FOLDS:
        raise ValueError(f"fold: got {fold!r}, expected an integer from 1 to {FOLDS}")
    files = sorted(path for path in Path(source).rglob("03-01-*") if path.is_file())
    if not files:
        raise FileNotFoundError(f"{source}: no files 03-01-*, expected the folder with the audio files of RAVDESS")
    held_out = {"test": fold - 1} | ({"validation": fold % FOLDS} if validation else {})
    rows: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    for path in files:
        emotion, statement, actor = _codes(path)
        group = (actor - 1) // (ACTORS // FOLDS)
        split = next((name for name, number in held_out.items() if number == group), "train")
        row = {"id": path.stem, "text": STATEMENTS[statement - 1], "language": "en", "audio": str(path)}
        rows[split].append({**row, "emotion": EMOTIONS[emotion - 1]})
    empty = [split for split in ("train", *held_out) if not rows[split]]
    if empty:
        raise ValueError(f"{source}: no files of the actors of {', '.join(empty)}, expected all {ACTORS} actors")
    return DatasetDict({split: build_split(found) for split, found in rows.items()})


def _codes(path: Path) -> tuple[int, int, int]:
    """Emotion, statement and actor of a file, as numbers from 1."""
    parts = path.stem.split("-")
    if len(parts) == 7 and all(part.isdecimal() for part in parts):
        emotion, statement, actor = int(parts[2]), int(parts[4]), int(parts[6])
        if 1 <= emotion <= len(EMOTIONS) and 1 <= statement <= len(STATEMENTS) and 1 <= actor <= ACTORS:
            return emotion, statement, actor
    raise ValueError(f"{path}: expected a name such as 03-01-06-01-02-01-12.wav, with emotion 01-08 and actor 01-24")
