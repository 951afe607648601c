"""Reads the form in which AZYoung233/MSE-Adapter publishes emotion benchmarks: one pickle of features per split.

`{corpus}_{train,valid,test}.pkl` is a list of dicts with `label`, the name of the emotion, and `features`, a dict
with:

- `text`: the transcript,
- `audio` and `video`: arrays of shape (frames, features),
- `audio_len` and `video_len`: numbers of frames; later frames are padding and are removed.

The files have no ids and no dialogues. Ids are built from the split and the position, and rows have no context.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from corpora.pickles.unpickle import load_pickle
from corpora.reading import Notes, Rows, repair_text, sequence


SPLITS = {"train": "train", "valid": "validation", "test": "test"}
_COLUMNS = {"audio": "audio_features", "video": "vision_features"}


def find_pickles(folder: Path, corpus: str) -> dict[str, Path] | None:
    """Find the three files by split.

    Returns:
        The path of each split, or None if none of the files exists.

    Raises:
        FileNotFoundError: If only some of the files exist; the message names a missing one.
    """
    files = {split: folder / f"{corpus}_{name}.pkl" for name, split in SPLITS.items()}
    if not any(file.is_file() for file in files.values()):
        return None
    for file in files.values():
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file, wanted the three splits of MSE-Adapter")
    return files


def read_pickles(files: dict[str, Path], notes: Notes, language: str, emotions: tuple[str, ...]) -> dict[str, Rows]:
    """Open the three files.

    Raises:
        ValueError: If a file is not as described above. Iterating over the rows also raises it for a row; the message
            names the file and the row.
    """
    splits = {}
    for split, file in files.items():
        data = load_pickle(file)
        if not isinstance(data, list) or not data:
            raise ValueError(f"{file}: got {type(data).__name__}, wanted a list of dicts")
        splits[split] = Rows(len(data), _rows(data, file, split, notes, language, emotions))
    return splits


def _rows(data: list, file: Path, split: str, notes: Notes, language: str, emotions) -> Iterator[dict[str, Any]]:
    widths: dict[str, int] = {}
    for number, item in enumerate(data):
        row_id = f"{split}_{number:05d}"
        where = f"{file}: item {number}"
        features = item.get("features") if isinstance(item, dict) else None
        if not isinstance(features, dict):
            raise ValueError(f"{where}: got {type(item).__name__}, wanted a dict with a dict 'features'")
        label = item.get("label")
        if label not in emotions:
            raise ValueError(f"{where}: 'label': got {label!r:.40}, wanted one of {', '.join(emotions)}")
        text = features.get("text")
        if not isinstance(text, str):
            raise ValueError(f"{where}: 'text': got {type(text).__name__}, wanted a string")
        row = {"id": row_id, "text": repair_text(text), "language": language, "emotion": str(label)}
        for name, column in _COLUMNS.items():
            if name not in features or f"{name}_len" not in features:
                raise ValueError(f"{where}: got {', '.join(map(str, features))}, wanted '{name}' and '{name}_len'")
            length = features[f"{name}_len"]
            if not isinstance(length, int | np.integer):
                raise ValueError(f"{where}: '{name}_len': got {length!r:.40}, wanted a number of frames")
            values = features[name][:] if hasattr(features[name], "dtype") else features[name]
            try:
                values = sequence(values, int(length), column, split, row_id, notes)
            except ValueError as error:
                raise ValueError(f"{where}: '{name}': {error}") from None
            if values is None:
                notes.add(split, f"{column}: none", row_id)
            elif values.shape[1] != widths.setdefault(name, values.shape[1]):
                raise ValueError(f"{where}: '{name}': got {values.shape[1]} features, wanted {widths[name]} as before")
            row[column] = values
        yield row
