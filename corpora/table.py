"""Your own clips and labels, from a table.

The source is one of:

- a table: CSV or TSV (UTF-8 or UTF-16; comma, semicolon, tab or `|`), JSON lines, or parquet;
- a folder in the form of `datasets`' audiofolder, videofolder or imagefolder, with `metadata.csv` or with a folder for
  each label; or with tables such as `train.csv` and `test.csv`;
- a folder that `datasets` saved with `save_to_disk`;
- the id of a dataset on the Hub.

One row is one utterance. These columns are read; `load` takes other names through `columns`:

| column | content |
| --- | --- |
| `file` (or `file_name`) | sound, an image, or a video with its sound; or columns `audio`, `video`, `image` |
| `text` | the words |
| `label` or `score` | the name of a class or a number |
| `speaker` | who speaks |
| `dialogue` | rows of one dialogue, in the order of the table, are each other's context |
| `split` | train, validation or test |
| `language` | "en", "zh" |
| `start`, `end` | the part of the file in which the utterance is, in seconds or as 0:01:02.5 |
| `id` | unique; by default the file with its part, or a digest of the words (of equal ones with the speaker) |

Paths are relative to the table. Other columns are ignored. Every row is checked before anything is computed, and each
wrong row gets one line. `corpora/splits.py` makes the splits of a table without the column.
"""

import hashlib
import json
import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from unicodedata import normalize

from datasets import DatasetDict

from corpora.clips import name_part, split_part, store_clip
from corpora.reading import read_number, read_time, repair_text
from corpora.schema import build_split, check_count, check_flag
from corpora.sources import SPLIT_NAMES, Part, media_kind, parts_of, table_part
from corpora.splits import SPLITS, clip_key, make_splits


logger = logging.getLogger(__name__)

CLUSTERS = ("speakers", lambda row_id, speaker: speaker)
MEDIA = ("file", "audio", "video", "image")
COLUMNS = ("id", *MEDIA, "text", "label", "score", "speaker", "dialogue", "split", "language", "start", "end")
# Other names of columns, in small letters alone.
ALIASES = {
    "speaker": {"actor", "actorid", "participant", "participantid", "person", "speakerid", "subject", "subjectid"},
    "text": {"sentence", "transcript", "transcription", "utterance", "words"},
    "label": {"category", "class", "emotion"},
    "dialogue": {"conversation", "dialog", "dialogid", "dialogueid"},
}
FEW_NUMBERS = 10  # different labels that are numbers, and are spread over splits as classes are
SHOWN = 100  # wrong rows that are listed


