"""Answers along a recording, for the pipeline: one for each segment or window, and one for the whole."""

import math
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any

import numpy as np
import torch

from .samples_egmf import as_sample
from .tasks_egmf import AffectTask, AnswerDistribution


TOLERANCE = 0.1  # seconds that a segment may lack without a warning
SHORTEST = 0.05  # seconds of a window or hop
OWN = ("context", "speaker_clips")  # of a segment, if it has them
CONTEXT_LINES = 64  # preceding segments that are given as context; the processor keeps as many as fit


class _Whole:
    """The mean of the segments' answers, weighted by their lengths."""

    def __init__(self, task: AffectTask):
        self.task, self.seconds, self.count, self.unanswered = task, 0.0, 0, 0
        self.probabilities = np.zeros(len(task.answers))
        self.gates: Any = None

    def add(self, seconds: float, answer: dict) -> None:
        self.count += 1
        if answer["error"] is not None:
            self.unanswered += 1
            return
        self.seconds += seconds
        share = seconds / self.seconds
        own = np.array([answer["probabilities"][name] for name in self.task.answers])
        self.probabilities += share * (own - self.probabilities)
        self.gates = _mix(self.gates, answer["gate_weights"], share)

    def distribution(self) -> AnswerDistribution | None:
        if not self.seconds:
            return None
        return AnswerDistribution.over(self.task, self.probabilities / self.probabilities.sum())


def _mix(mean: Any, new: Any, share: float) -> Any:
    """Moves a mean of nested dicts of numbers towards new ones."""
    if mean is None:
        return new
    if isinstance(new, dict):
        return {name: _mix(mean[name], new[name], share) for name in new}
    return mean + share * (new - mean)


def _batches(items: Iterator, size: int) -> Iterator[list]:
    """Lists of `size` items; if the iterator raises an error, the items before it come first."""
    batch = []
    try:
        for item in items:
            batch.append(item)
            if len(batch) == size:
                yield batch
                batch = []
    except Exception:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


