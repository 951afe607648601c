"""Reads the segments of a recording: subtitles (SRT, WebVTT), speech recognition's JSON, or a table."""

import html
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corpora.reading import decode_text, read_rows, read_time


Segment = dict[str, Any]  # start and end in seconds (only the last end may be None), text and speaker or None
FORMATS = ".srt, .vtt, .json (Whisper's) or .csv (columns start, end, text, speaker)"
TIMES = re.compile(r"\s*([\d:.,]+)\s*-->\s*([\d:.,]+)(?:\s.*)?")
VOICE = re.compile(r"<v(?:\.[^ >]*)?\s+([^>]+)>")


def read_segments(path: Path) -> list[Segment]:
    """Reads the segments of a file, whose suffix names its format.

    Raises:
        ValueError: If the file has another format, is malformed, or has no segment.
    """
    readers = {".srt": _subtitles, ".vtt": _subtitles, ".json": _recognized, ".csv": _table, ".tsv": _table}
    if path.suffix.lower() not in readers:
        raise ValueError(f"segments: got {path}, wanted {FORMATS}")
    segments, empty = [], 0
    for place, segment in readers[path.suffix.lower()](path):
        start, end = segment["start"], segment["end"]
        if end is not None and start > end:
            raise ValueError(f"{path}: {place}: got {start} to {end}, wanted start before end")
        if start == end:
            empty += 1
        else:
            segments.append(segment)
    if empty:
        logging.warning("%s: %d segments have no length and are left out", path, empty)
    if not segments:
        raise ValueError(f"{path}: got no segment, wanted some")
    return segments


def _subtitles(path: Path) -> Iterator[tuple[str, Segment]]:
    """The cues of an SRT or WebVTT file, with their line."""
    lines = decode_text(path).splitlines()
    blocks: list[list[tuple[int, str]]] = [[]]
    for number, line in enumerate(lines, 1):
        if line.strip():
            blocks[-1].append((number, line))
        elif blocks[-1]:
            blocks.append([])
    for block in filter(None, blocks):
        if re.match(r"\ufeff?WEBVTT|NOTE|STYLE|REGION", block[0][1]):
            continue
        # A cue may have a number or a name in front of its times.
        place = next((i for i, (_, line) in enumerate(block[:2]) if "-->" in line), 0)
        number, line = block[place]
        times = TIMES.fullmatch(line)
        try:
            start, end = map(read_time, times.groups() if times else [line])
        except ValueError:
            wanted = "00:00:01.000 --> 00:00:02.500"
            raise ValueError(f"{path}: line {number}: got {line[:60]!r}, wanted times such as {wanted}") from None
        words = " ".join(line for _, line in block[place + 1 :])
        voice = VOICE.search(words)
        text = html.unescape(re.sub(r"<[^>]*>|\{\\[^}]*\}", "", words)).strip()
        yield (
            f"line {number}",
            {
                "start": start,
                "end": end,
                "text": text or None,
                "speaker": html.unescape(voice[1]).strip() if voice else None,
            },
        )


def _recognized(path: Path) -> Iterator[tuple[str, Segment]]:
    """The segments that Whisper, whisper.cpp, WhisperX or transformers wrote."""
    try:
        content = json.loads(decode_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: got no JSON ({error}), wanted {FORMATS}") from None
    names = ("segments", "chunks", "transcription")
    found: Any = content
    if isinstance(content, dict):
        found = next((content[name] for name in names if name in content), None)
    if not isinstance(found, list):
        raise ValueError(f"{path}: got no list of segments, wanted one in {', '.join(names)}")
    times = [_times(item) if isinstance(item, dict) else None for item in found]
    for place, item in enumerate(found):
        start, end = times[place] or (None, None)
        is_last = place + 1 == len(found)
        if end is None and not is_last:  # as in `check_segments`
            end, _ = times[place + 1] or (None, None)
        if start is None or end is None and not is_last:
            raise ValueError(f"{path}: segment {place}: got {str(item)[:100]}, wanted its start and end")
        text, speaker = item.get("text"), item.get("speaker")
        yield (
            f"segment {place}",
            {
                "start": start,
                "end": end,
                "text": str(text).strip() or None if text is not None else None,
                "speaker": None if speaker is None else str(speaker),
            },
        )


def _times(item: dict[str, Any]) -> tuple[float, float | None] | None:
    """Start and end of a segment in seconds; None if it lacks them. Only the end of `timestamp` may be missing."""
    found: Any = (item.get("start"), item.get("end"))
    may_be_open = isinstance(item.get("timestamp"), list)
    if may_be_open:
        found = item["timestamp"]
    if isinstance(offsets := item.get("offsets"), dict):
        found = [value / 1000 if isinstance(value, int) else None for value in map(offsets.get, ("from", "to"))]
    if len(found) != 2 or not (_is_time(found[0]) and (_is_time(found[1]) or may_be_open and found[1] is None)):
        return None
    return float(found[0]), None if found[1] is None else float(found[1])


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9


def _table(path: Path) -> Iterator[tuple[str, Segment]]:
    """The rows of a table, with times in seconds or as a clock."""
    for line, row in read_rows(path, ("start", "end")):
        times = []
        for name in ("start", "end"):
            try:
                times.append(read_time(row[name].strip()))
            except ValueError as error:
                raise ValueError(f"{path}: line {line}: {name}: {error}") from None
        text, speaker = (row.get(name, "").strip() or None for name in ("text", "speaker"))
        yield f"line {line}", {"start": times[0], "end": times[1], "text": text, "speaker": speaker}
