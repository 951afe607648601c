"""The answers to files: clips in batches, recordings segment by segment."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from egmf.media_egmf import MediaError
from egmf.samples_egmf import is_url, on_disk


class Answerer:
    """Answers files with a pipeline, in their order.

    Args:
        recognize: The pipeline of a model.
        batch_size: Files, or parts of a recording, that the model processes at a time.
        plan: `segments`, `window` and `hop` of recordings, as far as the user gave them.
        options: Options of the pipeline's calls.

    Raises:
        ValueError: If the model is an older one, whose code divides no recordings, and the plan asks for that.
    """

    def __init__(self, recognize: Any, batch_size: int, plan: dict[str, Any], options: dict[str, Any]):
        self.recognize, self.batch_size, self.options = recognize, batch_size, options
        self.plan = {name: value for name, value in plan.items() if value is not None}
        self.divides = hasattr(recognize, "answer_segments")
        if not self.divides and (self.plan or "transcriber" in options):
            raise ValueError("model: got one whose own code divides no recordings, wanted a model of a later version")

    def __call__(self, samples: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yields the answers, with their `file`.

        Those to a recording have `start` and `end`. The last one is for the whole and has `segments`, their number.

        Args:
            samples: Have a `file`, and may have `text` and `speaker`.
        """
        clips: list[dict[str, Any]] = []
        with tqdm(total=len(samples), unit="file", disable=None if len(samples) > 1 else True) as progress:
            for sample in samples:
                is_clip = not is_url(sample["file"]) and not self._is_recording(sample)
                if is_clip:
                    clips.append(sample)
                if not is_clip or len(clips) == self.batch_size:
                    yield from self._clips(clips)
                    progress.update(len(clips))
                    clips = []
                if not is_clip:
                    yield from self._alone(sample)
                    progress.update()
            yield from self._clips(clips)
            progress.update(len(clips))

    def _is_recording(self, sample: dict[str, Any]) -> bool:
        """Whether to divide a file. Words without times belong to a file as a whole."""
        if not self.divides or sample.get("text") and not self.plan:
            return False
        return bool(self.plan) or not is_url(sample["file"]) and self.recognize.processor.is_long(sample["file"])

    def _clips(self, samples: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        answers = self.recognize(list(samples), batch_size=self.batch_size, **self.options)
        for sample, answer in zip(samples, answers, strict=True):
            yield {"file": str(sample["file"]), **answer}

    def _alone(self, sample: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The answers to a recording, or to a URL, which is downloaded once."""
        with ExitStack() as stack:
            try:
                file = stack.enter_context(on_disk(sample["file"]))
            except MediaError:
                file = sample["file"]  # its answer has the error
            sample = {**sample, "file": file}
            if not is_url(file) and self._is_recording(sample):
                yield from self._recording(sample)
            else:
                yield from self._clips([sample])

    def _recording(self, sample: dict[str, Any]) -> Iterator[dict[str, Any]]:
        name = str(sample["file"])
        with tqdm(desc=Path(name).name, unit="s", leave=False, disable=None) as bar:

            def advance(seconds: float) -> None:
                bar.update(round(seconds) - bar.n)

            options = {"batch_size": self.batch_size, "progress": advance, **self.plan, **self.options}
            for answer in self.recognize.answer_segments(sample, **options):
                start, end = answer.pop("timestamp")
                yield {"file": name, "start": round(start, 3), "end": round(end, 3), **answer}
