"""Reads the two forms in which thuiar/MMSA publishes benchmarks with scores: feature pickles, and tables with clips.

A pickle (`unaligned_50.pkl`, `aligned_50.pkl`, `ch-simsv2s.pkl`) is a dict of the splits `train`, `valid` and `test`;
other splits, such as SIMS-V2's `train_mix`, are ignored. Each split is a dict of columns with one item per clip:
`raw_text`, `id` (`video$_$clip`), `audio` and `vision` (clips, frames, features), and `regression_labels`.

- Unaligned pickles have `audio_lengths` and `vision_lengths`; later frames are padding and are removed.
- Aligned pickles have no lengths. Frames at both ends of a clip that are zero in both modalities are padding.
- `text` and `text_bert` are ignored, because the text enters through the language model. The labels of single
  modalities are ignored too.

A table is `label.csv` (SIMS-V2: `meta.csv`) with the columns `video_id, clip_id, text, label, ..., mode`; `mode` is
the split. Ids are strings with leading zeros. The clips are in `Raw/{video_id}/{clip_id}.mp4`.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from corpora.pickles.unpickle import FileArray, load_pickle
from corpora.reading import Ids, Notes, Rows, finite, repair_text, sequence


SPLITS = {"train": "train", "valid": "validation", "test": "test"}
_MODES = SPLITS | {"dev": "validation", "val": "validation", "validation": "validation"}
_COLUMNS = {"audio": "audio_features", "vision": "vision_features"}
_CHUNK = 1 << 25  # bytes of a modality that are read together
_TOLERANCE = 1e-6  # float32 scores may exceed the range by this much


def check_score(value: Any, scores: tuple[float, float], where: str) -> float | None:
    """Return a score as a float; None if it is empty or NaN. Raise a ValueError if it is not a number in the range."""
    try:
        score = float(value) if value != "" else float("nan")
    except (TypeError, ValueError):
        raise ValueError(f"{where}: got {value!r}, wanted a score from {scores[0]} to {scores[1]}") from None
    if np.isnan(score):
        return None
    if not scores[0] - _TOLERANCE <= score <= scores[1] + _TOLERANCE:
        raise ValueError(f"{where}: got {score:g}, wanted a score from {scores[0]:g} to {scores[1]:g}")
    return score


# Features


def read_features(
    file: Path, notes: Notes, language: str, scores: tuple[float, float], rates: dict[str, float] | None = None
) -> tuple[dict[str, Rows], bool]:
    """Open a pickle of features.

    Args:
        file: The pickle.
        notes: Receives what is repaired or skipped.
        language: Language of the texts.
        scores: The lowest and the highest valid score.
        rates: Frames per second of `audio` and `vision` in unaligned pickles; they determine the times of the frames.

    Returns:
        The splits, and whether the modalities are aligned.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not as described above; the message names file, split and column. Iterating over the
            rows also raises it for a score out of range.
    """
    data = load_pickle(file)
    if not isinstance(data, dict) or not set(SPLITS) <= set(data):
        got = ", ".join(map(str, list(data)[:10])) if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{file}: got {got}, wanted a dict of {', '.join(SPLITS)}")
    for name in SPLITS:
        _check_columns(data[name], f"{file}: {name}")
    aligned = {"audio_lengths" not in data[name] for name in SPLITS}
    if len(aligned) > 1:
        raise ValueError(f"{file}: got 'audio_lengths' in some splits, wanted it in all or none")
    ids = Ids(notes)
    splits = {
        split: Rows(
            len(data[name]["audio"]),
            _feature_rows(data[name], f"{file}: {name}", split, ids, language, scores, rates or {}),
        )
        for name, split in SPLITS.items()
    }
    return splits, aligned.pop()


def _check_columns(columns: Any, where: str) -> None:
    """Check that a split has all columns, that they have the same length, and that features have three dimensions."""
    if not isinstance(columns, dict):
        raise ValueError(f"{where}: got {type(columns).__name__}, wanted a dict of columns")
    names = ["raw_text", "id", "audio", "vision", "regression_labels"]
    if ("audio_lengths" in columns) != ("vision_lengths" in columns):
        raise ValueError(f"{where}: got the lengths of one modality, wanted 'audio_lengths' and 'vision_lengths'")
    if "audio_lengths" in columns:
        names += ["audio_lengths", "vision_lengths"]
    for name in names:
        if name not in columns:
            raise ValueError(f"{where}: column {name!r} is missing, got {', '.join(map(str, columns))}")
        column = columns[name]
        is_array = isinstance(column, np.ndarray | FileArray)
        if not (is_array and column.ndim) and not (isinstance(column, list | tuple) and name not in _COLUMNS):
            raise ValueError(f"{where}: column {name!r}: got {type(column).__name__}, wanted one item per clip")
        if name in _COLUMNS and (column.ndim != 3 or column.dtype.kind not in "fiu"):
            got = f"{column.dtype} of shape {column.shape}"
            raise ValueError(f"{where}: column {name!r}: got {got}, wanted numbers of (clips, frames, features)")
    frames = {name: columns[name].shape[1] for name in _COLUMNS}
    if "audio_lengths" not in columns and len(set(frames.values())) > 1:
        got = ", ".join(f"{name} {count}" for name, count in frames.items())
        raise ValueError(f"{where}: got {got} frames and no 'audio_lengths', wanted lengths, or aligned modalities")
    counts = {name: len(columns[name]) for name in names}
    if len(set(counts.values())) > 1:
        got = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"{where}: got columns of different lengths ({got}), wanted one item per clip in each")


def _feature_rows(columns, where: str, split: str, ids: Ids, language: str, scores, rates) -> Iterator[dict[str, Any]]:
    notes = ids.notes
    aligned = "audio_lengths" not in columns
    scalars = {name: _scalars(columns[name]) for name in ("raw_text", "id", "regression_labels")}
    lengths = {
        name: None if aligned else _lengths(columns[f"{name}_lengths"], f"{where}: column '{name}_lengths'")
        for name in _COLUMNS
    }
    row_bytes = max(columns[name][:1].nbytes for name in _COLUMNS)
    step = max(1, _CHUNK // max(1, row_bytes))
    for start in range(0, len(columns["audio"]), step):
        chunk = {name: columns[name][start : start + step] for name in _COLUMNS}
        for offset in range(len(chunk["audio"])):
            index = start + offset
            row_id = ids.take(split, str(scalars["id"][index]))
            label = scalars["regression_labels"][index]
            score = check_score(label, scores, f"{where}: {row_id}: 'regression_labels'")
            if score is None:
                notes.add(split, "row left out: no label", row_id)
                continue
            row = {"id": row_id, "language": language, "sentiment": score}
            row["text"] = _text_of(scalars["raw_text"][index], split, row_id, notes)
            clip = {name: chunk[name][offset] for name in _COLUMNS}
            span = _spoken(clip) if aligned else slice(None)
            for name, column in _COLUMNS.items():
                length = None if aligned else lengths[name][index]
                features = sequence(clip[name][span], length, column, split, row_id, notes)
                if features is None:
                    notes.add(split, f"{column}: none", row_id)
                    continue
                row[column] = features
                if not aligned and name in rates:
                    row[f"{name}_times"] = ((np.arange(len(features)) + 0.5) / rates[name]).astype(np.float32)
            yield row


def _scalars(column: Any) -> list:
    """Convert a column of texts or numbers to a list; a shape of (clips, 1) is treated as (clips,)."""
    items = column[:] if isinstance(column, FileArray) else column
    items = items.tolist() if isinstance(items, np.ndarray) else list(items)
    items = [item.tolist() if isinstance(item, np.ndarray | np.generic) else item for item in items]
    return [item[0] if isinstance(item, list) and len(item) == 1 else item for item in items]


def _lengths(column: Any, where: str) -> list[int]:
    lengths = _scalars(column)
    for length in lengths:
        if not isinstance(length, int | float) or length % 1 != 0:  # also rejects NaN and infinity
            raise ValueError(f"{where}: got {length!r:.40}, wanted a number of frames")
    return [int(length) for length in lengths]


def _text_of(value: Any, split: str, row_id: str, notes: Notes) -> str | None:
    if isinstance(value, str):
        return repair_text(value)
    notes.add(split, "text: none", row_id)
    return None


def _spoken(clip: dict[str, np.ndarray]) -> slice:
    """The frames from the first to the last one that is not zero in all modalities."""
    heard = np.logical_or.reduce([(finite(values)[0] != 0).any(axis=1) for values in clip.values()])
    places = np.flatnonzero(heard)
    return slice(places[0], places[-1] + 1) if len(places) else slice(0, 0)


# Clips


def read_table(file: Path, scores: tuple[float, float], notes: Notes) -> pd.DataFrame:
    """Read and check `label.csv` or `meta.csv`.

    The returned table has the columns `video_id`, `clip_id`, `text`, `label` and `split` (`train`, `validation` or
    `test`). Rows without a label, and rows whose mode is not one of the three splits, are skipped and noted.

    Raises:
        ValueError: If the table is not as described above; the message names file, row and column.
    """
    try:
        # Read strings without nulls: ids have leading zeros, and "None" can be a spoken word.
        frame = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: got another encoding, wanted UTF-8 ({error})") from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"{file}: got no readable CSV file ({error})") from error
    for column in ("video_id", "clip_id", "text", "label", "mode"):
        if column not in frame:
            raise ValueError(f"{file}: column {column!r} is missing, got {', '.join(frame)}")
    frame["split"] = frame["mode"].str.strip().map(_MODES)
    values, kept = [], []
    for row in frame.itertuples():
        row_id = f"{row.video_id}$_${row.clip_id}"
        if not isinstance(row.split, str):
            notes.add("all", f"row left out: mode {row.mode!r} is none of {', '.join(SPLITS)}", row_id)
            continue
        score = check_score(row.label.strip(), scores, f"{file}: row {row.Index + 1}, column 'label'")
        if score is None:
            notes.add(row.split, "row left out: no label", row_id)
            continue
        values.append(score)
        kept.append(row.Index)
    return frame.loc[kept].assign(label=values).reset_index(drop=True)


def table_rows(
    frame: pd.DataFrame, clip_of: Callable[[str, str], Path | None], notes: Notes, language: str
) -> dict[str, Rows]:
    """The splits of a table; `clip_of(video_id, clip_id)` returns the path of a clip, or None."""
    ids = Ids(notes)

    def rows(split: str, table: pd.DataFrame) -> Iterator[dict[str, Any]]:
        for row in table.itertuples():
            row_id = ids.take(split, f"{row.video_id}$_${row.clip_id}")
            clip = clip_of(row.video_id, row.clip_id)
            if clip is None:
                notes.add(split, "clip: none", row_id)
            text = repair_text(row.text)
            if not text:
                notes.add(split, "text: empty", row_id)
            path = None if clip is None else str(clip)
            yield {
                "id": row_id,
                "text": text,
                "language": language,
                "audio": path,  # the audio track of the video
                "video": path,
                "sentiment": row.label,
            }

    tables = {split: frame[frame["split"] == split] for split in SPLITS.values()}
    return {split: Rows(len(table), rows(split, table)) for split, table in tables.items()}


class ClipFolders:
    """Finds clips in `{root}/{video_id}/{clip_id}.mp4`, even if the table has lost leading zeros of the clip ids."""

    def __init__(self, root: Path):
        self.root, self.numbered = root, {}

    def __call__(self, video_id: str, clip_id: str) -> Path | None:
        if any(part in ("", ".", "..") or set(part) & {"/", "\\", "\0"} for part in (video_id, clip_id)):
            return None  # ids come from a file and must not point outside the folder
        path = self.root / video_id / f"{clip_id}.mp4"
        if path.is_file():
            return path
        if video_id not in self.numbered:
            folder = self.root / video_id
            names = os.listdir(folder) if folder.is_dir() else []
            self.numbered[video_id] = {}
            for name in names:
                stem, suffix = os.path.splitext(name)
                if suffix == ".mp4" and stem.isdecimal():
                    self.numbered[video_id].setdefault(int(stem), []).append(folder / name)
        found = self.numbered[video_id].get(int(clip_id), []) if clip_id.isdecimal() else []
        return found[0] if len(found) == 1 else None