@dataclass
class _Found:
    """Rows that were read, those of them that are context alone, and one line for each row that is wrong."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    unlabelled: dict[str, dict[str, Any]] = field(default_factory=dict)  # by id
    wrong: list[str] = field(default_factory=list)
    seen: dict[str, str] = field(default_factory=dict)  # id -> place

    def add_context(self, row: dict[str, Any]) -> None:
        """Adds a row without a label, unless its clip has been read."""
        key = row["where"] if row["id"] is None else os.path.normpath(row["id"])
        if key not in self.seen and key not in self.unlabelled:
            self.unlabelled[key] = row
            row["is_context"] = True
            self.rows.append(row)


class WrongRow(Exception):
    """A cell that cannot be used; the message names the column, what came and what was wanted."""


class Unlabelled(WrongRow):
    """A row without a label, whose words may still be the context of others.

    Args:
        message: As of a [`WrongRow`].
        row: The row.
    """

    def __init__(self, message: str, row: dict[str, Any]):
        super().__init__(message)
        self.row = row


def load(
    source: str | os.PathLike,
    columns: Mapping[str, str] | None = None,
    context: int = 8,
    seed: int = 0,
    splits: Mapping[str, str] | None = None,
    drop_wrong_rows: bool = False,
    config: str | None = None,
) -> DatasetDict:
    """Load a table. A column `label` fills `emotion`; numbers in `label` or `score` fill `sentiment`.

    Args:
        source: see above.
        columns: the table's own names, by the names above: `{"label": "emotion"}`.
        context: maximum number of preceding utterances of the dialogue in each row.
        seed: random seed of the splits, if the table names none.
        splits: the splits that a run wrote down (`corpora.splits.read_splits`), for a table that names none. Rows that
            are not in it belong to `test`; if it has none of the rows, all do, with a warning.
        drop_wrong_rows: whether to log wrong rows and leave them out, instead of raising an error.
        config: configuration of a Hub dataset that has several.

    Raises:
        ValueError: if the source cannot be read, lacks a column, or has wrong rows. The message lists every wrong row
            with its place (up to 100).
        FileNotFoundError: if the source does not exist.
    """
    check_count("context", context)
    check_count("seed", seed)
    check_flag("drop_wrong_rows", drop_wrong_rows)
    if not isinstance(columns, Mapping | None):
        raise ValueError(f"columns: got {columns!r}, wanted a mapping such as {{label: emotion}}")
    columns, found = dict(columns or {}), _Found()
    for name in columns.keys() - set(COLUMNS):
        raise ValueError(f"columns: got {name!r}, wanted some of {', '.join(COLUMNS)}")
    for part in parts_of(str(source), config):
        _read_part(part, columns, found)
    _name_words(found)
    _refuse_unnamed_splits(found)
    if found.wrong:
        more = [f"and {len(found.wrong) - SHOWN} more"] if len(found.wrong) > SHOWN else []
        lines = "\n".join([*found.wrong[:SHOWN], *more])
        total = sum("is_context" not in row for row in found.rows) + len(found.wrong)
        count = f"{len(found.wrong)} of {total} rows are wrong"
        if not drop_wrong_rows:
            wanted = "--corpus_options '{\"drop_wrong_rows\": true}' leaves them out"
            raise ValueError(f"{source}: {count}; correct them ({wanted}):\n{lines}")
        logger.warning("%s: %s and left out:\n%s", source, count, lines)
    _unify_accents(found.rows)
    _name_splits(str(source), found.rows)
    _add_context(found.rows, context)
    rows = [row for row in found.rows if "is_context" not in row]
    if not rows:
        raise ValueError(f"{source}: got no rows, wanted at least one utterance")
    are_scores = _number_labels(rows)
    few = len({row["emotion"] for row in rows}) <= FEW_NUMBERS
    _assign_splits(str(source), rows, seed, splits, spread_labels=not are_scores or few)
    return DatasetDict(
        {split: build_split(_schema_row(row) for row in rows if row["split"] == split) for split in SPLITS}
    )


def load_unlabelled(
    table: str | os.PathLike,
    columns: Mapping[str, str] | None = None,
    context: int = 8,
    speaker: str | None = None,
) -> list[dict[str, Any]]:
    """The rows of a table to be answered; labels are not read.

    Args:
        table: a file as for `load`.
        columns: as for `load`; those that the table lacks are left out.
        context: maximum number of preceding utterances of the dialogue in each row.
        speaker: who speaks in rows that name nobody.

    Returns:
        For each row its `id` (of words alone by default the place, such as "line 3"), `audio`, `video`, `text`,
        `speaker` and `context` as `load` returns them; for a row that cannot be used its place as `id`, and `error`.

    Raises:
        ValueError: if the table cannot be read or has no rows.
    """
    found, rows = [], []
    for where, cells, row in read_cells(Path(table), dict(columns or {}), all_columns=False):
        place = where.rpartition(": ")[2]
        if isinstance(row, WrongRow):
            found.append({"id": place, "error": f"{where}: {row}"})
            continue
        own = (columns or {}).get("split", "split").lower()
        split = next((value for name, value in cells.items() if name.lower() == own), None)
        row |= {"id": row["id"] or place, "speaker": row["speaker"] or speaker, "named_split": split}
        found.append(row)
        rows.append(row)
    if not found:
        raise ValueError(f"{table}: got no rows, wanted at least one utterance")
    _unify_accents(rows)
    _add_context(rows, context)
    return found


# --- from cells to rows ----------------------------------------------------------------------------------------------


def read_cells(
    table: Path, columns: dict[str, str], all_columns: bool = True
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any] | WrongRow]]:
    """The place, the cells and the fields of each row of a table; the fields of a wrong row are its error.

    Labels and splits are not read; the table may have none yet. A row whose cells cannot be told apart has none.

    Args:
        table: the file.
        columns: as for `load`.
        all_columns: whether the table must have all of `columns`.

    Raises:
        ValueError: If the table lacks a column.
    """
    part, places = table_part(table, None), {}
    for place, cells in part.rows:
        where = f"{part.name}: {place}"
        if isinstance(cells, str):
            yield where, {}, WrongRow(cells)
            continue
        if not places:
            if not all_columns:
                there = {name.lower() for name in cells}
                columns = {ours: own for ours, own in columns.items() if own.lower() in there}
            found = _places(part, cells, columns, with_labels=False)
            places = {ours: own for ours, own in found.items() if ours not in ("label", "score", "split")}
        row: dict[str, Any] | WrongRow
        try:
            row = _row(where, {name: cells[own] for name, own in places.items()}, part)
        except WrongRow as error:
            row = error
        yield where, cells, row


def _read_part(part: Part, columns: dict[str, str], found: _Found) -> None:
    places: dict[str, str] = {}
    for place, cells in part.rows:
        where = f"{part.name}: {place}"
        if isinstance(cells, str):
            found.wrong.append(f"{where}: {cells}")
            continue
        if not places:
            places = _places(part, cells, columns)
        try:
            row = _row(where, {name: cells[own] for name, own in places.items()}, part)
            if row["id"] is None:  # words alone, see `_name_words`
                found.rows.append(row)
                continue
            key = os.path.normpath(row["id"])  # a.wav and ./a.wav are one
            if key in found.seen:
                raise WrongRow(f"got {row['id']!r} again ({found.seen[key]}), wanted each clip or id once")
        except WrongRow as error:
            found.wrong.append(f"{where}: {error}")
            if isinstance(error, Unlabelled) and error.row["text"] and error.row["dialogue"]:
                found.add_context(error.row)
            continue
        found.seen[key] = where
        if again := found.unlabelled.pop(key, None):  # another annotator has labelled it
            again["text"] = None
        found.rows.append(row)


def _name_words(found: _Found) -> None:
    """Fills the ids of words alone, whatever their order: a digest of the words; of equal ones also of the speaker."""
    rows = [row for row in found.rows if row["id"] is None and "is_context" not in row]
    times = Counter(row["text"] for row in rows)
    numbers: defaultdict[str, Iterator[int]] = defaultdict(lambda: count(2))
    for row in rows:
        said = row["text"] if times[row["text"]] == 1 else "\n".join(filter(None, (row["speaker"], row["text"])))
        name = "text-" + hashlib.sha256(said.encode()).hexdigest()[:10]
        again = (f"{name}-{number}" for number in numbers[name])
        row["id"] = name if name not in found.seen else next(one for one in again if one not in found.seen)
        found.seen[row["id"]] = row["where"]


def _refuse_unnamed_splits(found: _Found) -> None:
    """If some rows name a split, those that name none are wrong."""
    unnamed = [row for row in found.rows if row["split"] is None and "is_context" not in row]
    if unnamed and len(unnamed) < sum("is_context" not in row for row in found.rows):
        found.wrong += [f"{row['where']}: split: got nothing, wanted one of {', '.join(SPLITS)}" for row in unnamed]
        left_out = {id(row) for row in unnamed}
        found.rows = [row for row in found.rows if id(row) not in left_out]


def _places(part: Part, cells: dict[str, Any], columns: dict[str, str], with_labels: bool = True) -> dict[str, str]:
    """The table's column for each of `COLUMNS` that it has. Logs the columns that are not read."""
    name, header = part.name, list(cells)
    by_name = {own.lower(): own for own in reversed(header)}
    for ours, own in columns.items():
        if own not in header and own.lower() not in by_name:
            raise ValueError(f"{name}: columns: got {ours}: {own!r}, wanted one of its columns {', '.join(header)}")
    columns = {ours: own if own in header else by_name[own.lower()] for ours, own in columns.items()}
    by_name.setdefault("file", by_name.get("file_name"))
    places = {ours: by_name[ours] for ours in COLUMNS if by_name.get(ours)} | columns
    got = f"{name}: got the columns {', '.join(header)}"
    hint = "; other names go into corpus_options: {columns: {label: NAME}}" if with_labels else ""
    if not {"text", *MEDIA} & places.keys():
        raise ValueError(f"{got}, wanted file, audio, video, image or text{hint}")
    if with_labels and not {"label", "score"} & places.keys():
        raise ValueError(f"{got}, wanted label or score{hint}")
    ignored = [own for own in header if own not in places.values()]
    if ignored and with_labels:
        logger.info("%s: not read: %s", name, ", ".join(ignored))
    for own in ignored:  # a column of another name may be meant
        meant = _meaning(own, cells[own], part)
        if meant and meant not in places and (with_labels or meant not in ("label", "split")):
            option = json.dumps({"columns": columns | {meant: own}}, ensure_ascii=False)
            hint = f"--corpus_options '{option}' reads it as {meant}"
            hint = hint if with_labels else f"{meant} is the name that is read"
            logger.warning("%s: the column %s, with %r, is not read; %s", name, own, cells[own], hint)
    return places


