"""RAVDESS (Livingstone and Russo 2018): 24 actors speak two sentences in eight emotions. Speech and faces are read.

The names of the published audio files encode all labels: `03-01-06-01-02-01-12.wav` is modality (03: audio only),
channel (01: speech), emotion, intensity, statement, repetition and actor. Other audio formats are accepted, and the
folders `Actor_01` to `Actor_24` are not required. Other modalities and songs are ignored.

One fold of actors is the test split. The next fold is the validation split or, once all settings are chosen, part of
the training split. There are two sets of folds: `"ordered"`, six folds of four actors (1-4, 5-8 and so on), and
`"published"`, the five folds of Luna-Jimenez et al. 2022 (Applied Sciences 12, 327), on which speech and faces were
fused.

Faces come as OpenFace action units: a file `openface_action_units.csv` in the folder, with a column `id` (the name of
the audio file without its suffix) and one column per action unit, the mean over the clip's video. Each clip then has
one frame of vision features. Without the file, rows have no vision.
"""

import os
from pathlib import Path

import numpy as np
from datasets import DatasetDict
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder

from corpora.reading import fold_splits, part_of_id, read_rows
from corpora.schema import build_split


EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")  # 01 to 08
STATEMENTS = ("Kids are talking by the door.", "Dogs are sitting by the door.")
ACTORS = 24
FOLDS = {
    "ordered": tuple(tuple(range(first, first + 4)) for first in range(1, ACTORS, 4)),
    "published": ((2, 5, 14, 15, 16), (3, 6, 7, 13, 18), (10, 11, 12, 19, 20), (8, 17, 21, 23, 24), (1, 4, 9, 22)),
}
ACTION_UNITS = "openface_action_units.csv"
CLUSTERS = ("actors", part_of_id(r".+-(\d+)"))


def load(source: str | os.PathLike, fold: int = 1, validation: bool = True, folds: str = "ordered") -> DatasetDict:
    """Load RAVDESS as emotion classification over `EMOTIONS`.

    Args:
        source: the folder that contains the audio files, at any depth.
        fold: 1 to 6 (of the published folds 5); the fold whose actors are the test split.
        validation: whether to make a validation split. If False, it is empty and all other actors are in train.
        folds: "ordered" or "published", see above.

    Raises:
        FileNotFoundError: if the folder does not exist or contains no RAVDESS speech.
        ValueError: if `folds` or `fold` is unknown, a file name has codes that RAVDESS does not define or comes twice
            (the message names the file), or the action units lack a clip.
    """
    if folds not in FOLDS:
        raise ValueError(f"folds: got {folds!r}, wanted one of {', '.join(FOLDS)}")
    splits = fold_splits(fold, len(FOLDS[folds]), validation)
    found = Path(source).rglob("03-01-*")
    files = sorted(path for path in found if path.is_file() and path.suffix.lower() in AudioFolder.EXTENSIONS)
    names: dict[str, Path] = {}
    for path in files:
        if names.setdefault(path.stem, path) is not path:
            raise ValueError(f"{path}: got the clip of {names[path.stem]} again, wanted each clip once")
    if not files:
        raise FileNotFoundError(f"{source}: no files 03-01-*, wanted the folder with the audio files of RAVDESS")
    units = _action_units(Path(source))
    rows: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    for path in files:
        emotion, statement, actor = _codes(path)
        group = next(number for number, actors in enumerate(FOLDS[folds], 1) if actor in actors)
        row = {"id": path.stem, "text": STATEMENTS[statement - 1], "language": "en", "audio": str(path)}
        if units is not None:
            if path.stem not in units:
                raise ValueError(f"{ACTION_UNITS}: got no row {path.stem}, wanted one for each audio file")
            row["vision_features"] = units[path.stem]
        rows[splits[group]].append({**row, "emotion": EMOTIONS[emotion - 1]})
    empty = [split for split in dict.fromkeys(splits.values()) if not rows[split]]
    if empty:
        raise ValueError(f"{source}: no files of the actors of {', '.join(empty)}, wanted all {ACTORS} actors")
    return DatasetDict({split: build_split(found) for split, found in rows.items()})


def _action_units(folder: Path) -> dict[str, np.ndarray] | None:
    """Action units (1, columns) by clip; None if the folder has no such file."""
    if not (folder / ACTION_UNITS).is_file():
        return None
    units: dict[str, np.ndarray] = {}
    for line, cells in read_rows(folder / ACTION_UNITS, ("id",)):
        place, clip = f"{ACTION_UNITS}: line {line}", cells.pop("id")
        if clip in units:
            raise ValueError(f"{place}: got the clip {clip} again, wanted each clip once")
        try:
            units[clip] = np.array([list(cells.values())], np.float64).astype(np.float32)
        except ValueError:
            raise ValueError(f"{place}: got {', '.join(cells.values())}, wanted a number in each column") from None
    return units


def _codes(path: Path) -> tuple[int, int, int]:
    """Emotion, statement and actor of a file, as numbers from 1."""
    parts = path.stem.split("-")
    if len(parts) == 7 and all(part.isdecimal() for part in parts):
        emotion, statement, actor = int(parts[2]), int(parts[4]), int(parts[6])
        if 1 <= emotion <= len(EMOTIONS) and 1 <= statement <= len(STATEMENTS) and 1 <= actor <= ACTORS:
            return emotion, statement, actor
    raise ValueError(f"{path}: wanted a name such as 03-01-06-01-02-01-12.wav, with emotion 01-08 and actor 01-24")
