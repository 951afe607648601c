"""The one schema of every corpus: one row is one utterance.

Null means that a modality is missing and is always legal. A corpus published as media fills `audio` and `video`,
one published as precomputed features fills `audio_features` and `vision_features`. A classification corpus fills
`emotion`, a regression corpus fills `sentiment`, the other one is null; a corpus that has both fills both.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, List, Value
from datasets.table import InMemoryTable


_TURNS = List({"speaker": Value("string"), "text": Value("string")})
_SEQUENCE = List(List(Value("float32")))

FEATURES = Features(
    {
        "id": Value("string"),  # unique over all splits
        "text": Value("string"),  # what was said; may be empty
        "speaker": Value("string"),  # null: unknown
        "context": _TURNS,  # the utterances before this one, oldest first
        "following": _TURNS,  # the utterances after this one, nearest first; empty where a corpus uses none
        "language": Value("string"),  # ISO 639-1: "en", "zh"
        "audio": Value("string"),  # path of a file with sound (of a video: its own sound track)
        "video": Value("string"),  # path of a file with pictures
        "audio_features": _SEQUENCE,  # (T_audio, D_audio)
        "vision_features": _SEQUENCE,  # (T_vision, D_vision)
        "audio_times": List(Value("float32")),  # (T_audio,), seconds on the clip clock
        "vision_times": List(Value("float32")),  # (T_vision,), seconds on the clip clock
        "emotion": Value("string"),  # the label as a word
        "sentiment": Value("float32"),  # the score, in the corpus' own range
    }
)


FEATURE_COLUMNS = ("audio_features", "vision_features")
_SCHEMA = FEATURES.arrow_schema
# What becomes Arrow at once: far below the 2**31 values that its lists can count.
_TABLE_ROWS, _TABLE_VALUES = 1000, 1 << 24


def build_split(rows: Iterable[Mapping[str, object]]) -> Dataset:
    """Rows of (some of) the columns of `FEATURES` -> a `Dataset` of all of them.

    Columns that a row leaves out are null, the two lists of turns empty. Feature sequences may be NumPy arrays
    of shape (T, D).
    """
    table = pa.concat_tables([_SCHEMA.empty_table(), *build_tables(rows)])
    return Dataset(InMemoryTable(table), info=DatasetInfo(features=FEATURES))


def build_tables(rows: Iterable[Mapping[str, object]]) -> Iterator[pa.Table]:
    """As `build_split`, as Arrow tables of few rows each."""
    batch, values = [], 0
    for row in rows:
        batch.append(row)
        values += sum(np.size(row[name]) for name in FEATURE_COLUMNS if row.get(name) is not None)
        if len(batch) == _TABLE_ROWS or values >= _TABLE_VALUES:
            yield build_table(batch)
            batch, values = [], 0
    if batch:
        yield build_table(batch)


def build_table(rows: list[Mapping[str, Any]]) -> pa.Table:
    """As `build_split`, as one Arrow table. ValueError names a column of no such schema."""
    for row in rows:
        for name in row.keys() - FEATURES.keys():
            raise ValueError(f"{row.get('id')}: got the column {name!r}, wanted one of {', '.join(FEATURES)}")
    columns = []
    for column in _SCHEMA:
        empty = [] if column.name in ("context", "following") else None
        values = [row.get(column.name, empty) for row in rows]
        if column.name in FEATURE_COLUMNS:
            columns.append(_sequences(values))
        elif column.name.endswith("_times"):
            columns.append(_lists(values))
        else:
            columns.append(pa.array(values, column.type))
    return pa.Table.from_arrays(columns, schema=_SCHEMA)


def _lists(values: list) -> pa.ListArray:
    """Vectors (T,) of float32, or None -> lists."""
    arrays = [np.empty(0, np.float32) if value is None else np.asarray(value, np.float32) for value in values]
    flat = np.concatenate(arrays) if arrays else np.empty(0, np.float32)
    return pa.ListArray.from_arrays(_offsets(map(len, arrays)), pa.array(flat), mask=_nulls(values))


def _sequences(values: list) -> pa.ListArray:
    """Sequences (T, D) of float32, or None -> lists of lists. No Python object per number: files have billions."""
    arrays = [np.empty((0, 0), np.float32) if value is None else np.asarray(value, np.float32) for value in values]
    flat = np.concatenate([array.reshape(-1) for array in arrays])
    widths = np.concatenate([np.full(len(array), array.shape[1] if array.ndim == 2 else 0) for array in arrays])
    frames = pa.ListArray.from_arrays(_offsets(widths), pa.array(flat))
    return pa.ListArray.from_arrays(_offsets(map(len, arrays)), frames, mask=_nulls(values))


def _offsets(lengths: Iterable[int]) -> pa.Array:
    return pa.array(np.cumsum([0, *lengths]), pa.int32())


def _nulls(values: list) -> pa.Array:
    return pa.array([value is None for value in values], pa.bool_())


def check_count(option: str, value: object, minimum: int = 0) -> int:
    """Return `value` where it is an integer >= `minimum`, raise a ValueError that names `option` where not."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{option}: got {value!r}, expected an integer >= {minimum}")
    return value
