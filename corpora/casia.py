"""CASIA (Institute of Automation, Chinese Academy of Sciences): four actors speak Mandarin sentences in six emotions.

The sentences are the same in every emotion, so only the voice carries it. The folder contains the audio files and
`metadata.csv` with the columns `file`, `speaker` (1 to 4) and `emotion_zh`. Labels are the words of CHERMA's label
set, without disgust. Rows have no text.

There are four folds, one per speaker. One is the test split; the next is the validation split or, once all settings
are chosen, part of the training split.
"""

import os
from pathlib import Path

from datasets import DatasetDict

from corpora.reading import fold_splits, part_of_id, read_rows
from corpora.schema import build_split


EMOTIONS = ("愤怒", "恐惧", "高兴", "平静", "悲伤", "惊奇")
SPEAKERS = 4
CLUSTERS = ("speakers", part_of_id(r"(\d+)_.+"))


def load(source: str | os.PathLike, fold: int = 1, validation: bool = True) -> DatasetDict:
    """Load CASIA as emotion classification over `EMOTIONS`.

    Args:
        source: the folder with `metadata.csv` and the audio files.
        fold: 1 to 4; the speaker that is the test split.
        validation: whether to make a validation split. If False, it is empty and all other speakers are in train.

    Raises:
        FileNotFoundError: if the table or an audio file does not exist.
        ValueError: if `fold` is out of range, a column is missing, a speaker or an emotion is unknown, or a clip comes
            twice.
    """
    splits = fold_splits(fold, SPEAKERS, validation)
    rows: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    seen: set[str] = set()
    for line, cells in read_rows(Path(source) / "metadata.csv", ("file", "speaker", "emotion_zh")):
        place, file, speaker, emotion = (
            f"metadata.csv: line {line}",
            cells["file"],
            cells["speaker"],
            cells["emotion_zh"],
        )
        if emotion not in EMOTIONS or speaker not in map(str, range(1, SPEAKERS + 1)):
            wanted = f"1 to {SPEAKERS} and one of {', '.join(EMOTIONS)}"
            raise ValueError(f"{place}: got speaker {speaker!r} and emotion {emotion!r}, wanted {wanted}")
        path = Path(source) / file
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, wanted the audio file of {place}")
        row_id = Path(file).with_suffix("").as_posix()
        row_id = row_id if row_id.startswith(f"{speaker}_") else f"{speaker}_{row_id}"
        if row_id in seen:
            raise ValueError(f"{place}: got {file} again, wanted each clip once")
        seen.add(row_id)
        rows[splits[int(speaker)]].append({"id": row_id, "language": "zh", "audio": str(path), "emotion": emotion})
    return DatasetDict({split: build_split(found) for split, found in rows.items()})
