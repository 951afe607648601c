"""The answers to files: clips in batches, recordings segment by segment."""

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

from torch.utils.data import Subset
from tqdm.auto import tqdm

from egmf.media_egmf import MediaError
from egmf.prediction.tables import recording_of
from egmf.samples_egmf import is_url, on_disk


def _fields(sample: dict[str, Any]) -> dict[str, Any]:
    """What the pipeline gets of a sample."""
    said = {name: sample[name] for name in ("text", "speaker", "context", "speaker_clips") if name in sample}
    return sample.get("media", {"file": sample["file"]}) | said


def _named(sample: dict[str, Any]) -> dict[str, Any]:
    """What an answer repeats of its sample; of a row of a table also its id, words and speaker."""
    return sample.get("named", {}) | {"file": None if sample["file"] is None else str(sample["file"])}


class Answerer:
    """Answers files with a pipeline, in their order.

    Args:
        recognize: The pipeline of a model.
        batch_size: Files, or parts of a recording, that the model processes at a time.
        plan: `segments`, `window` and `hop` of recordings, as far as the user gave them.
        options: Options of the pipeline's calls.
        num_workers: Processes that decode clips ahead of the model; 0 to decode in this one.
    """

    AHEAD = 16  # batches for each worker that are given to the pipeline at a time: starting a worker takes a while

    def __init__(
        self, recognize: Any, batch_size: int, plan: dict[str, Any], options: dict[str, Any], num_workers: int = 0
    ):
        self.recognize, self.batch_size, self.options = recognize, batch_size, options
        self.num_workers = num_workers
        self.plan = {name: value for name, value in plan.items() if value is not None}

    def __call__(self, samples: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the place of a file in `samples` and an answer to it, which has its `file`.

        Answers to a recording have `start` and `end`. The last one is for the whole and has `segments`, their number.
        Each row of a table has one answer.

        Args:
            samples: Have a `file`, which is None for words alone, and may have `text` and `speaker`; or results of
                [`fit_to_model`].
        """
        clips: list[int] = []
        together = self.batch_size * max(1, self.AHEAD * self.num_workers)
        with tqdm(total=len(samples), unit="file", disable=None if len(samples) > 1 else True) as progress:

            def answered() -> Iterator[tuple[int, dict[str, Any]]]:
                for place, answer in zip(clips, self._clips([samples[place] for place in clips]), strict=True):
                    progress.update()
                    yield place, answer
                clips.clear()

            for recording, group in groupby(enumerate(samples), lambda pair: recording_of(pair[1])):
                if recording is not None:
                    yield from answered()
                    rows = dict(group)
                    for place, answer in self._parts(rows):
                        progress.update()
                        yield place, answer
                    continue
                for place, sample in group:
                    is_clip = sample["file"] is None or not is_url(sample["file"]) and not self._is_recording(sample)
                    if is_clip and "error" not in sample:
                        clips.append(place)
                    if not is_clip or "error" in sample or len(clips) == together:
                        yield from answered()
                    if "error" in sample:
                        progress.update()
                        yield place, _named(sample) | self._failed(sample["error"])
                    elif not is_clip:
                        for answer in self._alone(sample):
                            yield place, answer
                        progress.update()
            yield from answered()

    def _failed(self, reason: str) -> dict[str, Any]:
        """The answer to a row that the pipeline never sees."""
        processor = self.recognize.processor
        task = processor.tasks.get(self.options.get("task") or processor.default_task)
        value = "score" if task is not None and task.kind == "regression" else "label"
        empty = dict.fromkeys((value, "probabilities", "median", "interval", "gate_weights", "seconds"))
        return {**empty, "warnings": [], "error": reason}

    def _parts(self, rows: dict[int, dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """The answers to rows of a table that are parts of one recording, by their place."""
        names = ("start", "end", "text", "speaker", "context", "speaker_clips")
        segments = [{name: row[name] for name in names if name in row} for row in rows.values()]
        options = {"batch_size": self.batch_size, "segments": segments, **self.options}
        waiting, reason = iter(rows.items()), ""
        for answer in self.recognize.answer_segments(next(iter(rows.values()))["media"], **options):
            if "segments" in answer:  # the one for the whole
                reason = answer["error"]
                break
            place, row = next(waiting)
            # A model without words answers parts without them.
            answer = {name: value for name, value in answer.items() if value is not None or name not in row["named"]}
            answer.pop("timestamp")
            yield place, _named(row) | answer
        for place, row in waiting:
            yield place, _named(row) | self._failed(reason)

    def _is_recording(self, sample: dict[str, Any]) -> bool:
        """Whether to divide a file. Words without times belong to a file as a whole, as a row of a table does."""
        if "named" in sample or sample.get("text") and not self.plan:
            return False
        return bool(self.plan) or not is_url(sample["file"]) and self.recognize.processor.is_long(sample["file"])

    def _clips(self, samples: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        if not samples:
            return
        inputs: Any = [_fields(sample) for sample in samples]
        options = {**self.options, "batch_size": self.batch_size}
        if self.num_workers and len(samples) > self.batch_size:
            inputs = Subset(inputs, range(len(inputs)))  # a data set is answered as it is read, a list as a whole
            options["num_workers"] = self.num_workers
        for sample, answer in zip(samples, self.recognize(inputs, **options), strict=True):
            yield _named(sample) | answer

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
