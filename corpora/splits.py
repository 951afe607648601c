"""Splits for a table that names none."""

import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import DatasetDict

from corpora.clips import split_part


SPLITS = ("train", "validation", "test")
SHARES = (0.7, 0.15, 0.15)
KINDS = ("speaker", "dialogue", "recording")  # of groups, by preference
SPLITS_FILE = "splits.csv"  # in the folder of a run
MOST_LABELS = 100  # that are spread; the table of groups and labels must fit into memory
_LEARNED = ("text", "speaker", "language", "context", "emotion", "sentiment")  # beside the clip


def make_splits(rows: Sequence[dict[str, Any]], seed: int, spread_labels: bool = True) -> str:
    """Fill `split` in all rows. Rows of one group stay together, and labels are spread as evenly as possible.

    The groups are the speakers. If no row has a speaker, or all have the same, the groups are the dialogues, or else
    the recordings. A row without this key is grouped by the next key. A row without any key is a group of its own, but
    rows that have words alone form one group if their words are equal, so that equal texts share a split. Train gets
    70 % of the rows, validation and test 15 % each, as far as whole groups allow; test and then validation get at
    least one group while train keeps one.

    Args:
        rows: Rows with `speaker`, `dialogue` and `recording` (None if unknown) and `emotion` (None for scores).
        seed: Seed of the order of the groups.
        spread_labels: Whether the labels are classes. If they are numbers, each would be a class of its own. More than
            `MOST_LABELS` labels are not spread.

    Returns:
        The kind of groups: "speaker", "dialogue", "recording" or "row".
    """
    by = next((name for name in KINDS if len({row[name] for row in rows} - {None}) > 1), "row")
    kinds = KINDS[KINDS.index(by) :] if by in KINDS else ()
    keys = [
        next(((kind, row[kind]) for kind in kinds if row[kind] is not None), _words_or(row, number))
        for number, row in enumerate(rows)
    ]
    spread_labels = spread_labels and len({row["emotion"] for row in rows}) <= MOST_LABELS
    classes = [row["emotion"] if spread_labels else None for row in rows]
    groups = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    labels = {label: place for place, label in enumerate(dict.fromkeys(classes))}
    counts = np.zeros((len(groups), len(labels)))  # rows of each group and label
    for key, label in zip(keys, classes, strict=True):
        counts[groups[key], labels[label]] += 1
    chosen = _divide(counts, np.random.default_rng(seed))
    for key, row in zip(keys, rows, strict=True):
        row["split"] = SPLITS[chosen[groups[key]]]
    return by


def _words_or(row: Mapping[str, Any], number: int) -> tuple[str, Any]:
    """The group of a row without others: rows of words alone with the same words, or the row."""
    words = " ".join((row.get("text") or "").casefold().split())
    return ("row", number) if row.get("audio") or row.get("video") or not words else ("text", words)


def clip_key(row: Mapping[str, Any]) -> str:
    """What names a row in a file of splits: its id, with the size of its file or a digest of its words alone.

    Rows of another table may have the same id.
    """
    file = row["audio"] or row["video"]
    own = hashlib.sha256((row["text"] or "").encode(errors="surrogatepass")).hexdigest()[:10] if file is None else None
    return f"{os.path.normpath(row['id'])} {own or os.path.getsize(split_part(file)[0])}"


def write_splits(file: str | os.PathLike, corpus: DatasetDict) -> None:
    """Write the split of all rows as CSV, with a digest of what else a model learns from a row.

    Raises:
        ValueError: If the file is there already, and has other rows, splits or contents.
    """
    found = {
        clip_key(row): {"split": split, "content": _digest(row)}
        for split, rows in corpus.items()
        for row in rows.select_columns(["id", "audio", "video", *_LEARNED])
    }
    if os.path.isfile(file):
        known = _read(file)
        same = [key for key, row in known.items() if found.get(key) == row]
        changed = len(found.keys() | known.keys()) - len(same)
        if changed:
            got = f"{changed} rows that are new, gone, changed or in another split since the run began"
            raise ValueError(f"{file}: got {got}, wanted another output_dir for another table")
        return
    with open(file, "w", encoding="utf-8", newline="") as target:
        writer = csv.DictWriter(target, ("clip", "split", "content"))
        writer.writeheader()
        writer.writerows({"clip": key} | row for key, row in found.items())


def read_splits(file: str | os.PathLike) -> dict[str, str]:
    """The split of each row by [`clip_key`], from a file of [`write_splits`]; empty if there is none."""
    return {key: row["split"] for key, row in _read(file).items()} if os.path.isfile(file) else {}


def _read(file: str | os.PathLike) -> dict[str, dict[str, str]]:
    with open(file, encoding="utf-8", newline="") as source:
        return {os.path.normpath(row.pop("clip")): row for row in csv.DictReader(source)}


def _digest(row: Mapping[str, Any]) -> str:
    content = json.dumps([row[name] for name in _LEARNED], ensure_ascii=False)
    return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()[:16]


def _divide(counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The split of each group (groups,), as an index into `SPLITS`, from its rows by label (groups, labels)."""
    order = rng.permutation(len(counts))
    order = order[np.argsort(-counts.sum(1)[order], kind="stable")]  # large groups first: small ones fill the gaps
    wanted = np.outer(SHARES, counts.sum(0))  # (splits, labels)
    chosen = np.zeros(len(counts), int)
    for group in order:
        # The squared distance to what is wanted falls most in the split that lacks most of the group's labels.
        gains = (wanted * counts[group]).sum(1) - (counts[group] ** 2).sum() / 2
        chosen[group] = int(np.argmax(gains))
        wanted[chosen[group]] -= counts[group]
    for split in (2, 1):
        sizes = Counter(chosen.tolist())
        if not sizes[split] and sizes[0] > 1:
            chosen[next(group for group in reversed(order) if chosen[group] == 0)] = split
    return chosen