def _meaning(name: str, cell: Any, part: Part) -> str | None:
    """The column that one of another name may be, by its name or by a cell."""
    plain = "".join(filter(str.isalpha, name.lower()))
    for ours, names in ALIASES.items():
        if plain in names:
            return ours
    value = cell.strip() if isinstance(cell, str) else ""
    if value.lower() in SPLIT_NAMES and part.split is None:
        return "split"
    try:
        return "file" if media_kind(value) and part.folder is not None and (part.folder / value).is_file() else None
    except OSError:  # words that end like a file's name, and are too long for one
        return None


def _row(where: str, cells: dict[str, Any], part: Part) -> dict[str, Any]:
    """A row with the names of the schema, and what `_schema_row` removes. Words alone get no id.

    Raises:
        WrongRow: For the first cell that is wrong.
    """
    text = {name: None if is_empty(value) else str(value).strip() for name, value in cells.items()}
    row: dict[str, Any] = {name: text.get(name) for name in ("text", "speaker", "dialogue", "language")}
    row |= {name: row[name] and repair_text(row[name]) for name in ("text", "speaker")}
    row["dialogue"] = row["dialogue"] and os.path.join(part.within, row["dialogue"])
    row |= {"where": where, "id": None, "audio": None, "video": None, "recording": None}
    for name in reversed(MEDIA):  # the first one names the row
        if not is_empty(cells.get(name)):
            file = _file(name, cells[name], part.folder)
            row |= dict.fromkeys(_media_columns(name, file), file)
            row |= {"recording": file, "id": _id_of(cells[name], file, part.within)}
    if not row["text"] and not row["recording"]:
        raise WrongRow("got neither words nor a file, wanted one of them")
    if text.get("start") or text.get("end"):
        start, end = _part_of_file(text, row)
        named = ("id", "audio", "video")
        row |= {name: name_part(row[name], start, end) for name in named if row[name] is not None}
    row["id"] = text.get("id") or row["id"]
    row["emotion"] = text.get("label")
    row["sentiment"] = _number("score", text["score"]) if text.get("score") else None
    row["split"] = part.split
    if part.split is None and "split" in cells:
        row["split"] = text["split"] and text["split"].lower()
        if row["split"] is not None and row["split"] not in SPLIT_NAMES:
            raise WrongRow(f"split: got {text['split']}, wanted one of {', '.join(SPLITS)}")
    for name in ("label", "score"):
        if name in cells and not text[name]:
            raise Unlabelled(f"{name}: got nothing, wanted the {name} of the row", row)
    return row


