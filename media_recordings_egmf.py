"""Reads a long recording in the worker process: its spans one after the other, decoded once, in bounded memory."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from .media_readers_egmf import (
    FULL_SCALE,
    SILENCE,
    MediaError,
    Pieces,
    Track,
    evenly_spaced,
    open_container,
    resampler,
    shortfall,
    upright,
)
from .spans_egmf import spans_at_pauses, windows


BEAT = 10.0  # seconds of the recording after which the worker says where it is
CHUNK = 1.0  # seconds of sound that are resampled together
GAP = 86400.0  # seconds between two pictures, from which on a time stamp is taken for damaged
EDGE = 5e-4  # seconds by which a frame may precede its span: subtitles round to milliseconds


class _Beat:
    """Tells the caller how far decoding is."""

    def __init__(self, send: Callable):
        self.send, self.said = send, 0.0

    def __call__(self, seconds: float) -> None:
        self._say(seconds, seconds)

    def scan(self, seconds: float) -> None:
        """The file is looked through up to a time, but nothing is decoded."""
        self._say(seconds, 0.0)

    def _say(self, seconds: float, at: float) -> None:
        if abs(seconds - self.said) >= BEAT:
            self.said = seconds
            self.send({"at": at})


class _Sound:
    """The sound of a file, mono at `rate` Hz, decoded as far as it is asked for."""

    def __init__(self, file: str, rate: int, beat: _Beat):
        self.file, self.rate, self.beat = file, rate, beat
        self.kept: list[np.ndarray] = []
        self.first = self.end = self.floor = 0  # samples before the kept ones, up to their end, not needed any more
        with open_container(file) as container:
            self.track = Track(container, "audio", keep=False, beat=beat.scan)
        if self.track.count > 1:
            self._pass_over_silence()
        self.track.packets = []
        self.pieces = None
        self.chunks = self._resampled()
        self.has_ended = False

    def _pass_over_silence(self) -> None:
        """Chooses the best track that is not silent, if any."""
        best = self.track
        for order in range(best.count):
            with open_container(self.file) as container:
                track = Track(container, "audio", order, keep=False, beat=self.beat.scan)
            with open_container(self.file) as container:
                pieces = Pieces(track, track.streamed(container), whole=False)
                if any(np.abs(piece).max(initial=0) > SILENCE for piece in self._beating(pieces)):
                    track.faults.clear()
                    self.track = track
                    return

    def _beating(self, pieces: Pieces) -> Iterator[np.ndarray]:
        for piece in pieces:
            self.beat(pieces.position / pieces.rate)
            yield piece

    def _resampled(self) -> Iterator[np.ndarray]:
        """The track's sound at the wanted rate."""
        with open_container(self.file) as container:
            self.pieces = Pieces(self.track, self.track.streamed(container), whole=False)
            resample, waiting, count = None, [], 0
            for piece in self._beating(self.pieces):
                resample = resample or resampler(self.pieces.rate, self.rate)
                waiting.append(piece)
                count += len(piece)
                if count >= CHUNK * self.pieces.rate:
                    yield self._clean(resample(self._clean(np.concatenate(waiting)), False))
                    waiting, count = [], 0
            if resample:
                rest = np.concatenate([*waiting, np.zeros(0, np.float32)])
                yield self._clean(resample(self._clean(rest), True))

    def _clean(self, samples: np.ndarray) -> np.ndarray:
        """Replaces samples that are no sound, as for short files."""
        if len(samples) and not np.abs(samples).max() <= FULL_SCALE:
            samples = np.clip(np.nan_to_num(samples, nan=0.0, posinf=0.0, neginf=0.0), -FULL_SCALE, FULL_SCALE)
            self.track.faults.append("NaN, infinite samples or samples far beyond full scale")
        return samples

    def fill(self, seconds: float) -> float:
        """Decodes up to a time, and returns the time up to which there is sound."""
        while not self.has_ended and self.end < seconds * self.rate:
            samples = next(self.chunks, None)
            if samples is None:
                self.has_ended = True
            else:
                self.kept.append(samples)
                self.end += len(samples)
                if self.end <= self.floor:
                    self.kept, self.first = [], self.end
        return self.end / self.rate

    def take(self, start: float, end: float) -> np.ndarray:
        """The samples between two times; fewer where there is no sound."""
        self.fill(end)
        if len(self.kept) > 1:
            self.kept = [np.concatenate(self.kept)]
        samples = self.kept[0] if self.kept else np.zeros(0, np.float32)
        return samples[max(0, round(start * self.rate) - self.first) : max(0, round(end * self.rate) - self.first)]

    def forget(self, seconds: float) -> None:
        """Drops the samples before a time, also those that are not decoded yet."""
        self.floor = round(seconds * self.rate)
        while self.kept and self.first + len(self.kept[0]) <= self.floor:
            self.first += len(self.kept.pop(0))
        if self.kept and self.first < self.floor:
            self.kept[0] = self.kept[0][self.floor - self.first :].copy()
            self.first = self.floor

    def shortfall(self) -> list[str]:
        """Warnings about what has been decoded so far."""
        decoded = self.pieces.position / self.pieces.rate if self.pieces and self.pieces.rate else 0.0
        claimed = self.track.claimed if self.has_ended else 0.0
        return self.track.notes + shortfall("audio", decoded, claimed, self.track.faults)


