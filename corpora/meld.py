"""MELD (declare-lab/MELD): dialogues from a television series; each utterance has one of seven emotions.

Two published forms are read:

- The official files `{train,dev,test}_sent_emo.csv` with the columns `Utterance, Speaker, Emotion, Dialogue_ID,
  Utterance_ID`, optionally with the clips.
- The features of AZYoung233/MSE-Adapter, `meld_{train,valid,test}.pkl` (audio 64 features, vision 64; described in
  `corpora/mse_adapter.py`). They contain neither speakers nor dialogues.

For the CSV files:

- MELD's `dev` split is called `validation`, also in the ids (`validation_dia0_utt0`). Ids contain the split because
  dialogue numbers repeat across splits.
- Utterance numbers have gaps; the context consists of the utterances that the file contains.
- The files are UTF-8. Some published copies contain cp1252 punctuation as control characters (U+0092 for a right
  single quote), so U+0080 to U+009F are replaced by the characters that they encode in cp1252. Other Unicode
  punctuation is kept.
- Clips are `dia{D}_utt{U}.mp4` in `train_splits/`, `dev_splits_complete/` and `output_repeated_splits_test/`. This
  module does not check whether a clip can be decoded (train dia125_utt3 cannot; dev dia110_utt7 does not exist).
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from datasets import DatasetDict

from corpora.mse_adapter import find_pickles, read_pickles
from corpora.reading import Notes, Reading, Rows, part_of_id, repair_text
from corpora.schema import check_count


logger = logging.getLogger(__name__)

EMOTIONS = ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger")  # in the order of MELD's label ids
FILES = {"train": "train_sent_emo.csv", "validation": "dev_sent_emo.csv", "test": "test_sent_emo.csv"}
CLIPS = {"train": "train_splits", "validation": "dev_splits_complete", "test": "output_repeated_splits_test"}

SIZES = {"train": 9989, "validation": 1109, "test": 2610}
WIDTHS = {"audio_features": 64, "vision_features": 64}

_COLUMNS = ("Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID")


CLUSTERS = ("dialogues", part_of_id(r"(.+_dia\d+)_utt\d+"))


def load(source: str | os.PathLike, context: int = 8, media: str | os.PathLike | None = None) -> DatasetDict:
    """Load MELD as emotion classification over `EMOTIONS`.

    Args:
        source: the folder with the three CSV files or the three pickles.
        context: maximum number of preceding utterances of the dialogue in each row, with their speakers.
        media: the folder with the three clip folders. If given, `audio` and `video` contain the path of the clip, or
            null if the file does not exist. The missing clips of each split are counted in the log.

    Raises:
        FileNotFoundError: if a CSV file, a pickle or the media folder does not exist.
        ValueError: if `context` is out of range, `media` contains none of the clip folders or is given for pickles,
            the folder contains files of both forms, or a file is not as described above. The message names file, row
            and column; rows of CSV files are counted from 1, without the header.
    """
    notes = Notes()
    reading = read(source, notes, context, media)
    return reading.load(notes, logger)


def read(source: str | os.PathLike, notes: Notes, context: int = 8, media: str | os.PathLike | None = None) -> Reading:
    """Like `load`, but returns a `Reading` whose rows have not been read yet."""
    context = check_count("context", context)
    source, pickles = Path(source), find_pickles(Path(source), "meld")
    if pickles:
        if any((source / name).is_file() for name in FILES.values()):
            raise ValueError(f"{source}: got CSV files and pickles of MELD, wanted the files of one form")
        if media is not None:
            raise ValueError(
                f"media: got {str(media)!r}, wanted None: the pickles of {source} do not name their clips"
            )
        return Reading("MSE-Adapter's features", read_pickles(pickles, notes, "en", EMOTIONS), SIZES, WIDTHS)
    if media is not None:
        media = Path(media)
        if not media.is_dir():
            raise FileNotFoundError(f"media: {media} is not a folder")
        if not any((media / folder).is_dir() for folder in CLIPS.values()):
            raise ValueError(f"media: {media} has none of the folders {', '.join(CLIPS.values())}")
    frames = {split: _read(source / name) for split, name in FILES.items()}
    splits = {split: Rows(len(frame), _rows(frame, split, context, media, notes)) for split, frame in frames.items()}
    return Reading("CSV files" if media is None else "CSV files and clips", splits, SIZES, media=media)


def _rows(frame: pd.DataFrame, split: str, context: int, media: Path | None, notes: Notes) -> Iterator[dict]:
    for dialogue_id, dialogue in frame.groupby("Dialogue_ID", sort=True):
        turns = [
            {"speaker": speaker, "text": text}
            for speaker, text in zip(dialogue["Speaker"], dialogue["Utterance"], strict=True)
        ]
        for position, (utterance_id, emotion) in enumerate(
            zip(dialogue["Utterance_ID"], dialogue["Emotion"], strict=True)
        ):
            row_id, clip = f"{split}_dia{dialogue_id}_utt{utterance_id}", None
            if media is not None:
                clip = _clip(media, split, dialogue_id, utterance_id)
                if clip is None:
                    notes.add(split, "clip: none", row_id)
            yield turns[position] | {
                "id": row_id,
                "context": turns[max(0, position - context) : position],
                "language": "en",
                "audio": clip,  # the audio track of the video
                "video": clip,
                "emotion": emotion,
            }


def _clip(media: Path, split: str, dialogue_id: int, utterance_id: int) -> str | None:
    """The path of an utterance's clip; None if the file does not exist."""
    path = media / CLIPS[split] / f"dia{dialogue_id}_utt{utterance_id}.mp4"
    return str(path) if path.is_file() else None


def _read(file: Path) -> pd.DataFrame:
    """Read and check one CSV file; sort it by dialogue and utterance, and repair texts and speakers."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file, wanted one of MELD's CSV files")
    try:
        # Read strings without nulls: "None" and "NA" can be spoken words.
        frame = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 ({error})") from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"{file}: not a readable CSV file ({error})") from error
    for column in _COLUMNS:
        if column not in frame:
            raise ValueError(f"{file}: column {column!r} is missing, got {', '.join(frame)}")
    for column in ("Dialogue_ID", "Utterance_ID"):
        _check(file, frame[column], frame[column].str.fullmatch(r"\d+"), "a number")
        frame[column] = frame[column].astype(int)
    _check(file, frame["Emotion"], frame["Emotion"].isin(EMOTIONS), f"one of {', '.join(EMOTIONS)}")
    doubled = frame.duplicated(["Dialogue_ID", "Utterance_ID"])
    _check(file, frame["Utterance_ID"], ~doubled, "each utterance of a dialogue once")
    for column in ("Utterance", "Speaker"):
        frame[column] = frame[column].map(repair_text)
    return frame.sort_values(["Dialogue_ID", "Utterance_ID"], ignore_index=True)


def _check(file: Path, values: pd.Series, good: pd.Series, expected: str) -> None:
    """Raise a ValueError for the first row that is not `good`."""
    if not good.all():
        row = int((~good).to_numpy().argmax())
        raise ValueError(
            f"{file}: row {row + 1}, column {values.name!r}: got {str(values.iloc[row])!r}, wanted {expected}"
        )