def _id_of(cell: str | dict[str, Any], file: str, within: str) -> str:
    """The id of a clip by default, which is the same on every machine."""
    if isinstance(cell, dict) and cell.get("bytes"):
        return Path(file).name  # the digest of its content
    return os.path.join(within, (cell["path"] if isinstance(cell, dict) else cell).strip())


def _part_of_file(text: dict[str, str | None], row: dict[str, Any]) -> tuple[float | None, float | None]:
    start, end = (_seconds(name, text.get(name)) for name in ("start", "end"))
    if not row["recording"]:
        raise WrongRow(f"start: got {text.get('start') or 0} without a file, wanted the file that the part is in")
    if end is not None and round(end, 3) <= round(start or 0.0, 3):
        raise WrongRow(f"end: got {text['end']}, wanted more than start ({text.get('start') or 0})")
    return start, end


def is_empty(value: Any) -> bool:
    return (
        value is None or isinstance(value, float) and math.isnan(value) or isinstance(value, str) and not value.strip()
    )


def _file(name: str, value: Any, folder: Path | None) -> str:
    """The path of a file; the bytes of a dataset are stored first."""
    if isinstance(value, dict) and value.get("bytes"):
        return store_clip(value["bytes"], Path(value.get("path") or "").suffix)
    value = value.get("path") if isinstance(value, dict) else value
    if not isinstance(value, str):
        raise WrongRow(f"{name}: got {type(value).__name__}, wanted the path of a file or its content")
    if "://" in value:
        raise WrongRow(f"{name}: got the address {value}, wanted a file on this machine")
    if folder is None:
        raise WrongRow(f"{name}: got the path {value} in a dataset of the Hub, wanted the file's content")
    value = value.strip()
    spellings = (value, normalize("NFC", value), normalize("NFD", value))  # of accents, as another system wrote them
    path = next((one for name in spellings if (one := folder / name).is_file()), folder / value)
    if not path.is_file():
        wanted = "a file" if "\\" not in value else "a file, with / between folders"
        raise WrongRow(
            f"{name}: got {value}, {'a folder' if path.is_dir() else 'which does not exist'}, wanted {wanted}"
        )
    if not path.stat().st_size:
        raise WrongRow(f"{name}: got {value}, which is empty, wanted a clip")
    return str(path)