class _Pictures:
    """The pictures of a file, decoded as far as they are asked for; of each span, `count` frames are kept."""

    def __init__(self, file: str, count: int, beat: _Beat):
        self.file, self.count, self.beat = file, count, beat
        with open_container(file) as container:
            track = self.track = Track(container, "video", keep=False, beat=beat.scan)
            self.rate = float(track.stream.average_rate or 25)
            shown = [packet for packet in track.packets if packet.size and not packet.is_discard]
            stamps = sorted({packet.pts for packet in shown if packet.pts is not None})
            self.is_timed = len(stamps) == len(shown)
            self.times = (
                list(map(track.seconds, stamps)) if self.is_timed else [i / self.rate for i in range(len(shown))]
            )
            borders = [place for place in range(1, len(self.times)) if self.times[place] - self.times[place - 1] > GAP]
            if borders:  # a damaged stamp would make the recording as long as it says
                parts = [self.times[first:last] for first, last in pairwise([0, *borders, len(self.times)])]
                lost, self.times = len(self.times), max(parts, key=len)
                lost -= len(self.times)
                track.notes.append(f"video: pictures more than a day away from the others are left out: {lost}")
            last = max(shown, key=lambda packet: packet.pts).duration if shown and self.is_timed else None
            length = float(last * track.stream.time_base) if last else 1 / self.rate
        self.end = self.times[-1] + length if self.times else 0.0
        self.track.packets = []
        self.uses: Counter[int] = Counter()
        self.kept: dict[int, tuple[float, np.ndarray]] = {}
        self.at = 0  # index of the next frame
        self.size: dict[str, int] = {}
        self.decoded = self._decoded()
        self.has_ended = False

    def _decoded(self) -> Iterator[tuple[float, Any]]:
        with open_container(self.file) as container:
            for place, frame in enumerate(self.track.streamed(container)):
                time = self.track.seconds(frame.pts) if self.is_timed else None
                time = place / self.rate if time is None else time
                self.beat(time)
                yield time, frame

    def plan(self, start: float, end: float) -> list[int]:
        """Chooses the frames of a span and notes that they will be taken."""
        first, last = (bisect_left(self.times, time - EDGE) for time in (start, end))
        chosen = [first + i for i in evenly_spaced(last - first, self.count)]
        self.uses.update(chosen)
        return chosen

    def take(self, chosen: list[int], end: float) -> tuple[list[float], list[np.ndarray]]:
        """The times and pictures of a span. A frame that cannot be decoded is replaced by the next one, if in time."""
        while chosen and self.at <= chosen[-1] and not self.has_ended:
            time, frame = next(self.decoded, (0.0, None))
            if frame is None:
                self.has_ended = True
                break
            place = max(bisect_left(self.times, time - 1e-6), self.at)
            if wanted := [i for i in range(self.at, place + 1) if i in self.uses]:
                self.size = self.size or {"width": frame.width, "height": frame.height}
                self.kept |= dict.fromkeys(wanted, (time, upright(frame, self.size)))
            self.at = place + 1
        found = {self.kept[i][0]: self.kept[i][1] for i in chosen if i in self.kept and self.kept[i][0] < end}
        for i in chosen:
            self.uses[i] -= 1
            if not self.uses[i]:
                del self.uses[i]
                self.kept.pop(i, None)
        return list(found), list(found.values())

    def shortfall(self) -> list[str]:
        """Warnings about what has been decoded so far."""
        untimed = ["video: time stamps are missing or damaged, times follow from the average frame rate"]
        return self.track.notes + untimed * (not self.is_timed) + shortfall("video", 0.0, 0.0, self.track.faults)


