"""Writes answers as they come: JSON lines, CSV, WebVTT subtitles, or a table for people."""

import csv
import html
import json
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO


SUFFIXES = {".jsonl", ".csv", ".vtt"}


class Output:
    """Writes answers to a file, in the format of its suffix, or to standard output.

    A file gets JSON lines (`.jsonl`), a table (`.csv`) or subtitles (`.vtt`); standard output gets a table for people
    on a terminal and JSON lines elsewhere. The first answer replaces an earlier file.

    Args:
        path: The file, or None for standard output.
    """

    def __init__(self, path: Path | None):
        self.to_people = path is None and sys.stdout.isatty()
        self.format = path.suffix.lower() if path else ".jsonl"
        self.path = path
        self.columns: list[str] | None = None
        self.waiting: list[dict] = []  # rows of a table before its columns are known

    @cached_property
    def file(self) -> TextIO:
        if self.path is None:
            return sys.stdout
        # Names of files need not be valid Unicode; JSON readers decode the escape to the same name.
        file = self.path.open("w", encoding="utf-8", errors="backslashreplace", newline="")
        if self.format == ".vtt":
            file.write("WEBVTT\n")
        return file

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *error) -> None:
        for row in self.waiting:
            self._write_row(row, list(row))
        if self.path and "file" in vars(self):
            self.file.close()

    def write(self, answer: dict[str, Any]) -> None:
        """Writes the answer to a file, or to a part of a recording with `start` and `end`."""
        if self.to_people:
            self._print(table_row(answer))
        elif self.format == ".vtt":
            self._print(f"\n{cue(answer)}")
        elif self.format == ".csv":
            self._tabulate(answer)
        else:
            self._print(json.dumps(answer, ensure_ascii=False))

    def _print(self, line: str) -> None:
        print(line.encode(errors="backslashreplace").decode(), file=self.file, flush=True)

    def _tabulate(self, answer: dict[str, Any]) -> None:
        row = dict(_flat(answer))
        if self.columns is None and answer["error"] is not None:
            self.waiting.append(row)  # its empty values do not show the columns
            return
        if self.columns is None:
            front = ["file", "start", "end", "segments", "speaker", "text", "language", "recognized_by"]
            front = ["id"] * ("id" in row) + front
            self.columns = [*front, *(name for name in row if name not in front)]
            csv.writer(self.file).writerow(self.columns)
            for earlier in self.waiting:
                self._write_row(earlier, self.columns)
            self.waiting = []
        self._write_row(row, self.columns)

    def _write_row(self, row: dict, columns: list[str]) -> None:
        if self.columns is None:
            self.columns = columns
            csv.writer(self.file).writerow(columns)
        csv.writer(self.file).writerow([row.get(name) for name in self.columns])
        self.file.flush()


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of an answer by column: `probabilities.joy`, `interval.low`; warnings are joined."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else key)
    elif name == "interval" and value is not None:
        yield from zip(("interval.low", "interval.high"), value, strict=True)
    else:
        yield name, "; ".join(value) if isinstance(value, list) else value


def clock(seconds: float, hours: bool = True) -> str:
    """Seconds as WebVTT writes them: 00:01:02.500, or without hours where there are none."""
    minutes, rest = divmod(round(seconds * 1000), 60_000)
    text = f"{minutes % 60:02d}:{rest // 1000:02d}.{rest % 1000:03d}"
    return f"{minutes // 60:02d}:{text}" if hours or minutes >= 60 else text


def short_value(answer: dict[str, Any]) -> str:
    """The label with its probability, or the score."""
    if answer.get("label") is not None:
        return f"{answer['label']} {100 * answer['probabilities'][answer['label']]:.0f} %"
    return f"{answer['score']:+.2f}"


def cue(answer: dict[str, Any]) -> str:
    """A segment's answer as a cue of subtitles; a note for what has no times, or is about the whole recording."""
    value = f"({answer['error']})" if answer["error"] else f"[{short_value(answer)}]"
    start, end = answer.get("start", 0.0), answer.get("end", answer["seconds"])
    if end is None or "segments" in answer:
        return f"NOTE {answer['file'] or '-'}: {value}".replace("-->", "->")
    words = " ".join((answer.get("text") or "").split())
    voice = f"<v {html.escape(answer['speaker'], quote=False)}>" if answer.get("speaker") else ""
    line = html.escape(f"{value} {words}".strip(), quote=False)
    return f"{clock(start)} --> {clock(end)}\n{voice}{line}"


def table_row(answer: dict[str, Any]) -> str:
    """An answer as one line of the table for people."""
    name = answer["file"] or "-"
    if "id" in answer:
        name = answer["id"] or name  # names a part as well
    elif "segments" in answer:
        name = f"{name}: mean of {answer['segments']}"
    elif "start" in answer:
        name = f"{clock(answer['start'], hours=False)} to {clock(answer['end'], hours=False)}"
    if answer["error"]:
        return f"{name:32}  {answer['error']}"
    if answer.get("label") is not None:
        best = sorted(answer["probabilities"].items(), key=lambda item: -item[1])[:3]
        value = ", ".join(f"{label} {100 * probability:.0f} %" for label, probability in best)
    else:
        low, high = answer["interval"]
        value = f"{answer['score']:+.2f} ({low:+.1f} to {high:+.1f})"
    seconds = "-" if answer["seconds"] is None else f"{answer['seconds']:.1f} s"
    words = f'"{answer["text"]}"' if answer.get("text") else ""
    notes = "; ".join(filter(None, [words, *answer["warnings"]]))
    return f"{name:32}  {value:48}  {seconds:>8}  {notes}".rstrip()