def _media_columns(name: str, file: str) -> tuple[str, ...]:
    """The columns of the schema that a file fills; a video also has the sound of a row without `audio`."""
    if name in ("audio", "image"):
        return ("audio",) if name == "audio" else ("video",)
    columns = media_kind(file)
    if name == "video":
        return tuple(dict.fromkeys((*columns, "video")))
    if not columns:
        wanted = "the suffix of sound, video or an image, or the column audio, video or image"
        raise WrongRow(f"file: got {Path(file).name}, wanted {wanted}")
    return columns


def _number(name: str, text: str) -> float:
    number = read_number(text)
    if number is None:
        raise WrongRow(f"{name}: got {text!r}, wanted a number such as 0.5")
    return number


def _seconds(name: str, text: str | None) -> float | None:
    try:
        return None if text is None else read_time(text)
    except ValueError as error:
        raise WrongRow(f"{name}: {error}") from None


# --- over all rows ---------------------------------------------------------------------------------------------------


def _name_splits(source: str, rows: list[dict]) -> None:
    """Replaces the names of splits by those of the schema, and keeps them as `named_split`."""
    used, meant = {row["split"] for row in rows if "is_context" not in row} - {None}, dict(SPLIT_NAMES)
    mapped = {SPLIT_NAMES[name] for name in used}
    if evaluations := {name for name in used if name.startswith("eval")}:
        if "validation" not in mapped and {SPLIT_NAMES[name] for name in used - evaluations} >= {"test"}:
            meant |= dict.fromkeys(evaluations, "validation")
            logger.warning("%s: split: %s beside test is taken for validation", source, ", ".join(evaluations))
    for row in rows:
        row["split"] = row["named_split"] = row["split"] and meant[row["split"]]


