"""Recordings of any length: their segments, and reading them one after the other, for EGMF's processor."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Real
from typing import Any

import numpy as np

from .media_egmf import AudioClip, Recording, Span, media_length
from .media_readers_egmf import MediaError
from .samples_egmf import is_file, on_disk
from .spans_egmf import spans_at_pauses, windows


WINDOW = 10.0  # seconds of a window if neither the checkpoint nor its encoder says how long clips are
PICTURES = "video: got pictures without times, wanted a file"
SEGMENT_FIELDS = {"start", "end", "text", "speaker", "language", "context", "speaker_clips"}


def check_segments(segments: Any) -> list[dict[str, Any]]:
    """Checks a recording's segments and sorts them by their starts.

    Args:
        segments: Dicts with `start` and `end` in seconds, and optionally `text`, `speaker`, `context` and
            `speaker_clips`; or with `timestamp` (start, end) in the place of start and end, as speech recognition
            returns. An end of None is the start of the next one; the last one keeps it. A segment without length is
            left out, and `language` is not read.

    Raises:
        ValueError: If a segment has other fields or ends before it starts.
    """
    wanted = "a list of dicts with start, end, and optionally text and speaker"
    if not isinstance(segments, list | tuple) or not segments:
        raise ValueError(f"segments: got {segments!r}, wanted {wanted}")
    read, checked = [_with_start_and_end(given) for given in segments], []
    for place, segment in enumerate(read):
        if not {"start", "end"} <= segment.keys() <= SEGMENT_FIELDS:
            got, wanted = repr(segments[place]), "start, end, and optionally text and speaker"
            raise ValueError(f"segments[{place}]: got {got}, wanted {wanted}")
        start, end = segment["start"], segment["end"]
        is_open = end is None and place + 1 == len(read)
        if end is None and not is_open:
            end = read[place + 1].get("start")
        times = (start,) if is_open else (start, end)
        if not all(isinstance(x, Real) and math.isfinite(x) for x in times) or not 0 <= start <= times[-1]:
            raise ValueError(f"segments[{place}]: got {start!r} to {end!r}, wanted seconds with 0 <= start < end")
        if is_open or start < end:
            said = {name: segment.get(name) for name in ("text", "speaker")}
            said |= {name: segment[name] for name in ("context", "speaker_clips") if name in segment}
            checked.append({**said, "start": float(start), "end": None if is_open else float(end)})
    if not checked:
        raise ValueError("segments: got only segments without length, wanted some with seconds between start and end")
    return sorted(checked, key=lambda segment: segment["start"])


def _with_start_and_end(given: Any) -> dict[str, Any]:
    segment = dict(given) if isinstance(given, Mapping) else {}
    if isinstance(times := segment.pop("timestamp", None), list | tuple) and len(times) == 2:
        segment |= {"start": times[0], "end": times[1]}
    return segment


class RecordingSpans:
    """Iterates over the spans of a sample's recording, as [`Recording`] does for a file.

    Args:
        processor: The processor with the model's feature extractor and image processor.
        sample: Has the recording as `file`, `audio` or `video`.
        spans, window, hop, progress: As for [`Recording`].

    Attributes:
        duration, warnings: Known at the end, as for [`Recording`].

    Raises:
        ValueError: If the sample has not exactly one recording that can be divided, or `hop` exceeds `window`.
        MediaError: While iterating, if nothing (more) can be decoded.
    """

    def __init__(
        self,
        processor: Any,
        sample: Mapping[str, Any],
        spans: list[tuple[float, float]] | None,
        window: float,
        hop: float | None = None,
        progress: Callable[[float], None] | None = None,
    ):
        given = [name for name in ("file", "audio", "video") if sample.get(name) is not None]
        if len(given) != 1:
            raise ValueError(f"recording: got {' and '.join(given) or 'nothing'}, wanted one of file, audio and video")
        if hop is not None and hop > window:
            wanted = f"at most the window of {window:g}, so that no sound is left out"
            raise ValueError(f"hop: got {hop:g} seconds, wanted {wanted}")
        self.processor, self.kind, self.source = processor, given[0], sample[given[0]]
        self.spans, self.window, self.hop, self.progress = spans, window, hop, progress
        self.duration: float | None = None
        self.warnings: list[str] = []

    def close(self, segments: list[dict[str, Any]]) -> None:
        """Lets a segment without an end ([`check_segments`]) end with the recording.

        Raises:
            ValueError: If the recording does not state its length, or ends before the segment.
            MediaError: If it cannot be opened.
        """
        for segment in (one for one in segments if one["end"] is None):
            length = self._length()
            if not length or length <= segment["start"]:
                states = f"has {length:.1f} seconds" if length else "does not state its length"
                got = f"no end of the one from {segment['start']:g} seconds"
                raise ValueError(f"segments: got {got}, wanted one, as the recording {states}")
            segment["end"] = length

    def _length(self) -> float | None:
        """The length of the recording in seconds; None if it does not state it."""
        with on_disk(self.source) as source:
            if is_file(source):
                return media_length(source)
        if self.kind == "video":
            raise ValueError(PICTURES)
        if isinstance(source, Mapping):  # the longer axis is time
            return max(np.shape(source["array"])) / source["sampling_rate"]
        return source.duration

    def __iter__(self) -> Iterator[Span]:
        processor = self.processor
        rate = getattr(processor.feature_extractor, "sampling_rate", None)
        if rate is None and processor.image_processor is None and self.spans is not None:
            yield from (Span(*span, None, None) for span in self.spans)  # words are all that such a model reads
            return
        with on_disk(self.source) as source:
            if is_file(source):
                frames = processor.num_frames if processor.image_processor and self.kind != "audio" else None
                plan = (self.spans, self.window, self.hop)
                recording = Recording(source, rate, frames, *plan, progress=self.progress)
                yield from recording
                self.duration, self.warnings = recording.duration, recording.warnings
            elif self.kind == "video":
                raise ValueError(PICTURES)
            else:
                with processor.kept_warnings():  # that only its beginning is read
                    clip = processor.load_media(source).audio
                self.duration, self.warnings = clip.duration, list(clip.warnings)
                yield from self._of_array(clip)

    def _of_array(self, clip: AudioClip) -> Iterator[Span]:
        rate, duration = clip.sampling_rate, clip.duration

        def take(start: float, end: float) -> np.ndarray:
            return clip.samples[round(start * rate) : round(end * rate)]

        spans: Iterable[tuple[float, float]] | None = self.spans
        if spans is None and self.hop:
            spans = windows(duration, self.window, self.hop)
        elif spans is None:
            spans = spans_at_pauses(lambda seconds: duration, take, rate, 0.0, self.window)
        for start, end in spans:
            samples = take(start, end)
            yield Span(start, end, AudioClip(samples, rate, []) if len(samples) else None, None)


class RecordingsMixin:
    """Long recordings, for a processor with `MediaInputsMixin` and `clip_seconds`."""

    feature_extractor: Any
    clip_seconds: float | None
    audio_window: float

    # For callers: the copy of this code in a checkpoint has its own classes.
    check_segments = staticmethod(check_segments)

    def recording(self, *arguments, **options) -> RecordingSpans:
        """Reads a recording; the arguments are those of [`RecordingSpans`] after the processor."""
        return RecordingSpans(self, *arguments, **options)

    @property
    def window(self) -> float:
        """Length of a window in seconds: what the model was trained on, as far as its encoder hears it."""
        heard = math.inf if self.feature_extractor is None else self.audio_window
        return min(self.clip_seconds or math.inf, heard) if self.clip_seconds or heard < math.inf else WINDOW

    def is_long(self, file: Any, window: float | None = None) -> bool:
        """Whether a file is longer than a window (or its length is unknown). False for one that cannot be opened."""
        try:
            with on_disk(file) as path:
                length = media_length(path)
        except MediaError:
            return False
        return length is None or length > (window or self.window)
