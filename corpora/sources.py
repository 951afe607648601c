"""Where the rows of a table come from: a file, a folder of clips or of tables, a saved data set, or the Hub."""

import logging
import mimetypes
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Image, Video
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.videofolder.videofolder import VideoFolder
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from corpora.reading import decode_text, read_csv
from corpora.splits import SPLITS


logger = logging.getLogger(__name__)

SPLIT_NAMES = {name: name for name in SPLITS} | {
    "training": "train",
    **dict.fromkeys(("valid", "val", "dev", "development"), "validation"),
    **dict.fromkeys(("testing", "eval", "evaluation"), "test"),
}
BUILDERS = {".jsonl": "json", ".parquet": "parquet"}
TABLES = (".csv", ".tsv", *BUILDERS)
SHEETS = (".xlsx", ".xls", ".ods")
_SAVED = ("dataset_dict.json", "state.json")  # of `save_to_disk`


@dataclass
class Part:
    """Rows of one file or one split.

    Args:
        name: The file or split, for messages.
        rows: Pairs of a place, such as "line 3", and the cells of the row; the cells are a string with the reason if
            the row could not be read.
        folder: Where relative paths begin; None if the rows must not name files (datasets of the Hub).
        split: The name of the split of all rows, one of `SPLIT_NAMES`, if the source has one.
        within: The folder within the source, if several folders have tables: equal names are different clips and
            dialogues.
    """

    name: str
    rows: Iterator[tuple[str, dict[str, Any] | str]]
    folder: Path | None
    split: str | None = None
    within: str = ""


def parts_of(source: str, config: str | None) -> Iterable[Part]:
    """The parts of a source, which is one of those that `corpora/table.py` lists.

    Args:
        source: the path or the id on the Hub.
        config: configuration of a Hub dataset that has several.

    Raises:
        FileNotFoundError: if the source does not exist.
        ValueError: if it cannot be read.
    """
    path = Path(source)
    if path.is_file():
        return [table_part(path, None)]
    if path.is_dir() and any((path / name).is_file() for name in _SAVED):
        return _splits_of(datasets.load_from_disk(source), path)
    if path.is_dir():
        return _folder(path)
    if path.suffix.lower() in TABLES or not _is_id(source):
        wanted = f"a table ({', '.join(TABLES)}), a folder or the id of a dataset on the Hub"
        raise FileNotFoundError(f"{source}: no such file or folder, wanted {wanted}")
    where = f"{source} is no file or folder here, and on the Hub"
    return _splits_of(_loaded(where, source, name=config), None)


def _folder(folder: Path) -> list[Part]:
    """Tables or clips in a folder. Names of folders and of tables may say the split, as `datasets` reads them."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    tables = [file for file in files if file.name in AudioFolder.METADATA_FILENAMES]
    tables = tables or [file for file in files if file.suffix.lower() in TABLES]
    if sheets := [file.name for file in files if file.suffix.lower() in SHEETS]:
        logger.warning("%s: %s is not read; save it as CSV", folder, sheets[0])
    splits = {file: _split_word(file.relative_to(folder).parts) for file in tables}
    one = len({name and SPLIT_NAMES[name] for name in splits.values()}) == 1  # then it is no division
    if tables:
        several = len({file.parent for file in tables}) > 1
        within = [file.parent.relative_to(folder).as_posix() if several else "" for file in tables]
        pairs = zip(tables, within, strict=True)
        return [replace(table_part(file, None if one else splits[file]), within=own) for file, own in pairs]
    return [Part(str(folder), _clip_rows(folder, files), folder)]


def _clip_rows(folder: Path, files: list[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Clips whose folder is their label, and the folder around it their split."""
    clips = [file.relative_to(folder) for file in files if media_kind(file.name)]
    splits = {clip: _split_word(clip.parts[:-2]) for clip in clips}
    divided = len({name and SPLIT_NAMES[name] for name in splits.values()}) > 1
    for clip in clips:
        label = clip.parts[-2] if len(clip.parts) > 1 + divided else None
        cells = {"file": str(clip), "label": label}
        yield str(clip), cells | ({"split": splits[clip]} if divided else {})


def _split_word(parts: Iterable[str]) -> str | None:
    """The word in the names of nested folders and files that names a split; that of the innermost one counts."""
    words = [word for part in list(parts)[::-1] for word in re.split("[^a-z]+", part.lower())]
    return next((word for word in words if word in SPLIT_NAMES), None)


def _is_id(source: str) -> bool:
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def _loaded(source: str, *arguments, **options) -> Any:
    """Call `datasets.load_dataset` without progress bars; its errors become one line that names the source."""
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(*arguments, **options)
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ValueError(f"{source}: got no dataset that can be read ({type(error).__name__}: {reason})") from error
    finally:
        if not shown:
            datasets.enable_progress_bars()


def _splits_of(loaded: Dataset | DatasetDict, folder: Path | None) -> Iterator[Part]:
    """The parts of what `datasets` loaded. The only split of a dataset is not taken as a split."""
    parts = {"": loaded} if isinstance(loaded, Dataset) else dict(loaded)
    for name, rows in parts.items():
        if len(parts) > 1 and name not in SPLIT_NAMES:
            raise ValueError(f"split: got {name!r} in the dataset, wanted some of {', '.join(SPLIT_NAMES)}")
        yield Part(name or "dataset", _dataset_rows(rows), folder, name if len(parts) > 1 else None)


def _dataset_rows(rows: Dataset) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with undecoded media; the numbers of a `ClassLabel` become its names."""
    names = {}
    for column, feature in rows.features.items():
        if isinstance(feature, Audio | Image | Video):
            rows = rows.cast_column(column, type(feature)(decode=False))
        elif isinstance(feature, ClassLabel):
            names[column] = feature.int2str
    for number, row in enumerate(rows, 1):
        for column, name_of in names.items():
            row[column] = name_of(row[column]) if row[column] not in (None, -1) else None
        yield f"row {number}", row


def table_part(file: Path, split: str | None) -> Part:
    """The rows of a table in a file; `split` is that of all rows, if its name says so."""
    suffix = file.suffix.lower()
    if suffix in BUILDERS:
        if suffix == ".jsonl" and not decode_text(file).strip():
            raise ValueError(f"{file}: got an empty file, wanted one row in each line")
        rows = _dataset_rows(_loaded(str(file), BUILDERS[suffix], data_files=str(file), split="train"))
    elif suffix in (".csv", ".tsv"):
        rows = ((f"line {line}", cells) for line, cells in read_csv(file)[1])
    else:
        raise ValueError(f"{file}: got a file *{suffix}, wanted a table ({', '.join(TABLES)})")
    return Part(str(file), rows, file.parent, split)


def media_kind(file: str) -> tuple[str, ...]:
    """The columns that a file fills, by its suffix; none if it is not media."""
    suffix, kind = Path(file).suffix.lower(), (mimetypes.guess_type(file)[0] or "").partition("/")[0]
    if kind == "video" or suffix in VideoFolder.EXTENSIONS:
        return "audio", "video"
    if kind == "audio" or suffix in AudioFolder.EXTENSIONS:
        return ("audio",)
    return ("video",) if kind == "image" or suffix in ImageFolder.EXTENSIONS else ()