def read_recording(file: str, wanted: dict[str, Any], send: Callable) -> dict[str, Any]:
    """Sends the spans of a recording in the order of their starts.

    Args:
        file: The file.
        wanted: `rate` of the sound in Hz or None, `frames` of each span or None; `spans`, a list of (start, end), or
            None for spans at pauses of at most `window` seconds, or of `window` seconds every `hop` seconds.
        send: Called with the header of a message and its arrays. A header has `at`, the time up to which the file is
            read, or `start`, `end`, `times` of the frames; then the arrays are the samples (N,) and the frames
            (F, height, width, 3).

    Returns:
        `duration` in seconds (None if the spans were given) and `warnings`.
    """
    beat = _Beat(send)
    sound, pictures, error = None, None, None
    for kind, make in (("audio", _Sound), ("video", _Pictures)):
        if amount := wanted["rate" if kind == "audio" else "frames"]:
            try:
                made = make(file, amount, beat)
                sound, pictures = (made, pictures) if kind == "audio" else (sound, made)
            except MediaError as raised:
                error = raised
                if raised.kind != f"no {kind}":
                    raise
    if sound is None and pictures is None:
        raise error or MediaError("", "not media", "the model takes neither sound nor pictures")
    length = pictures.end if pictures else 0.0
    spans, duration = wanted["spans"], None
    if spans is None and wanted["hop"]:
        duration = max(length, sound.track.last if sound else 0.0)
        if duration <= 0:
            raise MediaError("", "damaged", "it has no time stamps")
        spans = windows(duration, wanted["window"], wanted["hop"])
    if spans is not None:
        plans = [pictures.plan(*span) if pictures else [] for span in spans]
        planned = zip(spans, plans, strict=True)
    else:
        found = (
            spans_at_pauses(sound.fill, sound.take, sound.rate, length, wanted["window"])
            if sound
            else windows(length, wanted["window"], wanted["window"])
        )
        planned = ((span, pictures.plan(*span) if pictures else []) for span in found)
    empty = 0.0
    for (start, end), plan in planned:
        if sound:
            sound.forget(start)
        samples = sound.take(start, end) if sound else np.zeros(0, np.float32)
        times, frames = pictures.take(plan, end) if pictures else ([], [])
        duration = end if spans is None else duration
        if wanted["spans"] is None and not len(samples) and not frames:
            empty += end - start
            continue
        stacked = np.stack(frames) if frames else np.zeros((0, 0, 0, 3), np.uint8)
        send({"start": start, "end": end, "times": [time - start for time in times]}, samples, stacked)
    warnings = [warning for part in (sound, pictures) if part for warning in part.shortfall()]
    warnings += [f"{empty:.1f} seconds without sound and pictures are left out"] * (empty > 0)
    return {"duration": duration, "warnings": warnings}
