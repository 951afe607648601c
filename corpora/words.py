"""Fills the words of a table's clips that have none, with those that a speech recognition model hears."""

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from corpora.sources import TABLES
from corpora.table import WrongRow, is_empty, read_cells


RECOGNIZED_BY = "recognized_by"  # the column that names the model


@dataclass
class Words:
    """What [`add_words`] did: numbers of rows, and one line for each row that it could not help."""

    rows: int = 0
    recognized: int = 0
    silent: int = 0
    wrong: list[str] = field(default_factory=list)


def add_words(
    source: Path, out: Path, recognize: Callable[[str], dict], columns: Mapping[str, str] | None = None
) -> Words:
    """Write a copy of a table, as CSV, in which the clips without words have recognised ones.

    All other cells stay as they are. The new column `recognized_by` names the model where it was used. Rows whose
    clip cannot be read stay without words.

    Args:
        source: a table as in `corpora/table.py`.
        out: the new file, in the folder of the table, because paths in it are relative to that folder.
        recognize: returns `text` and `recognized_by` for the name of a file or of a part of one. Its RuntimeErrors and
            OSErrors say what is wrong with a file.
        columns: the table's own names of columns, as for `load`.

    Raises:
        ValueError: if the table cannot be read, or has clips inside it.
        FileExistsError: if `out` exists.
    """
    if not source.is_file() or source.suffix.lower() not in TABLES:
        raise ValueError(f"{source}: got no table, wanted a file {', '.join(f'*{suffix}' for suffix in TABLES)}")
    if out.exists():
        raise FileExistsError(f"{out}: is there already, wanted a new file")
    if out.suffix.lower() != ".csv" or out.resolve().parent != source.resolve().parent:
        raise ValueError(f"out: got {out}, wanted a file *.csv in {source.parent}: paths in it are relative to it")
    read = list(read_cells(source, dict(columns or {})))
    for where, cells, row in read:
        if not cells:
            raise ValueError(f"{where}: {row}")
    done, rows, own = Words(), [], (columns or {}).get("text", "text")
    for where, cells, row in tqdm(read, desc="recognising", unit="row"):
        column = own if own in cells else next((name for name in cells if name.lower() == own.lower()), own)
        if inside := [name for name, value in cells.items() if isinstance(value, bytes | dict | list)]:
            raise ValueError(f"{where}: {inside[0]}: got content that CSV cannot hold, wanted the path of a file")
        cells = {name: "" if is_empty(value) else str(value) for name, value in cells.items()}
        cells = cells | {column: cells.get(column, ""), RECOGNIZED_BY: cells.get(RECOGNIZED_BY, "")}
        rows.append(cells)
        if isinstance(row, WrongRow):
            done.wrong.append(f"{where}: {row}")
        elif not row["text"] and row["audio"]:
            try:
                found = recognize(row["audio"])
            except (RuntimeError, OSError) as error:
                done.wrong.append(f"{where}: {error}")
                continue
            if found.get("text"):
                cells |= {column: found["text"], RECOGNIZED_BY: found["recognized_by"]}
                done.recognized += 1
            else:
                done.silent += 1
    done.rows = len(rows)
    _write(out, rows)
    return done


def _write(out: Path, rows: list[dict[str, str]]) -> None:
    names = list(dict.fromkeys(name for cells in rows for name in cells))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with open(out, "x", encoding="utf-8", newline="") as file:
        file.write(text.getvalue())
