"""Converts the published files of a benchmark to a folder of sharded parquet with a report.

An interrupted or failed conversion leaves no output folder.
"""

import importlib
import inspect
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from corpora.converted import LOCAL, REPORT
from corpora.reading import Notes, Reading, Rows, note_lines
from corpora.schema import FEATURE_COLUMNS, FEATURES, build_tables


CONVERTIBLE = ("cherma", "meld", "mosei", "simsv2")
SHARD_BYTES = 500_000_000
_UNFINISHED = ".unfinished"  # suffix of the folder's name while it is incomplete


class MismatchError(ValueError):
    """The files differ from the published ones; the message lists every difference."""


def convert(
    name: str, source: str | os.PathLike, out: str | os.PathLike, allow_mismatch: bool = False, **options: Any
) -> dict[str, Any]:
    """Convert a corpus to a folder, which `load_corpus(name, out)` reads.

    Rows are read and written in small batches. The output goes to a folder whose name ends in `.unfinished`, which
    is renamed to `out` when it is complete. If the process is killed, the next run replaces the unfinished folder.

    Args:
        name: One of `CONVERTIBLE`.
        source: The `source` of the module's `load`.
        out: The output folder; it must be empty or not exist.
        allow_mismatch: Convert the files even if the numbers of rows, the labels that occur, or the feature sizes
            differ from the published ones. A label that does not belong to the corpus is an error in any case.
        **options: Options of the module's `load`.

    Returns:
        The report, which is also written to `corpus.json` in the folder.

    Raises:
        MismatchError: If the files differ from the published ones.
        FileExistsError: If `out` is not empty, or another conversion is writing it.
        FileNotFoundError, ValueError: See the module's `load`.
    """
    if name not in CONVERTIBLE:
        raise ValueError(f"corpus: got {name!r}, wanted one of {', '.join(CONVERTIBLE)}")
    module, out = importlib.import_module(f"corpora.{name}"), Path(os.path.abspath(out))
    known = [option for option in inspect.signature(module.read).parameters if option not in ("source", "notes")]
    for option in options:
        if option not in known:
            wanted = f"one of {', '.join(known)}" if known else "none"
            raise ValueError(f"corpus {name!r}: got the option {option!r}, wanted {wanted}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out}: is there already, wanted a new folder")
    folder = out.with_name(out.name + _UNFINISHED)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FileExistsError(f"{folder}: another conversion is writing it") from None
    try:
        for leftover in set(folder.iterdir()) - {Path(lock.lock_file)}:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        notes = Notes()
        reading = module.read(source, notes, **options)
        bound = inspect.signature(module.read).bind(source, notes, **options)
        bound.apply_defaults()
        settings = {option: bound.arguments[option] for option in known if option != "media"}
        report = _write(name, Path(source).name, settings, reading, notes, allow_mismatch, folder)
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)
        os.replace(folder, out)
    except BaseException:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return report


def _write(name, source: str, settings, reading: Reading, notes: Notes, allow_mismatch: bool, folder: Path) -> dict:
    """Write all files of the folder; return the report."""

    def check(differences: list[str]) -> list[str]:
        if differences and not allow_mismatch:
            wanted = "wanted the published files (--allow_mismatch converts these nevertheless)"
            raise MismatchError(f"{name}, {reading.form}: {'; '.join(differences)}; {wanted}")
        return differences

    if reading.sizes:  # fail before anything is written
        check(_size_differences(reading.sizes, {split: rows.count for split, rows in reading.splits.items()}))
    (folder / "data").mkdir()
    splits = {split: _write_split(split, rows, reading, folder) for split, rows in reading.splits.items()}
    module = importlib.import_module(f"corpora.{name}")
    for split, written in splits.items():
        if not written["rows"]:
            raise ValueError(f"{name}, {reading.form}: {split}: got no rows with a label, wanted some")
        written["notes"] = notes.of(split)
    differences = _size_differences(reading.sizes or {}, {split: part["rows"] for split, part in splits.items()})
    for split, written in splits.items():
        missing = [label for label in getattr(module, "EMOTIONS", ()) if label not in written["labels"]]
        if missing:
            differences.append(f"{split}: got no row with the label {', '.join(missing)}")
        for column, width in reading.widths.items():
            for found in written["features"][column]["widths"]:
                if found != width:
                    differences.append(f"{split}: got {found} features in {column}, published are {width}")
    report = {
        "corpus": name,
        "form": reading.form,
        "source": source,
        "options": settings,
        "clips": reading.media is not None,
        "published_sizes": reading.sizes,
        "differences": check(differences),
        "splits": splits,
        "notes": notes.of("all"),
    }
    (folder / REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(report), encoding="utf-8")
    if reading.media is not None:
        text = json.dumps({"media": str(reading.media.resolve())}, ensure_ascii=False)
        (folder / LOCAL).write_text(text + "\n", encoding="utf-8")
    return report


