"""Reads the words and speakers of files from a table."""

from pathlib import Path

from corpora.reading import read_rows


COLUMNS = ("file", "text", "speaker")  # the last one may be missing


def read_transcripts(path: Path) -> dict[str, dict[str, str]]:
    """Reads a table; returns `text` (and `speaker`) by file name as written in the table.

    Raises:
        ValueError: If the table is malformed or ambiguous. The message names the line and what was wanted.
    """
    transcripts: dict[str, dict[str, str]] = {}
    for line, row in read_rows(path, COLUMNS[:2]):
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