class TimelineMixin:
    """Answers along recordings, for [`AffectRecognitionPipeline`]."""

    processor: Any

    def answer_segments(
        self,
        sample: Any,
        segments: list | None = None,
        window: float | None = None,
        hop: float | None = None,
        batch_size: int | None = None,
        progress: Callable[[float], None] | None = None,
        **options,
    ) -> Iterator[dict[str, Any]]:
        """Yields the answer to each segment of a recording while it is read, and at last one for the whole.

        The file is decoded once, in bounded memory. A segment's answer has its `timestamp` (start, end) in seconds,
        `text` and `speaker`, and all that an answer to a clip has. The last answer is the mean of the segments'
        distributions and gate weights, weighted by their lengths. It has `segments`, their number.

        Args:
            sample: A sample with one recording: a file, or sound.
            segments: Dicts with `start` and `end` in seconds, and optionally `text`, `speaker`, `context` (by default
                the segments before it) and `speaker_clips`; or the `chunks` of speech recognition, of which the last
                may lack its end. Without segments the recording is divided into windows that end at pauses.
            window: Length of the longest window in seconds; by default the length of the training clips.
            hop: Distance of the starts of windows in seconds; all then have the same length, wherever pauses are.
            batch_size: Number of segments that the model processes at a time; 8 by default.
            progress: Called with the seconds that have been read.
            options: As for a call of the pipeline.

        Raises:
            ValueError: If an argument is invalid.
            MediaError: If the file cannot be read; with `on_error="report"` the last answer has the error instead.
        """
        if options.get("speaker_clips") is not None:
            options["speaker_clips"] = self.speaker_center(options["speaker_clips"])
        before, timed, after = self._parameters(**options)
        segments, window, hop = (
            timed.get(name) if value is None else value
            for name, value in (("segments", segments), ("window", window), ("hop", hop))
        )
        for name, value in (("window", window), ("hop", hop)):
            if value is not None and (not isinstance(value, Real) or not SHORTEST <= value < math.inf):
                raise ValueError(f"{name}: got {value!r}, wanted seconds from {SHORTEST}")
        fields = {**before["shared"], **as_sample(sample, self._sampling_rate)}
        lines = None if segments is None else self.processor.check_segments(segments)
        if lines is None and "transcriber" in after and (window or hop):
            raise ValueError("window: got a value with a transcriber, whose segments are used, wanted one of the two")
        if lines and "transcriber" in after and self.processor.feature_extractor is None:
            if wordless := [place for place, line in enumerate(lines) if not line["text"]]:
                wanted = "some: the model hears no sound, so the transcriber gets none"
                raise ValueError(f"segments[{wordless[0]}]: got no text, wanted {wanted}")
        recording = self.processor.recording(fields, None, window or self.processor.window, hop, progress)
        return self._along(recording, lines, fields, self._size(batch_size), after)

    def _along(self, recording, lines: list | None, fields: dict, size: int, after: dict) -> Iterator[dict[str, Any]]:
        top_k = after.pop("top_k", None)
        whole, error, end, recognized = _Whole(after["task"]), None, 0.0, {}
        try:
            if lines is None and "transcriber" in after:
                recognized = self._recognized(after.pop("transcriber"), recording.source, recording.progress)
                recognized.pop("text", None)
                chunks = recognized.pop("chunks", None)
                lines = self.processor.check_segments(chunks) if chunks else None
                if lines is None and self._is_deaf:
                    lines = []  # there is nothing to read in windows
            recording.close(lines or [])
            recording.spans = None if lines is None else [(line["start"], line["end"]) for line in lines]
            for batch in _batches(self._prepared_spans(recording, lines, fields, "transcriber" in after), size):
                answers = self._answer([prepared for _, _, prepared in batch], **after)
                for (times, said, _), answer in zip(batch, answers, strict=True):
                    whole.add(times[1] - times[0], answer)
                    end = max(end, times[1])
                    yield {"timestamp": times, **said, **recognized, **best_answers(answer, top_k)}
        except torch.OutOfMemoryError:
            raise
        except Exception as raised:
            if after["on_error"] != "report":
                raise
            error = str(raised) or type(raised).__name__
        distribution = None if error else whole.distribution()
        if error is None and distribution is None:
            error = "no segment could be answered"
        notes = list(recording.warnings)
        if fields.get("text") and lines is None:
            notes.append("the text is not used: the words of a recording need times, as segments")
        if whole.unanswered:
            notes.append(f"{whole.unanswered} of {whole.count} segments could not be answered")
        answer = {
            "timestamp": (0.0, recording.duration or end),
            "segments": whole.count,
            "text": " ".join(line["text"] for line in lines or () if line["text"]) or None,
            **recognized,
            **self._values(after["task"], distribution),
            "gate_weights": None if error else whole.gates,
            "seconds": recording.duration or whole.seconds or None,
            "warnings": notes,
            "error": error,
        }
        yield best_answers(answer, top_k)

    def _prepared_spans(
        self, recording, lines: list | None, fields: dict, is_transcribed: bool
    ) -> Iterator[tuple[tuple, dict, dict]]:
        """The times of each span, its words and speaker, and its prepared sample."""
        context = list(fields.get("context") or [])
        shared = {name: fields.get(name) for name in ("speaker", "speaker_clips")}
        for place, span in enumerate(recording):
            line = {} if lines is None else lines[place]
            said = {"text": line.get("text"), "speaker": line.get("speaker") or shared["speaker"]}
            own = {"context": context[-CONTEXT_LINES:]} | {name: line[name] for name in OWN if name in line}
            sample = {**shared, **said, **own, "audio": span.audio, "video": span.video}
            prepared = self.preprocess(sample, is_transcribed=is_transcribed)
            if line and prepared["error"] is None and (missing := self._missing(span)):
                prepared["report"]["warnings"].append(missing)
            yield (span.start, span.end), said, prepared
            if said["text"]:
                context.append({"speaker": said["speaker"], "text": said["text"]})

    def _missing(self, span: Any) -> str | None:
        """What to say if a given segment is not in the recording as a whole."""
        part = span.audio or span.video
        found, wanted = 0.0 if part is None else part.duration, span.end - span.start
        if self._is_deaf or found > wanted - TOLERANCE:
            return None
        return f"the recording has {found:.1f} of these {wanted:.1f} seconds"


def best_answers(answer: dict[str, Any], top_k: int | None) -> dict[str, Any]:
    """The answer with only the `top_k` most probable `probabilities`, the most probable first; all without `top_k`."""
    if top_k is None or answer["probabilities"] is None:
        return answer
    best = sorted(answer["probabilities"].items(), key=lambda item: -item[1])
    return {**answer, "probabilities": dict(best[:top_k])}
