"""EGMF as a transformers pipeline: answers a task for a clip, with the code that is saved with the checkpoint.

recognize = pipeline("affect-recognition", model="DIR or Hub id", trust_remote_code=True)
recognize("clip.mp4", text="That is just great.")
"""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Pipeline, PreTrainedConfig


FIELDS = {"file", "audio", "video", "text", "speaker", "context", "speaker_clips"}
CLIP_FIELDS = {"file", "audio", "video"}


@contextmanager
def _collected(category: type[Warning], messages: list[Warning]) -> Iterator[None]:
    """Adds the warnings of a category to `messages` instead of issuing them. Other warnings are issued as usual."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", category)
            yield
    finally:
        for warning in caught:
            if warning.category is category:
                messages.append(warning.message)
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def gate_names(weights: dict[str, torch.Tensor], experts: list[str], modalities: list[str]) -> list[dict]:
    """Names the gate weights of each sample.

    `modality` has one weight per expert and modality, `expert` one per expert (mean over the pseudo tokens).
    """
    return [
        {
            "modality": {
                expert: dict(zip(modalities, map(float, row), strict=True))
                for expert, row in zip(experts, modality, strict=True)
            },
            "expert": dict(zip(experts, map(float, expert_rows.mean(0)), strict=True)),
        }
        for modality, expert_rows in zip(weights["modality"].cpu(), weights["expert"].cpu(), strict=True)
    ]


def adaptation_warning(config: PreTrainedConfig, modalities: Iterable[str], centred: Iterable[str]) -> str | None:
    """What to say if a model gets speakers' centers otherwise than in training; None if it gets them as in training.

    Args:
        config: Config of the model; one of an older version has no `speaker_adaptation`.
        modalities: The modalities of the sample, other than text.
        centred: The modalities with a center.
    """
    trained, given = getattr(config, "speaker_adaptation", False), set(centred)
    wrong = " and ".join(name for name in modalities if (name in given) != trained)
    if not wrong:
        return None
    got, wanted = ("no center", "one") if trained else ("a center", "none")
    return f"speaker_adaptation: got {got} of the speaker for {wrong}, wanted {wanted}, as the model was trained"


class _Batches(Dataset):
    """Samples, `size` at a time, preprocessed; the error of a batch that cannot be."""

    def __init__(self, preprocess: Callable[[list], dict], samples: list, size: int):
        self.preprocess, self.samples, self.size = preprocess, samples, size

    def __len__(self) -> int:
        return math.ceil(len(self.samples) / self.size)

    def __getitem__(self, index: int) -> dict[str, Any] | Exception:
        try:
            return self.preprocess(self.samples[index * self.size : (index + 1) * self.size])
        except Exception as error:  # the caller decides
            return error


def _as_it_is(item):
    return item


class AffectRecognitionPipeline(Pipeline):
    """Recognises the emotion or sentiment of a speaker in a clip: a label or a score, with its distribution.

    A sample is a file, or a mapping with some of the keys `file`, `audio`, `video`, `text`, `speaker` and `context`
    (see [`EGMFProcessor`]). The model uses the sound and the pictures of a file if the file has them and the model
    supports them. For a list of samples the pipeline returns a list. It processes `batch_size` samples at a time; the
    answer to a sample does not depend on the other samples.

    A model that was trained with speaker adaptation also needs the key `speaker_clips`: a list of clips of the same
    speaker, which may include the sample's own. Each is a file, or a mapping with some of the keys `file`, `audio` and
    `video`. The mean of these clips is subtracted from the sample. The result of `speaker_center(clips)` may replace
    the list.

    An answer is a dict:

    - `label` (classification) or `score` (regression: the mean of the distribution);
    - `probabilities` of all legal answers; `median` and `interval` (5 to 95 %) of a score, otherwise None;
    - `gate_weights`: the weights of the gate, by expert and modality, and by expert;
    - `seconds`: the length of the decoded sound or pictures, whichever is longer (None without media);
    - `warnings`: missing input, such as parts of a file, parts of a long text, or all modalities; speaker adaptation
      other than in training;
    - `error`: the reason if a sample could not be answered with `on_error="report"`. The other values are then None or
      empty.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_feature_extractor = False
    _load_image_processor = False
    _load_video_processor = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.processor.limit_length(self.model.config.text_config)

    def __call__(
        self, inputs: Any, batch_size: int | None = None, num_workers: int | None = None, **kwargs
    ) -> dict | list[dict] | Iterator[dict]:
        """Answers one sample or each sample of a list.

        Args:
            inputs: A sample or a list of samples. For an iterator of samples, the result is an iterator of answers in
                their order, each of which comes as soon as its batch is answered.
            batch_size: Number of samples that the model processes at a time; 8 by default.
            num_workers: Number of processes that decode the next batches while the model answers, at most two batches
                each; 0 by default. Samples that have `speaker_clips` of their own are decoded in this process.
            text, speaker, context, speaker_clips: Defaults for samples without these values. An error in the call's
                `speaker_clips` is always raised.
            task: Name of a task of the processor; by default the task that the model was trained on.
            on_error: `"raise"` (default) raises a MediaError for a file that cannot be read and a ValueError for an
                invalid argument. `"report"` returns the reason as the sample's `error` and continues.
        """
        if kwargs.get("speaker_clips") is not None:
            kwargs["speaker_clips"] = self.speaker_center(kwargs["speaker_clips"])  # once for all samples
        steps = self._sanitize_parameters(**kwargs)
        before, forward, after = (
            {**stored, **given}
            for stored, given in zip(
                (self._preprocess_params, self._forward_params, self._postprocess_params), steps, strict=True
            )
        )
        samples = list(inputs) if isinstance(inputs, list | Iterator) else [inputs]
        size = self._batch_size if batch_size is None else batch_size
        size = 8 if size is None else size
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"batch_size: got {size!r}, wanted a positive number of samples")
        task = before.get("task") or self.processor.default_task
        if task not in self.processor.tasks:
            raise ValueError(f"task: got {task!r}, wanted one of {', '.join(self.processor.tasks)}")
        workers = self._num_workers if num_workers is None else num_workers
        found = self._answers(samples, task, size, workers or 0, (before, forward, after))
        if isinstance(inputs, Iterator):
            return found
        answers = list(found)
        return answers if isinstance(inputs, list) else answers[0]

    def _answers(self, samples: list, task: str, size: int, workers: int, steps: tuple[dict, ...]) -> Iterator[dict]:
        """Yields the samples' answers."""
        before, forward, after = steps
        for index, prepared in enumerate(self.prepare(samples, size, workers, **before)):
            chunk = samples[index * size : (index + 1) * size]
            try:
                if isinstance(prepared, Exception):
                    raise prepared
                yield from self.postprocess(self.forward(prepared, **forward), **after)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                if before.get("on_error") != "report":
                    raise
                if len(chunk) == 1:
                    yield self._failed(str(error) or type(error).__name__, self.processor.tasks[task])
                else:  # find the failing sample: answer each one separately
                    yield from self._answers(chunk, task, 1, 0, steps)

    def prepare(self, samples: list, batch_size: int = 8, num_workers: int = 0, **options) -> Iterator[Any]:
        """Yields `preprocess` of the samples, a batch at a time, or the error that it raised.

        With `num_workers`, as many processes prepare the next batches, at most two each; arguments as in `__call__`.
        """
        batches = _Batches(partial(self.preprocess, **options), samples, batch_size)
        workers = min(num_workers, len(batches))
        if workers < 1 or any(isinstance(sample, Mapping) and sample.get("speaker_clips") for sample in samples):
            yield from (batches[index] for index in range(len(batches)))
            return
        # A process that has tokenised may only fork if this is set: its tokenizer's threads are not forked.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # Forked, so that the model is not copied; the workers do not use it.
        yield from DataLoader(batches, None, num_workers=workers, collate_fn=_as_it_is, multiprocessing_context="fork")

    def speaker_center(self, clips: Sequence | Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Computes a speaker's center from `speaker_clips`: the fields of [`EGMFModel.speaker_center`].

        A result of this method is returned unchanged.

        Raises:
            ValueError: If `clips` is no list of clips, or none of them has sound or pictures.
            MediaError: If a file cannot be read.
        """
        if isinstance(clips, Mapping) and clips and clips.keys() <= {"audio_center", "vision_center"}:
            return clips
        if not isinstance(clips, list | tuple) or not clips:
            raise ValueError(f"speaker_clips: got {clips!r}, wanted a list of files or clips of the speaker")
        center = self.model.model.speaker_center(map(self._speaker_batch, clips))
        if not center:
            raise ValueError("speaker_clips: got clips without sound and pictures, wanted some with either")
        return {name: value.cpu() for name, value in center.items()}

    def _speaker_batch(self, clip: Any) -> dict[str, torch.Tensor]:
        """The tower inputs of one of the speaker's clips."""
        clip = {"file": clip} if isinstance(clip, str | os.PathLike) else clip
        if not isinstance(clip, Mapping) or not clip.keys() <= CLIP_FIELDS:
            got = sorted(clip) if isinstance(clip, Mapping) else type(clip).__name__
            raise ValueError(
                f"speaker_clips: got {got}, wanted a file or a mapping with some of {sorted(CLIP_FIELDS)}"
            )
        inputs = self.processor.media_inputs([self._load(dict(clip))], return_tensors="pt")
        return {name: value.to(self.device) for name, value in inputs.items()}

    def _load(self, sample: dict) -> Any:
        """Removes the media of a sample and returns them decoded."""
        if (file := sample.pop("file", None)) is not None:
            return self.processor.load_file(file)
        return self.processor.load_media(sample.pop("audio", None), sample.pop("video", None))

    @staticmethod
    def _failed(error: str, task: Any) -> dict[str, Any]:
        """The result for a sample that could not be answered."""
        value = "label" if task.kind == "classification" else "score"
        empty = dict.fromkeys((value, "probabilities", "median", "interval", "gate_weights", "seconds"))
        return {**empty, "warnings": [], "error": error}

    def _sanitize_parameters(self, task=None, on_error=None, **shared):
        if unknown := shared.keys() - {"text", "speaker", "context", "speaker_clips"}:
            wanted = "text, speaker, context, task, on_error, speaker_clips"
            raise ValueError(f"affect-recognition: got {sorted(unknown)}, wanted {wanted}")
        if on_error not in (None, "raise", "report"):
            raise ValueError(f"on_error: got {on_error!r}, wanted 'raise' or 'report'")
        before = {"shared": shared, "task": task, "on_error": on_error}
        return {name: value for name, value in before.items() if value}, {}, {}

    def preprocess(self, samples: list, shared: Mapping = {}, task=None, on_error="raise") -> dict[str, Any]:
        task = self.processor.tasks[task or self.processor.default_task]
        reports, answered, columns = [], [], []
        centers: dict[int, Mapping] = {}  # by the identity of `speaker_clips`, which samples may share
        for sample in samples:
            sample = {"file": sample} if isinstance(sample, str | os.PathLike) else dict(sample)
            if unknown := sample.keys() - FIELDS:
                raise ValueError(
                    f"affect-recognition: a sample got {sorted(unknown)}, wanted some of {sorted(FIELDS)}"
                )
            sample = {**shared, **sample}
            report = {"seconds": None, "warnings": [], "error": None}
            reports.append(report)
            missing: list[Warning] = []
            with _collected(self.processor.media_warning, missing):
                try:
                    media, clips = self._load(sample), sample.pop("speaker_clips", None)
                    if clips is not None and id(clips) not in centers:
                        centers[id(clips)] = self.speaker_center(clips)
                except self.processor.media_error as error:
                    if on_error != "report":
                        raise
                    report["error"] = str(error)
                    continue
            durations = [clip.duration for clip in media if clip is not None and math.isfinite(clip.duration)]
            report |= {"seconds": max(durations, default=None), "warnings": list(map(str, missing))}
            if not str(sample.get("text") or "").strip() and not any(media):
                report["warnings"].append("there is no text, no sound and no picture: the answer is a guess")
            center = centers.get(id(clips), {})
            present = [name for name, clip in zip(("audio", "vision"), media, strict=True) if clip is not None]
            centred = [field.removesuffix("_center") for field in center]
            if warning := adaptation_warning(self.model.config, present, centred):
                report["warnings"].append(warning)
            columns.append(sample | media._asdict() | {"center": center})
            answered.append(report)
        if not columns:
            return {"reports": reports, "task": task, "inputs": None}
        names = ("text", "speaker", "context", "audio", "video")
        batch = {name: [column.get(name) for column in columns] for name in names}
        cut: list[Warning] = []
        with warnings.catch_warnings(), _collected(self.processor.text_warning, cut):
            warnings.simplefilter("ignore", self.processor.media_warning)  # the reports contain them already
            inputs = self.processor(task=task, **batch)
        for warning in cut:
            answered[warning.index]["warnings"].append(str(warning))
        return {"reports": reports, "task": task, "inputs": dict(inputs) | self._centers(columns, inputs)}

    @staticmethod
    def _centers(columns: list[dict], inputs: Mapping) -> dict[str, torch.Tensor]:
        """The centers of a batch, with zeros for samples that have none."""
        fields = {}
        for name in ("audio", "vision"):
            own = [column["center"].get(f"{name}_center") for column in columns]
            known = next((center for center in own if center is not None), None)
            if known is not None and f"{name}_mask" in inputs:
                fields[f"{name}_center"] = torch.cat([torch.zeros_like(known) if one is None else one for one in own])
        return fields

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        inputs, scores = model_inputs.pop("inputs"), None
        if inputs is not None:
            scores = dict(self.model.score_labels(self.processor.candidates(model_inputs["task"]), **inputs))
            scores.pop("past_key_values", None)  # only generation would need the cache
        return {**model_inputs, "scores": scores}

    def postprocess(self, outputs: dict[str, Any]) -> list[dict[str, Any]]:
        task, scores, config = outputs["task"], outputs["scores"], self.model.config
        results = iter(())
        if scores is not None:
            gates = gate_names(scores["gate_weights"], config.experts, config.modalities)
            results = zip(self.processor.summarize(scores["log_probs"], task), gates, strict=True)
        answers = []
        for report in outputs["reports"]:
            distribution, gate = (None, None) if report["error"] else next(results)
            value = distribution and (distribution.top if task.kind == "classification" else distribution.expected)
            answers.append(
                {
                    "label" if task.kind == "classification" else "score": value,
                    "probabilities": distribution and distribution.probabilities,
                    "median": distribution and distribution.median,
                    "interval": distribution and distribution.interval,
                    "gate_weights": gate,
                    **report,
                }
            )
        return answers


__all__ = ["AffectRecognitionPipeline"]