def _size_differences(published: dict[str, int], got: dict[str, int]) -> list[str]:
    return [
        f"{split}: got {got[split]} rows, published are {size}"
        for split, size in published.items()
        if got[split] != size
    ]


def _write_split(split: str, rows: Rows, reading: Reading, folder: Path) -> dict[str, Any]:
    """Write the shards of a split; return a summary of their content."""
    labels, scores = Counter(), []
    features = {column: {"lengths": [], "widths": Counter()} for column in FEATURE_COLUMNS}
    clips = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal clips
        for row in tqdm(rows.rows, desc=split, total=rows.count, unit="row", disable=None):
            if row.get("emotion") is not None:
                labels[row["emotion"]] += 1
            else:
                scores.append(row["sentiment"])
            for column, found in features.items():
                if row.get(column) is not None:
                    found["lengths"].append(len(row[column]))
                    found["widths"][row[column].shape[1]] += 1
            if row.get("video") is not None:
                clips += 1
                row = row | {
                    column: Path(row[column]).relative_to(reading.media).as_posix() for column in ("audio", "video")
                }
            yield row

    files, writer, count = [], None, 0
    try:
        for table in build_tables(counted()):
            if writer is None:
                files.append(folder / "data" / f"{split}-{len(files):05d}.parquet")
                sink = files[-1].open("wb")
                # Numbers hardly repeat, so dictionaries for them would cost time and save nothing.
                writer = pq.ParquetWriter(sink, FEATURES.arrow_schema, use_dictionary=["language", "emotion"])
            writer.write_table(table)
            count += len(table)
            if sink.tell() >= SHARD_BYTES:
                writer = _close(writer, sink)
    finally:
        if writer is not None:
            _close(writer, sink)
    names = []
    for number, file in enumerate(files):
        names.append(f"data/{split}-{number:05d}-of-{len(files):05d}.parquet")
        file.rename(folder / names[-1])
    written = {"rows": count, "files": names}
    if labels:
        written["labels"] = dict(labels.most_common())
    else:
        written["scores"] = _describe_scores(np.asarray(scores, np.float32))
    written["features"] = {column: _describe_lengths(**found) for column, found in features.items()}
    written["clips"] = clips
    return written


def _close(writer: pq.ParquetWriter, sink) -> None:
    writer.close()
    sink.flush()
    os.fsync(sink.fileno())
    sink.close()


def _describe_scores(scores: np.ndarray) -> dict[str, Any]:
    if not len(scores):
        return {}
    described = {"lowest": scores.min(), "mean": scores.mean(dtype=np.float64), "highest": scores.max()}
    signs = {"negative": scores < 0, "zero": scores == 0, "positive": scores > 0}
    return {key: round(float(value), 6) for key, value in described.items()} | {
        key: int(value.sum()) for key, value in signs.items()
    }


def _describe_lengths(lengths: list[int], widths: Counter) -> dict[str, Any]:
    described: dict[str, Any] = {"rows": len(lengths), "widths": sorted(widths)}
    if lengths:
        described |= {"shortest": min(lengths), "median": float(np.median(lengths)), "longest": max(lengths)}
    return described


def describe(report: dict[str, Any]) -> str:
    """Format a report as text."""
    lines = [f"{report['corpus']}: {report['form']}"]
    for split, part in report["splits"].items():
        lines.append(f"{split}: {part['rows']} rows in {len(part['files'])} files")
        for title in ("labels", "scores"):
            if title in part:
                lines.append(f"  {title}: " + ", ".join(f"{key} {value}" for key, value in part[title].items()))
        for column, found in part["features"].items():
            if found["rows"]:
                widths = ", ".join(map(str, found["widths"]))
                lengths = f"{found['shortest']} to {found['longest']}, median {found['median']:g}"
                lines.append(f"  {column}: in {found['rows']} rows, {widths} features, frames {lengths}")
        if report["clips"]:
            lines.append(f"  clips: in {part['clips']} rows")
        lines += [f"  {line}" for line in note_lines(part["notes"])]
    lines += note_lines(report["notes"])
    if report["published_sizes"] is None:
        lines.append("The published numbers of rows were never verified, so these are not compared with them.")
    return "\n".join(lines + [f"DIFFERS from what was published: {line}" for line in report["differences"]])


def _card(report: dict[str, Any]) -> str:
    """The README of the folder: a dataset card that tells `datasets.load_dataset` where the splits are."""
    files = "\n".join(f"  - split: {split}\n    path: data/{split}-*" for split in report["splits"])
    clips = "\nThe paths in `audio` and `video` are relative to the folder of the clips, which is not included.\n"
    return f"""---
configs:
- config_name: default
  data_files:
{files}
tags:
- egmf
---

# {report["corpus"]}, converted for EGMF

One row is one utterance. The terms of the original corpus also apply to this copy; most of them forbid redistribution.
{clips if report["clips"] else ""}
```
{describe(report)}
```
"""
