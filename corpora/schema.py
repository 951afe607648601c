"""The schema of all corpora. One row is one utterance.

A missing modality is null, which is always valid. A corpus of media files fills `audio` and `video`; a corpus of
precomputed features fills `audio_features` and `vision_features`. A classification corpus fills `emotion`, a
regression corpus fills `sentiment`, and a corpus with both kinds of labels fills both. The unused label is null.
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
        "text": Value("string"),  # transcript; may be empty
        "speaker": Value("string"),  # null if unknown
        "context": _TURNS,  # the utterances before this one, oldest first
        "language": Value("string"),  # ISO 639-1: "en", "zh"
        "audio": Value("string"),  # path of an audio file, or of a video file with an audio track
        "video": Value("string"),  # path of a video file
        "audio_features": _SEQUENCE,  # (T_audio, D_audio)
        "vision_features": _SEQUENCE,  # (T_vision, D_vision)
        "audio_times": List(Value("float32")),  # (T_audio,), seconds (in MOSI: utterances)
        "vision_times": List(Value("float32")),  # (T_vision,), seconds (in MOSI: utterances)
        "emotion": Value("string"),  # name of the label
        "sentiment": Value("float32"),  # score, in the range of the corpus
    }
)


FEATURE_COLUMNS = ("audio_features", "vision_features")
_SCHEMA = FEATURES.arrow_schema
# Size of one Arrow table: far below 2**31, the most values that the offsets of its lists can address.
_TABLE_ROWS, _TABLE_VALUES = 1000, 1 << 24


def build_split(rows: Iterable[Mapping[str, object]]) -> Dataset:
    """Build a `Dataset` with all columns of `FEATURES` from rows that may contain only some of them.

    A column that is missing in a row becomes null; `context` becomes an empty list. Feature sequences may
    be NumPy arrays of shape (T, D).
    """
    table = pa.concat_tables([_SCHEMA.empty_table(), *build_tables(rows)])
    return Dataset(InMemoryTable(table), info=DatasetInfo(features=FEATURES))


def build_tables(rows: Iterable[Mapping[str, object]]) -> Iterator[pa.Table]:
    """Like `build_split`, but yields Arrow tables of limited size."""
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
    """Like `build_split`, but returns one Arrow table. Raises a ValueError for a column that is not in the schema."""
    for row in rows:
        for name in row.keys() - FEATURES.keys():
            raise ValueError(f"{row.get('id')}: got the column {name!r}, wanted one of {', '.join(FEATURES)}")
    columns = []
    for column in _SCHEMA:
        empty = [] if column.name == "context" else None
        values = [row.get(column.name, empty) for row in rows]
        if column.name in FEATURE_COLUMNS:
            columns.append(_sequences(values))
        elif column.name.endswith("_times"):
            columns.append(_lists(values))
        else:
            columns.append(pa.array(values, column.type))
    return pa.Table.from_arrays(columns, schema=_SCHEMA)


def _lists(values: list) -> pa.ListArray:
    """Convert vectors of shape (T,), or None, to an Arrow array of float32 lists."""
    arrays = [np.empty(0, np.float32) if value is None else np.asarray(value, np.float32) for value in values]
    flat = np.concatenate(arrays) if arrays else np.empty(0, np.float32)
    return pa.ListArray.from_arrays(_offsets(map(len, arrays)), pa.array(flat), mask=_nulls(values))


def _sequences(values: list) -> pa.ListArray:
    """Convert sequences of shape (T, D), or None, to an Arrow array of nested float32 lists.

    Creates no Python object per number, because a corpus has billions of numbers.
    """
    arrays = [np.empty((0, 0), np.float32) if value is None else np.asarray(value, np.float32) for value in values]
    flat = np.concatenate([array.reshape(-1) for array in arrays])
    widths = np.concatenate([np.full(len(array), array.shape[1] if array.ndim == 2 else 0) for array in arrays])
    frames = pa.ListArray.from_arrays(_offsets(widths), pa.array(flat))
    return pa.ListArray.from_arrays(_offsets(map(len, arrays)), frames, mask=_nulls(values))


def _offsets(lengths: Iterable[int]) -> pa.Array:
    return pa.array(np.cumsum([0, *lengths]), pa.int32())


def _nulls(values: list) -> pa.Array:
    return pa.array([value is None for value in values], pa.bool_())


def check_flag(option: str, value: object) -> None:
    """Raise a ValueError that names `option` if `value` is not true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{option}: got {value!r}, wanted true or false")


def check_count(option: str, value: object, minimum: int = 0) -> int:
    """Return `value` if it is an integer >= `minimum`; otherwise raise a ValueError that names `option`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{option}: got {value!r}, wanted an integer >= {minimum}")
    return value
