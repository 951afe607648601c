"""What the readers of the published benchmarks share: what a reading is, what it notes, and the repair of values."""

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import DatasetDict

from corpora.schema import build_split


# Python leaves five of the 32 bytes undefined in cp1252: those stay as they are.
_CP1252 = {code: bytes([code]).decode("cp1252", errors="ignore") or chr(code) for code in range(0x80, 0xA0)}
_SHOWN = 3  # ids in a line of notes


def part_of_id(pattern: str) -> Callable[[str, str | None], str | None]:
    """For a corpus's `CLUSTERS`: the first group of a pattern that a whole row id matches; None where it does not."""
    form = re.compile(pattern)
    return lambda row_id, speaker: found[1] if (found := form.fullmatch(row_id)) else None


class Notes:
    """What a reader repaired, missed or left out, by split: how often, and in which rows first."""

    def __init__(self):
        self.entries: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, split: str, what: str, row_id: str, count: int = 1) -> None:
        entry = self.entries.setdefault((split, what), {"count": 0, "rows": 0, "first": []})
        entry["count"] += count
        entry["rows"] += 1
        if len(entry["first"]) < _SHOWN:
            entry["first"].append(row_id)

    def of(self, split: str) -> dict[str, dict[str, Any]]:
        """What was noted of a split: `count`, number of `rows`, and the `first` rows' ids."""
        return {what: entry for (own, what), entry in self.entries.items() if own == split}

    def lines(self, split: str) -> list[str]:
        return [
            f"{what}: {entry['count']}"
            + (f" in {entry['rows']} rows" if entry["rows"] != entry["count"] else "")
            + f" (first: {', '.join(entry['first'])})"
            for what, entry in self.of(split).items()
        ]


class Rows(NamedTuple):
    """A split: how many rows its files have, and the rows, of which some may be left out (see `Notes`)."""

    count: int
    rows: Iterator[dict[str, Any]]


@dataclass
class Reading:
    """A corpus in one of its published forms, before its rows are read.

    Args:
        form: Which form, in words.
        splits: By split; to be read in this order, each once.
        sizes: The published number of rows by split, None where it was never verified.
        widths: The published width of the features, by column; a column that is not named is not in this form.
        media: The folder that the paths in `audio` and `video` are in; None without.
    """

    form: str
    splits: dict[str, Rows]
    sizes: dict[str, int] | None = None
    widths: dict[str, int] = field(default_factory=dict)
    media: Path | None = None

    def load(self, notes: Notes, logger: logging.Logger) -> DatasetDict:
        """All rows, in memory; what was noted goes to the log."""
        loaded = DatasetDict({name: build_split(split.rows) for name, split in self.splits.items()})
        for split in (*self.splits, "all"):
            for line in notes.lines(split):
                logger.warning("%s: %s", split, line)
        return loaded


class Ids:
    """Makes ids unique over all splits: one that comes again gets a number."""

    def __init__(self, notes: Notes):
        self.notes, self.seen = notes, {}

    def take(self, split: str, row_id: str) -> str:
        times = self.seen[row_id] = self.seen.get(row_id, 0) + 1
        if times == 1:
            return row_id
        self.notes.add(split, "id that is not the first of its name, numbered", row_id)
        return f"{row_id}#{times}"


def repair_text(text: str) -> str:
    """Text without outer spaces and without cp1252's leftovers: U+0080 to U+009F become what cp1252 means by them."""
    return text.translate(_CP1252).strip()


def finite(values: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Numbers of any type as float32, 0 for those that are not finite; and where they were, by kind, if any."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.asarray(values).astype(np.float32)
    if np.isfinite(values).all():
        return values, {}
    places = {"NaN": np.isnan(values), "-inf": np.isneginf(values), "+inf": np.isposinf(values)}
    values[~np.isfinite(values)] = 0.0
    return values, places


def sequence(values: Any, length: int | None, column: str, split: str, row_id: str, notes: Notes) -> Any:
    """One clip's features as published, padded or not -> (T, D) float32; None if nothing is left.

    Args:
        values: (frames, D), of any numeric type.
        length: How many frames are no padding; None: all.
        column, split, row_id: For the notes: values that were not finite, and a length beyond the frames there are.

    Raises:
        ValueError: No numbers, ragged rows, or not two dimensions; the message says what it got.
    """
    try:
        values = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"got rows of different lengths, wanted (frames, features) ({error})") from None
    if values.ndim != 2 or values.dtype.kind not in "fiub":
        raise ValueError(f"got {values.dtype} of shape {values.shape}, wanted numbers of (frames, features)")
    if length is not None:
        if length > len(values):
            notes.add(split, f"{column}: frames that the length claims and the array has not", row_id)
        values = values[: max(0, length)]
    if values.size == 0:
        return None
    values, places = finite(values)
    for kind, place in places.items():
        if place.any():
            notes.add(split, f"{column}: {kind} set to 0", row_id, int(place.sum()))
    return values
