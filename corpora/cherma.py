"""CHERMA (Sun et al. 2023): clips of Chinese films and series, each labelled with one of seven emotions.

Two published forms are read; the names of the files tell them apart:

- sunjunaimer/LFMIM: `{train,dev,test}.json` are lists of dicts with `audio_file`, `video_file` and four labels. The
  target is `video_label`, which was annotated from all modalities together. The features are
  `audio/{split}/{name}.npy` (frames, 1024) and `visual/{split}/{name}.mp4.npy` (16, 2048), where `name` is
  `audio_file` without `.wav`. The words exist only as features (`text/`), which a language model cannot read, so
  `text` is null.
- AZYoung233/MSE-Adapter: `cherma_{train,valid,test}.pkl`, see `corpora/mse_adapter.py`. These files contain the words.

LFMIM selects its model on the test split; this project does not. Without `dev.json` (or `valid.json`), a tenth of
train, drawn with `VALIDATION_SEED`, becomes the validation split. The published numbers of rows could not be
verified.
"""

import json
import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import DatasetDict

from corpora.mse_adapter import find_pickles, read_pickles
from corpora.reading import Ids, Notes, Reading, Rows, sequence


logger = logging.getLogger(__name__)

EMOTIONS = ("愤怒", "厌恶", "恐惧", "高兴", "平静", "悲伤", "惊奇")  # in the order of CHERMA's label ids
WIDTHS = {"audio_features": 1024, "vision_features": 2048}
VALIDATION_SEED, VALIDATION_PARTS = 723, 10

_FOLDERS = {"audio_features": ("audio", "{}.npy"), "vision_features": ("visual", "{}.mp4.npy")}
_LABEL = "video_label"


def load(source: str | os.PathLike) -> DatasetDict:
    """Load CHERMA as emotion classification over `EMOTIONS`.

    Args:
        source: The folder with the files of one of the two forms.

    Raises:
        FileNotFoundError: If the folder or one of its files does not exist.
        ValueError: If a file is not as described above (the message names the file and the position), or if the folder
            contains files of both forms.
    """
    notes = Notes()
    return read(source, notes).load(notes, logger)


def read(source: str | os.PathLike, notes: Notes) -> Reading:
    """Like `load`, but returns a `Reading` whose rows have not been read yet."""
    source = Path(source)
    pickles = find_pickles(source, "cherma")
    has_json = (source / "train.json").is_file()
    if pickles and has_json:
        raise ValueError(f"{source}: got train.json and cherma_train.pkl, wanted the files of one form")
    if pickles:
        splits = read_pickles(pickles, notes, "zh", EMOTIONS)
        return Reading("MSE-Adapter's features", splits, widths=WIDTHS)
    if not has_json:
        raise FileNotFoundError(f"{source}: got neither train.json nor cherma_train.pkl, wanted CHERMA's files")
    validation_file = next((name for name in ("dev", "valid") if (source / f"{name}.json").is_file()), None)
    entries = {split: _read_json(source / f"{split}.json") for split in ("train", "test")}
    folders = {"train": "train", "validation": validation_file or "train", "test": "test"}
    if validation_file:
        entries["validation"] = _read_json(source / f"{validation_file}.json")
    else:
        count = len(entries["train"]) // VALIDATION_PARTS
        held_out = set(random.Random(VALIDATION_SEED).sample(range(len(entries["train"])), count))
        for index in sorted(held_out):
            notes.add("validation", "row taken from train, as there is no dev.json", _name(entries["train"][index]))
        entries["validation"] = [entry for index, entry in enumerate(entries["train"]) if index in held_out]
        entries["train"] = [entry for index, entry in enumerate(entries["train"]) if index not in held_out]
    ids = Ids(notes)
    splits = {
        split: Rows(len(entries[split]), _rows(entries[split], source, folder, split, ids))
        for split, folder in folders.items()
    }
    return Reading("LFMIM's features", splits, widths=WIDTHS)


def _name(entry: dict[str, Any]) -> str:
    return entry["audio_file"].removesuffix(".wav")


def _read_json(file: Path) -> list[dict[str, Any]]:
    """Read and check the entries of one split."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file, wanted LFMIM's list of clips")
    try:
        entries = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: got no readable JSON ({error})") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{file}: got {type(entries).__name__}, wanted a list of clips")
    for number, entry in enumerate(entries):
        where = f"{file}: item {number}"
        if not isinstance(entry, dict) or not {"audio_file", _LABEL} <= entry.keys():
            raise ValueError(f"{where}: got {entry!r:.80}, wanted a dict with 'audio_file' and '{_LABEL}'")
        name = entry["audio_file"]
        if not isinstance(name, str) or not name or set(name) & {"/", "\\", "\0"} or name in (".", ".."):
            raise ValueError(f"{where}: 'audio_file': got {name!r:.80}, wanted the name of a file")
        if entry[_LABEL] not in EMOTIONS:
            raise ValueError(f"{where}: '{_LABEL}': got {entry[_LABEL]!r:.40}, wanted one of {', '.join(EMOTIONS)}")
    return entries


def _rows(entries: list, source: Path, folder: str, split: str, ids: Ids) -> Iterator[dict[str, Any]]:
    notes, widths = ids.notes, {}
    for entry in entries:
        name = _name(entry)
        row_id = ids.take(split, name)
        row = {"id": row_id, "language": "zh", "emotion": entry[_LABEL]}
        for column, (kind, pattern) in _FOLDERS.items():
            file = source / kind / folder / pattern.format(name)
            if not file.is_file():
                file = source / kind / folder / f"{name}.npy"
            if not file.is_file():
                notes.add(split, f"{column}: no file", row_id)
                continue
            try:
                # Memory-mapped, so that a false header cannot allocate memory; pickled objects are refused.
                values = np.load(file, mmap_mode="r", allow_pickle=False)
                values = sequence(values, None, column, split, row_id, notes)
            except (ValueError, OSError, EOFError) as error:
                notes.add(split, f"{column}: unreadable file ({type(error).__name__})", row_id)
                logger.warning("%s: got no features (%s)", file, error)
                continue
            if values is None:
                notes.add(split, f"{column}: none", row_id)
            elif values.shape[1] != widths.setdefault(column, values.shape[1]):
                raise ValueError(f"{file}: got {values.shape[1]} features, wanted {widths[column]} as before")
            row[column] = values
        yield row
