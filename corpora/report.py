"""What a corpus contains, in lines of text, and what its author should look at before training."""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import av
import soundfile
from datasets import Dataset, DatasetDict

from corpora.clips import split_part
from corpora.schema import FEATURE_COLUMNS


LABELS_SHOWN = 20
MISSING = {"NA", "N/A", "#N/A", "NaN", "nan", "NULL", "null", "None", "-"}
LATE = 1.0  # seconds by which a part may end behind its file


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
    doubts = [*_copies(corpus), *_lengths(corpus), *_silent(corpus), *_nothing(corpus), *_rare_labels(corpus)]
    return doubts + [
        *_similar("labels", corpus, "emotion"),
        *_similar("speakers", corpus, "speaker"),
        *_shared(corpus),
    ]


def seconds_of(name: str) -> float | None:
    """The length of a file, or of a part of one, as its header states it; None if it states none."""
    path, start, end = split_part(name)
    whole = _header(path)[0]
    if whole is None:
        return None if end is None else end - start
    return max(0.0, min(whole, whole if end is None else end) - start)


def has_sound(name: str) -> bool:
    """Whether a file has a sound track, or cannot be opened, which is said elsewhere."""
    return _header(split_part(name)[0])[1]


@cache
def _header(path: str) -> tuple[float | None, bool]:
    """The length in seconds that a file states, and whether it has a sound track."""
    try:
        return soundfile.info(path).duration, True
    except (RuntimeError, OSError):
        pass
    options: dict[str, Any] = {"options": {"protocol_whitelist": "none"}, "metadata_errors": "replace"}
    try:
        with open(path, "rb") as file, av.open(file, **options) as container:
            return container.duration / 1e6 if container.duration else None, bool(container.streams.audio)
    except (av.FFmpegError, OSError):
        return None, True


def _spread(values: Iterable[float]) -> str:
    values = list(values)
    shown = [
        f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}" for value in (min(values), max(values), median(values))
    ]
    return f"{shown[0]} to {shown[1]}, median {shown[2]}"


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
                if Path(path).is_file():  # a clip of a converted corpus may be missing
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


def _lengths(corpus: DatasetDict) -> list[str]:
    """Clips of no length: files without sound, and parts behind the end of their file."""
    empty = [
        row_id
        for rows in corpus.values()
        for row_id, file in zip(rows["id"][:], rows["audio"][:], strict=True)
        if file is not None and seconds_of(file) == 0
    ]
    late = [
        row_id
        for rows in corpus.values()
        for row_id, audio, video in zip(rows["id"][:], rows["audio"][:], rows["video"][:], strict=True)
        if _is_late(audio or video)
    ]
    found = {"clips without sound, or with a start behind the end of their file": empty}
    known = set(empty)
    found["clips with an end behind that of their file"] = [row_id for row_id in late if row_id not in known]
    return [f"{what}: {len(rows)}, such as {rows[0]}" for what, rows in found.items() if rows]


def _is_late(name: str | None) -> bool:
    path, _, end = split_part(name) if name is not None else ("", 0.0, None)
    return end is not None and end > (_header(path)[0] or math.inf) + LATE


def _silent(corpus: DatasetDict) -> list[str]:
    """Files that should have sound and have no sound track."""
    named = (file for rows in corpus.values() for file in rows["audio"][:] if file is not None)
    files = sorted({split_part(file)[0] for file in named})
    silent = [file for file in files if not has_sound(file)]
    return [f"files without a sound track: {len(silent)} of {len(files)}, such as {silent[0]}"] if silent else []


def _nothing(corpus: DatasetDict) -> list[str]:
    """Cells that programs write for a missing value, and that are words here."""
    found: dict[tuple[str, str], int] = Counter()
    for rows in corpus.values():
        for column, ours in (("text", "text"), ("speaker", "speaker"), ("emotion", "label")):
            for value in rows[column][:]:
                if value in MISSING:
                    found[ours, value] += 1
    return [
        f"{column}: got {value!r} in {count} rows; a cell without a value must be empty"
        for (column, value), count in found.items()
    ]


def _shared(corpus: DatasetDict) -> list[str]:
    """Speakers that are in several splits."""
    splits = defaultdict(list)
    for split, rows in corpus.items():
        for speaker in rows.unique("speaker"):
            if speaker is not None:
                splits[speaker].append(split)
    shared = [f"{speaker} in {' and '.join(own)}" for speaker, own in splits.items() if len(own) > 1]
    known = "figures then hold for known speakers"
    return [f"speakers in several splits: {len(shared)}, such as {shared[0]}; {known}"] if shared else []


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
    for split in ("validation", "test"):
        there = [label for label, by_split in rows_of.items() if by_split[split]]
        if len(there) == 1 < len(rows_of):
            lines.append(f"{split}: all rows have the label {there[0]!r}")
    return lines


def _first(by_split: dict[str, list[str]]) -> str:
    return next(ids[0] for ids in by_split.values() if ids)


def _similar(kind: str, corpus: DatasetDict, column: str) -> list[str]:
    spelled = defaultdict(set)
    for rows in corpus.values():
        for name in rows.unique(column):
            if name is not None:
                spelled["".join(filter(str.isalnum, name.casefold())) or name].add(name)
    return [f"{kind} {', '.join(map(repr, sorted(same)))} look like one" for same in spelled.values() if len(same) > 1]
