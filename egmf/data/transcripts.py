"""Reads tables, such as those of transcripts, in the formats that spreadsheet programs save."""

from collections.abc import Iterator
from pathlib import Path

from corpora.reading import read_csv


COLUMNS = ("file", "text", "speaker")  # the last one may be missing


def read_table(path: Path, required: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
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


def read_transcripts(path: Path) -> dict[str, dict[str, str]]:
    """Reads a table; returns `text` (and `speaker`) by file name as written in the table.

    Raises:
        ValueError: If the table is malformed or ambiguous. The message names the line and what was wanted.
    """
    transcripts: dict[str, dict[str, str]] = {}
    for line, row in read_table(path, COLUMNS[:2]):
        if not row["file"]:
            raise ValueError(f"{path}: line {line}: got no file, wanted its path or its name")
        if row["file"] in transcripts:
            raise ValueError(f"{path}: line {line}: {row['file']} is there twice, wanted one line per file")
        transcripts[row["file"]] = {name: row[name] for name in COLUMNS[1:] if row.get(name)}
    return transcripts


def match_transcripts(path: Path, files: list[str]) -> list[dict[str, str]]:
    """Returns the entry of [`read_transcripts`] for each file, found by its path as given or else by its name.

    Raises:
        ValueError: If a file has no line, or if one line matches several files of the same name.
    """
    transcripts = read_transcripts(path)
    found, used = [], {}
    for file in files:
        key = next((key for key in (file, Path(file).name) if key in transcripts), None)
        if key is None:
            raise ValueError(f"{path}: got no line for {file}, wanted its path or its name in column file")
        if used.setdefault(key, file) != file:
            wanted = "a line with the path of each"
            raise ValueError(f"{path}: got one line {key} for {used[key]} and {file}, wanted {wanted}")
        found.append(transcripts[key])
    return found
