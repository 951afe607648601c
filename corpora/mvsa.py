"""MVSA (Niu et al. 2016, MMM): tweets with one image each, labelled positive, neutral or negative.

Two forms are read:

- As published: `data/ID.txt` and `data/ID.jpg`, and a table of labels, `labelResultAll.txt` (`ID<tab>text,image`: a
  label for the text and one for the image; in MVSA-Multiple by each of three annotators, of whom the majority counts)
  or `train.txt` (`guid,tag`: one label). Of two labels, neutral gives way to the other; a tweet with a positive and a
  negative label, or without a majority, is left out, as in the literature.
- `mvsa.parquet` with the columns `id`, `text`, `sentiment`, `fold` (1 to 5) and `vision_features` (2,560 values: two
  frames of 1,280, the mean and the maximum of an image encoder's last map).

The picture is a video of one frame. There are five folds, of the parquet's column or by a digest of the text, so that
equal texts share a fold. One is the test split, the next the validation split.
"""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from datasets import DatasetDict

from corpora.reading import decode_text, fold_splits
from corpora.schema import build_split


LABELS = ("positive", "neutral", "negative")
FOLDS, WIDTH = 5, 1280


def load(source: str | os.PathLike, fold: int = 1, validation: bool = True) -> DatasetDict:
    """Load MVSA as classification over `LABELS`.

    Args:
        source: the folder in one of the two forms.
        fold: 1 to 5; the fold that is the test split.
        validation: whether to make a validation split. If False, it is empty and all other folds are in train.

    Raises:
        FileNotFoundError: if the folder has no table, or a text is missing.
        ValueError: if `fold` is out of range, a label is unknown, or the table is malformed.
    """
    splits = fold_splits(fold, FOLDS, validation)
    rows: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    parquet = Path(source) / "mvsa.parquet"
    for number, row in _parquet_rows(parquet) if parquet.is_file() else _published_rows(Path(source)):
        if row["emotion"] not in LABELS:
            raise ValueError(f"{row['id']}: got the label {row['emotion']!r}, wanted one of {', '.join(LABELS)}")
        rows[splits[number]].append({"language": "en"} | row)
    return DatasetDict({split: build_split(found) for split, found in rows.items()})


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict]]:
    table, seen = pq.read_table(path), set()
    if missing := {"id", "text", "sentiment", "fold", "vision_features"} - set(table.column_names):
        raise ValueError(f"{path}: got no column {', '.join(sorted(missing))}, wanted it")
    for place, row in enumerate(table.to_pylist()):
        values = np.asarray(row["vision_features"], np.float32)
        if row["fold"] not in range(1, FOLDS + 1) or not values.size or values.size % WIDTH:
            got = f"fold {row['fold']} and {values.size} features"
            raise ValueError(f"{path}: row {place}: got {got}, wanted 1 to {FOLDS} and a multiple of {WIDTH}")
        if row["id"] in seen:
            raise ValueError(f"{path}: row {place}: got the id {row['id']} again, wanted each tweet once")
        seen.add(row["id"])
        frames = values.reshape(-1, WIDTH)
        yield (
            row["fold"],
            {
                "id": str(row["id"]),
                "text": row["text"],
                "emotion": row["sentiment"],
                "vision_features": frames,
            },
        )


def _majority(labels: list[str]) -> str | None:
    [(label, count)] = Counter(labels).most_common(1)
    return label if 2 * count > len(labels) else None


def _published_rows(source: Path) -> Iterator[tuple[int, dict]]:
    tables = [source / name for name in ("labelResultAll.txt", "train.txt") if (source / name).is_file()]
    if not tables:
        raise FileNotFoundError(f"{source}: no mvsa.parquet, labelResultAll.txt or train.txt, wanted MVSA's folder")
    contradictory = 0  # or without a majority
    for line in decode_text(tables[0]).splitlines()[1:]:
        name, _, labels = line.replace("\t", ",").partition(",")
        given = list(filter(None, labels.replace(" ", "").split(",")))
        # Text and image by turns; MVSA-Multiple has the labels of three annotators.
        found = {_majority(given[place::2]) for place in range(min(2, len(given)))}
        found -= {"neutral"} if len(found) > 1 else set()
        if len(found) != 1 or None in found:
            contradictory += 1
            continue
        text = (source / "data" / f"{name}.txt").read_text(encoding="utf-8", errors="replace").strip()
        image = source / "data" / f"{name}.jpg"
        number = int.from_bytes(hashlib.sha256(text.lower().encode()).digest()[:4]) % FOLDS + 1
        yield (
            number,
            {
                "id": name,
                "text": text,
                "emotion": found.pop(),
                "video": str(image) if image.is_file() else None,
            },
        )
    if contradictory:
        logging.info("mvsa: %d tweets with contradictory labels are left out", contradictory)
