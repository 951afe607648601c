"""CMU-MOSI with the utterance-level features of soujanyaporia/contextual-multimodal-fusion (one parquet file).

The file contains 2,199 utterances of 93 monologue videos with a binary sentiment label. These columns are read:
`split` (train / test), `video_id`, `clip_id`, `text` (upper-case transcript), `label` (0 / 1), `audio_features` (73,
openSMILE) and `vision_features` (100, 3D-CNN). `text_features` is ignored, because the text enters through the
language model.

The file leaves some choices open:

- It has no validation split. `validation_videos` whole videos are drawn from train with `VALIDATION_SEED`; test does
  not change. No video is in two splits, so the neighbours of an utterance are in its own split.
- Each utterance has one vector per modality. The audio and vision sequences of a row therefore consist of the vectors
  of the utterance and its neighbours in the same video. The file has no timings, so times count utterances: the target
  is at 0.0, the previous utterance at -1.0.
- The raw values reach 376 and are skewed (79 % zeros in vision). They are transformed by a signed log1p, standardised
  with the mean and standard deviation of the train split (without the validation videos), and clipped to [-5, 5].

**The vision features leak labels.** They come from a network that was fitted on the *train labels*. A linear probe
reaches 95 % on held-out train videos but 50 % on test (majority 62 %). Validation is cut off train, so its rows have
no vision features by default: what is fitted there would trust vision, which is worth nothing on test.
"""

import os
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import DatasetDict

from corpora.reading import part_of_id
from corpora.schema import build_split, check_count


VALIDATION_SEED = 2199
LABELS = ("negative", "positive")  # in the order of the file's labels 0 and 1
FEATURE_SIZES = {"audio_features": 73, "vision_features": 100}
FEATURE_LIMIT = 5.0  # standard deviations

_COLUMNS = ("split", "video_id", "clip_id", "text", "label", *FEATURE_SIZES)


CLUSTERS = ("videos", part_of_id(r"(.+)\$_\$[^$]+"))


def load(
    source: str | os.PathLike,
    context: int = 2,
    neighbours: int = 3,
    validation_videos: int = 10,
    validation_vision: bool = False,
) -> DatasetDict:
    """Load MOSI as binary sentiment classification; `emotion` is "positive" or "negative".

    Args:
        source: `mosi.parquet`, or the folder that contains it.
        context: maximum number of preceding utterances of the video in each row.
        neighbours: number of utterances on each side whose audio and vision vectors are included. `audio_features` has
            the shape (T, 73) and `vision_features` (T, 100) with T <= 2 * neighbours + 1; T is smaller at the ends of
            a video. The times are -neighbours .. +neighbours, in utterances.
        validation_videos: number of train videos that become the validation split.
        validation_vision: whether the validation rows have vision features, which leak their labels.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if an option is out of range, or the file is not as described above (the message names file and
            column).
    """
    context = check_count("context", context)
    neighbours = check_count("neighbours", neighbours)
    validation_videos = check_count("validation_videos", validation_videos, minimum=1)

    file = Path(source)
    if file.is_dir():
        file = file / "mosi.parquet"
    frame = _read(file)
    frame = _cut_validation(frame, validation_videos, file)
    is_train = (frame["split"] == "train").to_numpy()
    sequences = {
        column: _standardise(_matrix(frame, column, size, file), is_train) for column, size in FEATURE_SIZES.items()
    }

    rows: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    for video_id, video in frame.groupby("video_id", sort=True):
        first = video.index[0]  # the frame is sorted, so the rows of a video are contiguous
        turns = [{"speaker": None, "text": text} for text in video["text"]]
        for position, utterance in enumerate(video.itertuples()):
            start, stop = max(0, position - neighbours), min(len(turns), position + neighbours + 1)
            times = np.arange(start - position, stop - position, dtype=np.float32)  # (T,)
            seen = utterance.split != "validation" or validation_vision
            rows[utterance.split].append(
                {
                    "id": f"{video_id}$_${utterance.clip_id}",
                    "text": utterance.text,
                    "context": turns[max(0, position - context) : position],
                    "language": "en",
                    "audio_features": sequences["audio_features"][first + start : first + stop],  # (T, 73)
                    "vision_features": sequences["vision_features"][first + start : first + stop] if seen else None,
                    "audio_times": times,
                    "vision_times": times if seen else None,
                    "emotion": LABELS[utterance.label],
                }
            )
    return DatasetDict({split: build_split(split_rows) for split, split_rows in rows.items()})


