"""Code that the corpus readers share: notes about repairs, the result of reading, and the repair of values."""

import codecs
import csv
import io
import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import DatasetDict

from corpora.schema import build_split, check_flag


# Five of these 32 bytes are undefined in Python's cp1252 codec and stay unchanged.
_CP1252 = {code: bytes([code]).decode("cp1252", errors="ignore") or chr(code) for code in range(0x80, 0xA0)}
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
DELIMITERS = ",;\t|"
_SHOWN = 3  # ids shown in each note


def part_of_id(pattern: str) -> Callable[[str, str | None], str | None]:
    """Make a function for `CLUSTERS`: the first regex group of a row id, or None if the id does not match."""
    form = re.compile(pattern)
    return lambda row_id, speaker: found[1] if (found := form.fullmatch(row_id)) else None


class Notes:
    """Counts, by split, what a reader repaired, did not find or skipped, with the ids of the first rows."""

    def __init__(self):
        self.entries: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, split: str, what: str, row_id: str, count: int = 1) -> None:
        entry = self.entries.setdefault((split, what), {"count": 0, "rows": 0, "first": []})
        entry["count"] += count
        entry["rows"] += 1
        if len(entry["first"]) < _SHOWN:
            entry["first"].append(row_id)

    def of(self, split: str) -> dict[str, dict[str, Any]]:
        """The notes of a split: `count`, number of `rows`, and ids of the `first` rows."""
        return {what: entry for (entry_split, what), entry in self.entries.items() if entry_split == split}

    def lines(self, split: str) -> list[str]:
        return note_lines(self.of(split))


def note_lines(notes: dict[str, dict[str, Any]]) -> list[str]:
    """The notes of a split ([`Notes.of`]), one line each."""
    lines = []
    for what, entry in notes.items():
        rows = f" in {entry['rows']} rows" if entry["rows"] != entry["count"] else ""
        lines.append(f"{what}: {entry['count']}{rows} (first: {', '.join(entry['first'])})")
    return lines


def fold_splits(fold: int, count: int, validation: bool) -> dict[int, str]:
    """The split of each fold from 1 to `count`: `fold` is test, the next one validation or train, the rest train.

    Raises:
        ValueError: If `fold` is out of range, or `validation` is not a bool.
    """
    check_flag("validation", validation)
    if not isinstance(fold, int) or isinstance(fold, bool) or not 1 <= fold <= count:
        raise ValueError(f"fold: got {fold!r}, wanted an integer from 1 to {count}")
    after = {fold % count + 1: "validation"} if validation else {}
    return dict.fromkeys(range(1, count + 1), "train") | after | {fold: "test"}


class Rows(NamedTuple):
    """A split: the number of rows in its files, and an iterator that may skip some of them (see `Notes`)."""

    count: int
    rows: Iterator[dict[str, Any]]


@dataclass
class Reading:
    """A corpus in one of its published forms, before its rows are read.

    Args:
        form: Name of the form, for messages.
        splits: The rows of each split. Read the splits in this order, each only once.
        sizes: Published number of rows of each split; None if it could not be verified.
        widths: Published feature size of each column; a column that is not listed does not occur in this form.
        media: Folder that contains the files in `audio` and `video`; None if there are no media files.
    """

    form: str
    splits: dict[str, Rows]
    sizes: dict[str, int] | None = None
    widths: dict[str, int] = field(default_factory=dict)
    media: Path | None = None

    def load(self, notes: Notes, logger: logging.Logger) -> DatasetDict:
        """Read all rows into memory and log the notes as warnings."""
        loaded = DatasetDict({name: build_split(split.rows) for name, split in self.splits.items()})
        for split in (*self.splits, "all"):
            for line in notes.lines(split):
                logger.warning("%s: %s", split, line)
        return loaded


class Ids:
    """Makes ids unique over all splits by adding a number to repeated ids."""

    def __init__(self, notes: Notes):
        self.notes, self.seen = notes, {}

    def take(self, split: str, row_id: str) -> str:
        times = self.seen[row_id] = self.seen.get(row_id, 0) + 1
        if times == 1:
            return row_id
        self.notes.add(split, "duplicate id, number added", row_id)
        return f"{row_id}#{times}"


def repair_text(text: str) -> str:
    """Strip outer whitespace; replace U+0080 to U+009F by the characters for these bytes in cp1252."""
    return text.translate(_CP1252).strip()


