"""Reads tables of transcripts in the formats that spreadsheet programs save."""

import codecs
import csv
import io
from pathlib import Path


DELIMITERS = ",;\t|"
COLUMNS = ("file", "text", "speaker")  # the last one may be missing
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_transcripts(path: Path) -> dict[str, dict[str, str]]:
    """Reads a table; returns `text` (and `speaker`) by file name as written in the table.

    The delimiter is the one that splits the header into the known columns. The header is case-insensitive. The
    encoding is UTF-8, or UTF-16 with a byte order mark.

    Raises:
        ValueError: If the table is malformed or ambiguous. The message names the line and what was wanted.
    """
    content = _decoded(path)
    lines = csv.reader(io.StringIO(content, newline=""), delimiter=_delimiter(path, content), strict=True)
    header = [name.strip().lower() for name in next(lines)]
    transcripts: dict[str, dict[str, str]] = {}
    begin = lines.line_num + 1
    while True:
        try:
            cells = next(lines, None)
        except csv.Error as error:
            wanted = "every opening quote closed, and quotes inside a text doubled"
            raise ValueError(f"{path}: line {begin}: got a faulty quote ({error}), wanted {wanted}") from None
        if cells is None:
            return transcripts
        if any(cells):
            if len(cells) != len(header):
                wanted = f"{len(header)}, as in the header: put a text with the delimiter in it into double quotes"
                raise ValueError(f"{path}: line {begin}: got {len(cells)} cells, wanted {wanted}")
            row = dict(zip(header, cells, strict=True))
            if not row["file"]:
                raise ValueError(f"{path}: line {begin}: got no file, wanted its path or its name")
            if row["file"] in transcripts:
                raise ValueError(f"{path}: line {begin}: {row['file']} is there twice, wanted one line per file")
            transcripts[row["file"]] = {name: row[name] for name in COLUMNS[1:] if row.get(name)}
        begin = lines.line_num + 1


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


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        got = f"a byte 0x{content[error.start]:02x} that is not {encoding.upper()}"
        raise ValueError(f"{path}: line {line}: got {got}, wanted the table saved as UTF-8") from None


def _delimiter(path: Path, content: str) -> str:
    first = content.split("\n", 1)[0].strip()
    for delimiter in DELIMITERS:
        names = [name.strip().lower() for name in next(csv.reader([first], delimiter=delimiter), [])]
        if set(COLUMNS[:2]) <= set(names):
            if repeated := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"{path}: line 1: got {sorted(repeated)} twice, wanted each column once")
            return delimiter
    raise ValueError(f"{path}: line 1: got {first[:100]!r}, wanted a header with the columns file and text")