def _read(file: Path) -> pd.DataFrame:
    """Read the file and check its scalar columns; sort it by video and clip, and convert the text to lower case."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file, wanted MOSI's parquet file or the folder that contains it")
    try:
        frame = pd.read_parquet(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: not a readable parquet file ({error})") from error
    for column in _COLUMNS:
        if column not in frame:
            raise ValueError(f"{file}: column {column!r} is missing, got {', '.join(frame)}")
        if frame[column].isna().any():
            raise ValueError(f"{file}: column {column!r} has {frame[column].isna().sum()} nulls, wanted none")
    for column, legal in (("split", ("train", "test")), ("label", (0, 1))):
        wrong = frame.loc[~frame[column].isin(legal), column]
        if len(wrong):
            raise ValueError(f"{file}: column {column!r} has {wrong.tolist()[0]!r}, wanted one of {legal}")
    for split in ("train", "test"):
        if not (frame["split"] == split).any():
            raise ValueError(f"{file}: column 'split' has no row of {split!r}")
    splits_of_video = frame.groupby("video_id")["split"].nunique()
    if (splits_of_video > 1).any():
        raise ValueError(f"{file}: column 'video_id': {splits_of_video.idxmax()!r} is in both splits, wanted one")
    try:
        frame["clip_id"] = pd.to_numeric(frame["clip_id"])  # texts would be sorted 1, 10, 2
    except ValueError as error:
        raise ValueError(f"{file}: column 'clip_id': {error}, wanted numbers") from error
    doubled = frame.duplicated(["video_id", "clip_id"])
    if doubled.any():
        video_id, clip_id = frame.loc[doubled, ["video_id", "clip_id"]].iloc[0]
        raise ValueError(f"{file}: columns 'video_id', 'clip_id': ({video_id!r}, {clip_id}) occurs more than once")

    frame = frame.sort_values(["video_id", "clip_id"], ignore_index=True)
    frame["label"] = frame["label"].astype(int)
    frame["text"] = frame["text"].str.lower()  # upper-case words are split into many rare tokens
    return frame


def _cut_validation(frame: pd.DataFrame, count: int, file: Path) -> pd.DataFrame:
    """Move `count` random train videos to the split "validation"."""
    videos = sorted(frame.loc[frame["split"] == "train", "video_id"].unique())
    if count >= len(videos):
        raise ValueError(f"validation_videos: got {count}, wanted fewer than the {len(videos)} of train in {file}")
    held_out = random.Random(VALIDATION_SEED).sample(videos, count)
    return frame.assign(split=frame["split"].mask(frame["video_id"].isin(held_out), "validation"))


def _matrix(frame: pd.DataFrame, column: str, size: int, file: Path) -> np.ndarray:
    """Convert a column of vectors to a float64 array of shape (N, size), and check it."""
    widths = frame[column].map(len)
    if (widths != size).any():
        wrong = int(widths[widths != size].iloc[0])
        raise ValueError(f"{file}: column {column!r} has a vector of width {wrong}, wanted {size}")
    matrix = np.stack(frame[column].to_list()).astype(np.float64)
    if not np.isfinite(matrix).all():
        raise ValueError(f"{file}: column {column!r} has {(~np.isfinite(matrix)).sum()} values that are not finite")
    return matrix


def _standardise(matrix: np.ndarray, is_train: np.ndarray) -> np.ndarray:
    """Apply a signed log1p, standardise with the statistics of the rows in `is_train`, and clip.

    (N, D) -> (N, D) float32.
    """
    squashed = np.sign(matrix) * np.log1p(np.abs(matrix))
    mean, deviation = squashed[is_train].mean(axis=0), squashed[is_train].std(axis=0)
    deviation[deviation < 1e-6] = 1.0  # columns that are constant on train
    return np.clip((squashed - mean) / deviation, -FEATURE_LIMIT, FEATURE_LIMIT).astype(np.float32)