def _assign_splits(
    source: str, rows: list[dict], seed: int, known: Mapping[str, str] | None, spread_labels: bool
) -> None:
    """Fill `split` in all rows."""
    if rows[0]["split"]:
        tested = (row for row in rows if row["split"] == "test") if known else ()
        learned = [row for row in tested if known.get(clip_key(row), "test") != "test"]
        if learned:
            said = "test rows were train or validation rows of this run, such as"
            logger.warning("%s: %d %s %s", source, len(learned), said, learned[0]["where"])
        return
    if known is not None:
        new = [row for row in rows if clip_key(row) not in known]
        for row in rows:
            row["split"] = known.get(clip_key(row), "test")
        learned = sum(row["split"] != "test" for row in rows)
        for kind in ("speaker", "recording"):
            heard = {row[kind] for row in rows if row["split"] != "test"} - {None}
            if same := [row for row in new if row[kind] in heard]:
                said = f"test rows are new, and have a {kind} of train or validation rows of this run, such as"
                logger.warning("%s: %d %s %s", source, len(same), said, same[0]["where"])
        said = f"{learned} of {len(rows)} rows were train or validation rows of this run and are no test rows"
        if not learned:
            said = f"names no splits, and no splits.csv beside the model has its rows: all {len(rows)} are test rows, "
            said += "with those that the model has learned from, if any"
        logger.warning("%s: %s", source, said)
        return
    by = make_splits(rows, seed, spread_labels)
    if by != "row" and (unnamed := [row for row in rows if row[by] is None]):
        taken = f"got nothing in {len(unnamed)} rows, such as {unnamed[0]['where']}"
        logger.warning("%s: %s: %s; nothing keeps them apart from those of the same %s", source, by, taken, by)
    counts = ", ".join(f"{name} {sum(row['split'] == name for row in rows)}" for name in SPLITS)
    logger.info("%s: names no splits; made by %s with seed %d: %s", source, by, seed, counts)


def _unify_accents(rows: list[dict]) -> None:
    """Give names that differ only in how an accent is encoded, as macOS does it, the spelling of the first one."""
    for column in ("emotion", "speaker", "dialogue"):
        spelled: dict[str, str] = {}
        for row in rows:
            if row[column] is not None:
                row[column] = spelled.setdefault(normalize("NFC", row[column]), row[column])


def _number_labels(rows: list[dict]) -> bool:
    """Labels that are all numbers are scores as well; whether they are."""
    numbers = [read_number(row["emotion"]) if row["emotion"] is not None else None for row in rows]
    if None in numbers:
        return False
    if all(row["sentiment"] is None for row in rows):
        for row, number in zip(rows, numbers, strict=True):
            row["sentiment"] = number
    return True


def _add_context(rows: list[dict], context: int) -> None:
    """Fill `context` from the earlier rows of the same dialogue. A dialogue's number may repeat in another split."""
    turns: dict[tuple, list[dict]] = {}
    latest: dict[tuple, float] = {}
    early = []
    for row in rows:
        row["context"] = []
        if row["dialogue"] is not None:
            clip = row["audio"] or row["video"]
            if clip and clip != row["recording"]:  # a part
                key, start = (row["named_split"], row["dialogue"], row["recording"]), split_part(clip)[1]
                early += [row] if start < latest.get(key, 0.0) else []
                latest[key] = max(start, latest.get(key, 0.0))
            said = turns.setdefault((row["named_split"], row["dialogue"]), [])
            row["context"] = said[max(0, len(said) - context) :]
            if row["text"]:
                said.append({"speaker": row["speaker"], "text": row["text"]})
    if early:
        said = "rows of a dialogue start before an earlier row, which is taken for their context; sort the table"
        logger.warning("%d %s (%s)", len(early), said, early[0]["where"])


def _schema_row(row: dict[str, Any]) -> dict[str, Any]:
    left_out = ("where", "dialogue", "split", "recording", "named_split")
    return {name: value for name, value in row.items() if name not in left_out} | {"text": row["text"] or ""}