def read_number(text: str) -> float | None:
    """The finite number that a text is; None for other texts, also for 1_2, which Python would read as 12."""
    try:
        number = float("" if "_" in text else text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def read_time(text: str) -> float:
    """Seconds from a number (12.5) or a clock time (0:01:02.5, 01:02,500).

    Raises:
        ValueError: If it is neither.
    """
    if not re.fullmatch(r"(\d+:){0,2}\d+([.,]\d*)?", text):
        raise ValueError(f"got {text!r}, wanted seconds or a time such as 0:01:02.5")
    seconds = 0.0
    for part in text.replace(",", ".").split(":"):
        seconds = 60 * seconds + float(part)
    return round(seconds, 6)


def decode_text(file: Path) -> str:
    """The content of a UTF-8 file, or of a UTF-16 file with a byte order mark, as spreadsheet programs save tables.

    Raises:
        ValueError: If it is neither; the message names the line.
    """
    content = file.read_bytes()
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        got = f"a byte 0x{content[error.start]:02x} that is not {encoding.upper()}"
        wanted = "the file saved as UTF-8 (Excel: CSV UTF-8)"
        raise ValueError(f"{file}: line {line}: got {got}, wanted {wanted}") from None


def read_csv(file: Path) -> tuple[list[str], Iterator[tuple[int, dict[str, str] | str]]]:
    """Read a CSV file in the forms that spreadsheet programs save ([`decode_text`]); all cells are text.

    The delimiter is the one that a first line such as `sep=;` names, which Excel reads, or else the one of
    `DELIMITERS` that divides the header into the most columns. Empty lines are left out.

    Returns:
        The header, and the line and cells of each row; the cells are a string that says what is wrong if their number
        differs from the header's.

    Raises:
        ValueError: If a column comes twice, or (while iterating) a quote is not closed.
    """
    content = decode_text(file)
    first = (content.splitlines() or [""])[0]
    named = re.fullmatch(r'"?sep=(.)"?', first)
    counted = max(DELIMITERS, key=lambda mark: len(next(csv.reader([first], delimiter=mark), [])))
    delimiter = named.group(1) if named else counted
    form: dict[str, Any] = {"delimiter": delimiter, "strict": True}
    if delimiter == "\t" and '"' in content and not _is_quoted(content):
        logging.warning("%s: quotes are read as part of the text: they enclose no cells", file)
        form["quoting"] = csv.QUOTE_NONE
    lines = csv.reader(io.StringIO(content, newline=""), **form)
    if named:
        next(lines)
    header = [name.strip() for name in _next_cells(file, lines) or ()]
    for name in header:
        if name and header.count(name) > 1:
            raise ValueError(f"{file}: line 1: got the column {name} twice, wanted each column once")
    return header, _csv_rows(file, lines, header, delimiter)


def _is_quoted(content: str) -> bool:
    """Whether quotes in tab-separated text enclose cells.

    They do not if every line has a cell for each column, no quote is doubled inside of quotes, and quotes cannot be
    read as enclosing or would join lines.
    """
    lines = [line for line in content.splitlines() if line.strip()]
    if any(line.count("\t") != lines[0].count("\t") for line in lines):
        return True
    if re.search(r'(?m)(^|\t)"[^\t\n]*""[^\t\n]*"($|\t)', content):
        return True
    try:
        rows = list(csv.reader(io.StringIO(content, newline=""), delimiter="\t", strict=True))
    except csv.Error:
        return False
    return sum(any(cell.strip() for cell in row) for row in rows) == len(lines)


def read_rows(path: Path, required: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields the line number and the cells by column of each row that is not empty; see [`read_csv`].

    Names of columns are in lower case, and `file_name` is `file`, as in tables of clips.

    Raises:
        ValueError: If the table is malformed or lacks a required column. The message names the line.
    """
    header, rows = read_csv(path)
    names = {name: name.lower() for name in header}
    if "file" not in names.values():
        names = {name: "file" if lower == "file_name" else lower for name, lower in names.items()}
    if not set(required) <= {*names.values()}:
        wanted = " and ".join(required)
        raise ValueError(f"{path}: line 1: got {','.join(header)[:100]!r}, wanted a header with the columns {wanted}")
    for line, cells in rows:
        if isinstance(cells, str):
            raise ValueError(f"{path}: line {line}: {cells}")
        yield line, {names[name]: cell.strip() for name, cell in cells.items()}


def _csv_rows(file: Path, lines: Any, header: list[str], delimiter: str) -> Iterator[tuple[int, dict[str, str] | str]]:
    while True:
        line = lines.line_num + 1
        cells = _next_cells(file, lines)
        if cells is None:
            return
        if len(cells) != len(header) and any(cells):
            wanted = f"{len(header)}, as in the header: a cell is missing"
            if len(cells) > len(header):
                wanted = f"{len(header)}, as in the header: put a text that contains {delimiter!r} into double quotes"
            yield line, f"got {len(cells)} cells, wanted {wanted}"
        elif any(cell.strip() for cell in cells):
            yield line, dict(zip(header, cells, strict=True))


def _next_cells(file: Path, lines: Any) -> list[str] | None:
    line = lines.line_num + 1
    try:
        return next(lines, None)
    except csv.Error as error:
        wanted = "every opening quote closed, and quotes inside a text doubled"
        raise ValueError(f"{file}: line {line}: got a faulty quote ({error}), wanted {wanted}") from None


def finite(values: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Convert numbers to float32 and set non-finite values to 0.

    Returns:
        The float32 array, and Boolean masks of the replaced values under the keys "NaN", "-inf" and "+inf". The dict
        is empty if all values were finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.asarray(values).astype(np.float32)
    if np.isfinite(values).all():
        return values, {}
    places = {"NaN": np.isnan(values), "-inf": np.isneginf(values), "+inf": np.isposinf(values)}
    values[~np.isfinite(values)] = 0.0
    return values, places


def sequence(values: Any, length: int | None, column: str, split: str, row_id: str, notes: Notes) -> Any:
    """Convert the published features of one clip to a float32 array of shape (T, D), without padding.

    Non-finite values, and a length that exceeds the number of frames, are added to the notes.

    Args:
        values: (frames, D), of any numeric type.
        length: Number of frames before the padding; None if there is no padding.
        column, split, row_id: Column, split and row for the notes.

    Returns:
        The array, or None if it is empty.

    Raises:
        ValueError: If `values` is not numeric, has ragged rows, or does not have two dimensions.
    """
    try:
        values = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"got rows of different lengths, wanted (frames, features) ({error})") from None
    if values.ndim != 2 or values.dtype.kind not in "fiub":
        raise ValueError(f"got {values.dtype} of shape {values.shape}, wanted numbers of (frames, features)")
    if length is not None:
        if length > len(values):
            notes.add(split, f"{column}: length exceeds the number of frames", row_id)
        values = values[: max(0, length)]
    if values.size == 0:
        return None
    values, places = finite(values)
    for kind, place in places.items():
        if place.any():
            notes.add(split, f"{column}: {kind} set to 0", row_id, int(place.sum()))
    return values
