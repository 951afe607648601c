"""Reads the folders that `python -m corpora` writes: `corpus.json` and sharded parquet."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from datasets import DatasetDict, load_dataset

from corpora.schema import FEATURES


REPORT, LOCAL = "corpus.json", "local.json"  # report; local path of the clips
SHARDS = "data/*.parquet"
SPLITS = ("train", "validation", "test")


def is_converted(folder: str | os.PathLike) -> bool:
    return (Path(folder) / REPORT).is_file()


def load_converted(name: str, folder: str | os.PathLike, media: str | os.PathLike | None = None, **options: Any):
    """Load a converted corpus as a memory-mapped `DatasetDict`.

    Args:
        name: Name of the corpus; must match the report in the folder.
        folder: The converted folder.
        media: The folder with the clips; by default the folder that was used for the conversion.
        **options: Options of the conversion. They are only checked, because the conversion has fixed them.

    Raises:
        ValueError: If the folder holds another corpus, was converted with other options, contains labels that do not
            belong to the corpus, or is damaged.
        FileNotFoundError: If a file of the folder, or the folder with the clips, does not exist.
    """
    folder = Path(folder)
    report = _read_json(folder / REPORT)
    if report.get("corpus") != name:
        raise ValueError(f"{folder}: got the corpus {report.get('corpus')!r}, wanted {name!r}")
    for option, value in options.items():
        if report.get("options", {}).get(option) != value:
            got = report["options"].get(option) if option in report.get("options", {}) else "no such option"
            raise ValueError(f"{option}: got {value!r}, wanted {got!r}, with which {folder} was converted")
    files = {split: [str(folder / file) for file in report["splits"][split]["files"]] for split in SPLITS}
    for file in sum(files.values(), []):
        if not Path(file).is_file():
            raise FileNotFoundError(f"{file}: no such file, wanted all files listed in {folder / REPORT}")
    splits = load_dataset("parquet", data_files=files, columns=[*FEATURES], features=FEATURES)
    for split, rows in splits.items():
        if len(rows) != report["splits"][split]["rows"]:
            raise ValueError(f"{folder}: {split}: got {len(rows)} rows, wanted {report['splits'][split]['rows']}")
        check_labels(name, rows, f"{folder}: {split}")
    if media is not None and not report["clips"]:
        raise ValueError(f"media: got {str(media)!r}, wanted none: {folder} has no clips")
    if report["clips"]:
        media = Path(media or _read_json(folder / LOCAL)["media"])
        if not media.is_dir():
            raise FileNotFoundError(f"media: {media} is not a folder, wanted the folder with the clips")
        splits = splits.map(_find_clips, fn_kwargs={"media": str(media)}, batched=True, keep_in_memory=True)
    return DatasetDict({split: splits[split] for split in SPLITS})


def check_labels(name: str, rows, where: str) -> None:
    """Raise a ValueError if a split contains a label or a score that does not belong to the corpus."""
    module = importlib.import_module(f"corpora.{name}")
    if hasattr(module, "EMOTIONS"):
        wrong = [label for label in rows.unique("emotion") if label not in module.EMOTIONS]
        if wrong:
            raise ValueError(f"{where}: got the label {wrong[0]!r}, wanted one of {', '.join(module.EMOTIONS)}")
    else:
        scores = rows.data.column("sentiment").to_numpy()
        low, high = np.float32(module.SCORES)
        if not (np.isfinite(scores).all() and (scores >= low).all() and (scores <= high).all()):
            raise ValueError(f"{where}: got scores of another range, wanted {low:g} to {high:g}")


def _find_clips(rows: dict[str, list], media: str) -> dict[str, list]:
    return {
        column: [None if path is None else os.path.join(media, path) for path in rows[column]]
        for column in ("audio", "video")
    }


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file, wanted the folder that `python -m corpora` wrote") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: got no readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: got {type(content).__name__}, wanted a dict")
    return content
