"""What a corpus contains, in lines of text, and what its author should look at before training."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import av
import soundfile
from datasets import Dataset, DatasetDict

from corpora.clips import split_part
from corpora.schema import FEATURE_COLUMNS


LABELS_SHOWN = 20


def describe_corpus(corpus: DatasetDict) -> list[str]:
    """Lines with rows, speakers, labels and lengths of each split. Only the headers of media files are read."""
    lines = []
    for split, rows in corpus.items():
        speakers = {speaker for speaker in rows["speaker"][:] if speaker}
        lines.append(f"{split}: {len(rows)} rows" + (f", {len(speakers)} speakers" if speakers else ""))
        if not len(rows):
            continue
        labels = Counter(label for label in rows["emotion"][:] if label is not None)
        if labels:
            shown = ", ".join(f"{label} {count}" for label, count in labels.most_common(LABELS_SHOWN))
            lines.append(f"  labels: {shown}{', ...' if len(labels) > LABELS_SHOWN else ''}")
        scores = [score for score in rows["sentiment"][:] if score is not None]
        if scores:
            lines.append(f"  scores: {_spread(scores)}")
        words = [len(text.split()) for text in rows["text"][:] if text and text.strip()]
        if words:
            lines.append(f"  text: in {len(words)} rows, words {_spread(words)}")
        paths = {column: [path for path in rows[column][:] if path is not None] for column in ("audio", "video")}
        lengths_of = {path: seconds_of(path) for path in set(paths["audio"] + paths["video"])}
        for column, own in paths.items():
            seconds = [lengths_of[path] for path in own]
            known = [value for value in seconds if value]
            if seconds:
                lengths = f", seconds {_spread(known)}" if known else ""
                lines.append(f"  {column}: in {len(seconds)} rows{lengths}")
        lines += [f"  {column}: in {count} rows" for column, count in _features(rows) if count]
    return lines


def find_doubts(corpus: DatasetDict) -> list[str]:
    """Lines about what is legal but often a mistake; each names its rows."""
    return [*_copies(corpus), *_rare_labels(corpus), *_similar_labels(corpus)]


def seconds_of(name: str) -> float | None:
    """The length of a file, or of a part of one, as its header states it; None if it states none."""
    path, start, end = split_part(name)
    if end is not None:
        return end - start
    try:
        return max(0.0, soundfile.info(path).duration - start)
    except (RuntimeError, OSError):
        pass
    try:
        with open(path, "rb") as file, av.open(file, options={"protocol_whitelist": "none"}) as container:
            return max(0.0, container.duration / 1e6 - start) if container.duration else None
    except (av.FFmpegError, OSError):
        return None


def _spread(values: Iterable[float]) -> str:
    values = list(values)
    return f"{min(values):.3g} to {max(values):.3g}, median {median(values):.3g}"


def _features(rows: Dataset) -> list[tuple[str, int]]:
    tables = {column: rows.data.column(column) for column in FEATURE_COLUMNS}
    return [(column, len(table) - table.null_count) for column, table in tables.items()]


def _copies(corpus: DatasetDict) -> list[str]:
    """Clips that are in two splits, also under another name. Only files of equal size are compared."""
    clips: dict[Any, list[tuple[str, str, str]]] = defaultdict(list)  # (size, part) -> split, id and path
    for split, rows in corpus.items():
        for row_id, *files in zip(rows["id"][:], rows["audio"][:], rows["video"][:], strict=True):
            for name in {file for file in files if file is not None}:
                path, start, end = split_part(name)
                clips[Path(path).stat().st_size, start, end].append((split, row_id, path))
    lines = []
    for similar in clips.values():
        first: dict[str, tuple[str, str]] = {}
        for split, row_id, path in similar if len({split for split, *_ in similar}) > 1 else ():
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            before, before_id = first.setdefault(digest, (split, row_id))
            if before != split:
                lines.append(f"the same clip is in {before} ({before_id}) and in {split} ({row_id})")
    return lines


def _rare_labels(corpus: DatasetDict) -> list[str]:
    rows_of = defaultdict(lambda: defaultdict(list))
    for split, rows in corpus.items():
        for row_id, label in zip(rows["id"][:], rows["emotion"][:], strict=True):
            if label is not None:
                rows_of[label][split].append(row_id)
    lines = []
    for label, by_split in rows_of.items():
        total = sum(map(len, by_split.values()))
        if total == 1:
            [(split, [row_id])] = by_split.items()
            lines.append(f"label {label!r} has one clip: {row_id} in {split}")
        elif not by_split["train"]:
            lines.append(f"label {label!r} has {total} clips, none of them in train, such as {_first(by_split)}")
    return lines


def _first(by_split: dict[str, list[str]]) -> str:
    return next(ids[0] for ids in by_split.values() if ids)


def _similar_labels(corpus: DatasetDict) -> list[str]:
    spelled = defaultdict(set)
    for rows in corpus.values():
        for label in rows.unique("emotion"):
            if label is not None:
                spelled["".join(filter(str.isalnum, label.casefold())) or label].add(label)
    return [f"labels {', '.join(map(repr, sorted(same)))} look like one" for same in spelled.values() if len(same) > 1]
