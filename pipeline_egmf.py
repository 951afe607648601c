"""EGMF as a transformers pipeline: answers a task for a clip, with the code that is saved with the checkpoint.

recognize = pipeline("affect-recognition", model="DIR or Hub id", trust_remote_code=True)
recognize("clip.mp4", text="That is just great.")
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Pipeline, PreTrainedConfig
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator

from .media_inputs_egmf import Media
from .samples_egmf import as_media, as_sample, is_file
from .tasks_egmf import AffectTask  # only for types: the processor may have another copy of the code
from .timeline_egmf import TimelineMixin, best_answers


MEDIA = ("file", "audio", "video")
LACKING = {"no audio": "audio", "no video": "video"}  # what a file lacks, by the kind of its MediaError
WORDS = ("text", "speaker", "context")
# Seconds. The memory of an encoder without a window, such as WavLM, grows with the square of the length.
LONGEST_SOUND = 120.0
DATASETS = {"datasets.arrow_dataset", "datasets.iterable_dataset"}
SHARED = (*WORDS, "speaker_clips")
OPTIONS = (*SHARED, "task", "on_error", "top_k", "candidate_labels", "transcriber", "language")
TIMES = ("return_timestamps", "segments", "window", "hop")


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
        config: Config of the model.
        modalities: The modalities of the sample, other than text.
        centred: The modalities with a center.
    """
    trained, given = config.speaker_adaptation, set(centred)
    wrong = " and ".join(name for name in modalities if (name in given) != trained)
    if not wrong:
        return None
    got, wanted = ("no center", "one") if trained else ("a center", "none")
    return f"speaker_adaptation: got {got} of the speaker for {wrong}, wanted {wanted}, as the model was trained"


class AffectRecognitionPipeline(TimelineMixin, Pipeline):
    """Recognises the emotion or sentiment of a speaker in a clip: a label or a score, with its distribution.

    A sample is one of:

    - a file with sound, pictures or both: a path, a URL (http, https, or data: with base64), or its bytes;
    - an array of sound at the model's sampling rate, or `{"array" or "raw", "sampling_rate"}`. Channels are averaged;
    - a mapping with some of the keys `file`, `audio`, `video`, `text`, `speaker` and `context` (see
      [`EGMFProcessor`]), whose media have one of these forms;
    - a row of `datasets`, whose other columns are ignored.

    The model uses the sound and the pictures of a file if the file has them and the model supports them. For a list
    of samples the pipeline returns a list; for a data set (`datasets.Dataset`, `KeyDataset`) or a generator it returns
    an iterator, which answers as it is read. The answer to a sample does not depend on the other samples.

    A model that was trained with speaker adaptation also needs the key `speaker_clips`: a list of clips of the same
    speaker, which may include the sample's own. Each is a file, or a mapping with some of the keys `file`, `audio` and
    `video`. The sample is normalised by the mean and the deviation of these clips. The result of
    `speaker_center(clips)` may replace the list.

    An answer is a dict:

    - `label` (classification) or `score` (regression: the mean of the distribution);
    - `probabilities` of all legal answers; `median` and `interval` (5 to 95 %) of a score, otherwise None;
    - `gate_weights`: the weights of the gate, by expert and modality, and by expert;
    - `seconds`: the length of the decoded sound or pictures, whichever is longer (None without media);
    - `warnings`: missing input, such as parts of a file, parts of a long text, or all modalities; words for a model
      that was trained without; speaker adaptation or labels other than in training;
    - `error`: the reason if a sample could not be answered with `on_error="report"`. The other values are then None or
      empty.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_feature_extractor = False
    _load_image_processor = False
    _load_video_processor = False

    def __init__(self, *args, **kwargs):
        self._transcribers: dict[tuple[str, str | None], Any] = {}
        super().__init__(*args, **kwargs)
        self.processor.limit_length(self.model.config.text_config)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Saves the model and its processor, which `transformers.Pipeline` would leave out."""
        self.model.save_pretrained(save_directory, **kwargs)
        hub = ("push_to_hub", "repo_id", "token", "private", "revision", "commit_message", "create_pr")
        self.processor.save_pretrained(save_directory, **{name: kwargs[name] for name in hub if name in kwargs})

    def __call__(
        self, inputs: Any = None, batch_size: int | None = None, num_workers: int | None = None, **kwargs
    ) -> dict | list[dict] | Iterator[dict]:
        """Answers one sample, or each sample of a list, a data set or a generator.

        Args:
            inputs: A sample, a list of samples, a data set or an iterator of samples; nothing for the call's `text`.
            batch_size: Number of samples that the model processes at a time: by default 1 for an iterator, else 8.
            num_workers: Number of processes that read the samples; by default 0, this process. An iterator is read by
                at most one.
            text, speaker, context, speaker_clips: Defaults for samples without these values. An error in the call's
                `speaker_clips` is always raised.
            task: Name of a task of the processor; by default the task that the model was trained on.
            candidate_labels: The labels to choose among: some of the task's labels, or your own, which the model then
                answers without having been trained on them.
            transcriber: Folder or Hub id of a speech recognition model of transformers, which recognises the words of
                samples without `text`. The answer then has `text`, `language` and `recognized_by`. Its segments are
                the default of `segments`.
            language: Language of the speech, such as "en", for multilingual transcribers; by default they detect it.
            top_k: Number of answers in `probabilities`, the most probable first; by default all, in the task's order.
            return_timestamps: Whether to answer along a recording: the answer is then one for the whole and has
                `chunks`, the answers to its segments. `segments`, `window` and `hop` are those of `answer_segments()`,
                which yields the answers while the file is read.
            on_error: `"raise"` (default) raises a MediaError for a file that cannot be read and a ValueError for an
                invalid argument. `"report"` returns the reason as the sample's `error` and continues.
        """
        if inputs is None:
            if kwargs.get("text") is None:
                raise ValueError("affect-recognition: a sample got nothing, wanted one, or `text`")
            inputs = {"text": kwargs["text"]}
        if kwargs.get("speaker_clips") is not None:
            kwargs["speaker_clips"] = self.speaker_center(kwargs["speaker_clips"])  # once for all samples
        before, timed, after = self._parameters(**kwargs)
        is_stream = isinstance(inputs, Iterator | IterableDataset) or _is_dataset(inputs) and not _has_size(inputs)
        is_single = not is_stream and not _is_dataset(inputs) and not isinstance(inputs, list | tuple)
        size = self._size(batch_size, 1 if is_stream else 8)
        workers = (self._num_workers or 0) if num_workers is None else num_workers
        if not isinstance(workers, int) or workers < 0:
            raise ValueError(f"num_workers: got {workers!r}, wanted a number of processes from 0")

        if is_single:
            inputs = [inputs]
        if timed.pop("return_timestamps", False):
            if "segments" in timed and not is_single:
                raise ValueError("segments: got a list of samples, wanted the one recording that they divide")
            answers = (self._with_chunks(sample, size, timed, kwargs, _is_dataset(inputs)) for sample in inputs)
        elif timed:
            raise ValueError(
                f"{next(iter(timed))}: got a value without return_timestamps, wanted return_timestamps=True"
            )
        else:
            own = {"is_row": _is_dataset(inputs), "is_transcribed": "transcriber" in after}
            prepared = (PipelineIterator if is_stream else PipelineDataset)(inputs, self.preprocess, before | own)
            workers = min(workers, 1 if is_stream else len(inputs))
            answers = self._answers(prepared, size, workers, after)
        if is_single:
            return next(iter(answers))
        return list(answers) if isinstance(inputs, list | tuple) else answers

    def _with_chunks(self, sample: Any, size: int, timed: dict, options: dict, is_row: bool) -> dict[str, Any]:
        """The answer to a recording, with those to its segments."""
        options = {name: value for name, value in options.items() if name not in TIMES}
        try:
            sample = as_sample(sample, self._sampling_rate, is_row)
            *chunks, whole = self.answer_segments(sample, batch_size=size, **timed, **options)
        except (ValueError, self.processor.media_error) as error:
            after = self._parameters(**options)[2]
            if after["on_error"] != "report":
                raise
            whole, chunks = self._failed(error, after["task"]), []
        return {**whole, "chunks": chunks}

    def _size(self, batch_size: int | None, default: int = 8) -> int:
        size = self._batch_size if batch_size is None else batch_size
        size = default if size is None else size
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"batch_size: got {size!r}, wanted a positive number of samples")
        return size

    def _parameters(self, **kwargs) -> list[dict]:
        """The parameters of the three steps: those of the call over those of the pipeline."""
        stored = self._preprocess_params, self._forward_params, self._postprocess_params
        given = self._sanitize_parameters(**kwargs)
        before, forward, after = ({**a, **b} for a, b in zip(stored, given, strict=True))
        before["shared"] = {**stored[0]["shared"], **given[0]["shared"]}
        after.setdefault("on_error", "raise")
        after["task"] = self._task(after.get("task"), after.pop("candidate_labels", None))
        return [before, forward, after]

    def _answers(self, prepared: Dataset, size: int, workers: int, after: Mapping) -> Iterator[dict]:
        """Yields the answers to prepared samples, which the model processes in batches of `size`."""
        if workers:  # tokenizers warn about processes that are forked after they used threads
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        for batch in DataLoader(prepared, batch_size=size, num_workers=workers, collate_fn=list):
            yield from self._answer(batch, **after)

    def _answer(self, batch: list[dict], **after) -> list[dict]:
        """The answers to a batch of prepared samples; if one fails in the model, each is answered separately."""
        try:
            for one in batch:
                if one["error"] is not None and after["on_error"] != "report":
                    raise one["error"]
            outputs = self.forward(self._collate(batch, after["task"], after.get("transcriber")))
            return self.postprocess(outputs, after["task"], after.get("top_k"))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if after["on_error"] != "report":
                raise
            if len(batch) == 1:
                return [self._failed(error, after["task"])]
            return [answer for one in batch for answer in self._answer([one], **after)]

    def speaker_center(self, clips: Iterable | Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Computes a speaker's center from `speaker_clips`: the fields of [`EGMFModel.speaker_center`].

        `clips` may also be an iterator of them. A result of this method is returned unchanged.

        Raises:
            ValueError: If `clips` is no list of clips, or none of them has sound or pictures.
            MediaError: If a file cannot be read.
        """
        if isinstance(clips, Mapping) and clips and clips.keys() <= {"audio_center", "vision_center"}:
            return clips
        if not isinstance(clips, list | tuple | Iterator) or not clips:
            raise ValueError(f"speaker_clips: got {clips!r}, wanted a list of files or clips of the speaker")
        center = self.model.model.speaker_center(map(self._speaker_batch, clips))
        if not center:
            raise ValueError("speaker_clips: got clips without sound and pictures, wanted some with either")
        return {name: value.cpu() for name, value in center.items()}

    def _speaker_batch(self, clip: Any) -> dict[str, torch.Tensor]:
        """The tower inputs of one of the speaker's clips."""
        try:
            sample = as_sample(clip, self._sampling_rate)
        except ValueError as error:
            raise ValueError(f"speaker_clips: {error}") from None
        if not sample.keys() <= set(MEDIA):
            wanted = f"a file or a mapping with some of {sorted(MEDIA)}"
            raise ValueError(f"speaker_clips: got {sorted(sample)}, wanted {wanted}")
        inputs = self.processor.media_inputs([self._load(sample)], return_tensors="pt")
        return {name: value.to(self.device) for name, value in inputs.items()}

    def _load(self, sample: dict, needs_media: bool = True) -> Media:
        """Removes the media of a sample and returns them decoded; a model of words may need none.

        Raises:
            MediaError: If a file cannot be read, or its sound is too long for an encoder without a window.
        """
        if not needs_media and self._is_deaf:
            for name in MEDIA:
                sample.pop(name, None)
        given = [sample.pop(name, None) for name in ("file", "audio", "video")]
        clips = self.processor.load_media(*given[1:]) if given[0] is None else self.processor.load_file(given[0])
        seconds = 0.0 if clips.audio is None else clips.audio.duration
        if seconds > LONGEST_SOUND and self.processor.audio_window == math.inf:
            got = f"it has {seconds:.0f} seconds of sound, and the model hears at most {LONGEST_SOUND:g} at once"
            source = next(one for one in given if one is not None)
            name = source if is_file(source) and not isinstance(source, bytes) else "the sound"
            raise self.processor.media_error(name, "too large", f"{got}: divide it into parts")
        return clips

    @staticmethod
    def _failed(error: Exception, task: AffectTask) -> dict[str, Any]:
        """The result for a sample that could not be answered."""
        value = "label" if task.kind == "classification" else "score"
        empty = dict.fromkeys((value, "probabilities", "median", "interval", "gate_weights", "seconds"))
        return {**empty, "warnings": [], "error": str(error) or type(error).__name__}

    def _sanitize_parameters(self, **given):
        if unknown := given.keys() - {*OPTIONS, *TIMES}:
            wanted = ", ".join((*OPTIONS, *TIMES))
            raise ValueError(f"affect-recognition: got {sorted(unknown)}, wanted {wanted}")
        given = {name: value for name, value in given.items() if value is not None}
        if not isinstance(given.get("return_timestamps", False), bool):
            raise ValueError(f"return_timestamps: got {given['return_timestamps']!r}, wanted true or false")
        if given.get("on_error", "raise") not in ("raise", "report"):
            raise ValueError(f"on_error: got {given['on_error']!r}, wanted 'raise' or 'report'")
        top = given.get("top_k", 1)
        if isinstance(top, bool) or not isinstance(top, int) or top < 1:
            raise ValueError(f"top_k: got {top!r}, wanted a positive number of answers")
        after = {name: given.pop(name) for name in ("task", "top_k", "candidate_labels", "on_error") if name in given}
        transcriber, language = given.pop("transcriber", None), given.pop("language", None)
        if language and not isinstance(transcriber, str | os.PathLike):
            raise ValueError(f"language: got {language!r} without a transcriber's name, wanted both")
        if transcriber is not None and not self._reads_text:
            raise ValueError("transcriber: got one, wanted none: the model was trained without words")
        if isinstance(transcriber, str | os.PathLike):
            key = os.fspath(transcriber), language
            if key not in self._transcribers:
                self._transcribers[key] = self.processor.transcriber_class(*key, device=self.device)
                self._transcribers[key].load()  # a wrong model is no error of a sample
            transcriber = self._transcribers[key]
        if transcriber is not None:
            after["transcriber"] = transcriber
        timed = {name: given.pop(name) for name in TIMES if name in given}
        return {"shared": given}, timed, after

    def _task(self, name: str | None, candidate_labels: Sequence[str] | None) -> AffectTask:
        """The task to ask, with the user's labels instead of its own if there are any."""
        name = name or self.processor.default_task
        if not isinstance(name, str) or name not in self.processor.tasks:
            raise ValueError(f"task: got {name!r}, wanted one of {', '.join(self.processor.tasks)}")
        task = self.processor.tasks[name]
        if candidate_labels is None:
            return task
        labels = tuple(candidate_labels) if isinstance(candidate_labels, list | tuple) else ()
        if not all(isinstance(label, str) and label.strip() for label in labels) or len(set(labels)) < 2:
            raise ValueError(f"candidate_labels: got {candidate_labels!r}, wanted a list of two or more labels")
        if set(labels) <= set(task.labels or ()):
            return replace(task, labels=labels)
        asked = (
            {"prompt": task.prompt, "cue": task.cue} if task.kind == "classification" else {"prompt": "", "cue": ""}
        )
        own = {"name": "candidate_labels", "kind": "classification", "labels": labels}
        return replace(task, **own, **asked, low=None, high=None, step=None)

    def preprocess(
        self, sample: Any, shared: Mapping = {}, is_row: bool = False, is_transcribed: bool = False
    ) -> dict[str, Any]:
        """Reads one sample; it may run in another process.

        Returns:
            `fields` with the `media` as tower inputs and, for a transcriber, the `source` of the sound; `report` (the
            answer's `seconds` and `warnings`); and `error`: None, or the exception that the sample caused.
        """
        try:
            fields = {**shared, **as_sample(sample, self._sampling_rate, is_row)}
            if is_transcribed:
                # Pictures have sound only if they are a file.
                sounds = (fields.get(name) for name in MEDIA if name != "video" or is_file(as_media(fields.get(name))))
                fields["source"] = next((sound for sound in sounds if sound is not None), None)
            with self.processor.kept_warnings() as missing:
                clips, lacking = self._load_beside_words(fields, needs_media=not is_transcribed)
                media = self.processor.tower_inputs(clips)
        except Exception as error:
            return {"error": error}
        durations = [clip.duration for clip in clips if clip is not None and math.isfinite(clip.duration)]
        report = {"seconds": max(durations, default=None), "warnings": [*map(str, missing), *lacking]}
        return {"fields": {**fields, "media": media}, "report": report, "error": None}

    def _load_beside_words(self, fields: dict, needs_media: bool) -> tuple[Media, list[str]]:
        """A sample's media, and what to say if a file lacks what the model reads: beside words it may be missing."""
        given, lacking = {name: fields[name] for name in MEDIA if name in fields}, []
        while True:
            try:
                return self._load(fields, needs_media), lacking
            except self.processor.media_error as error:
                lost = "file" if "file" in given else LACKING.get(error.kind)
                if error.kind not in LACKING or lost not in given or not str(fields.get("text") or "").strip():
                    raise
                lacking.append(str(error))
                del given[lost]
                fields |= given

    @property
    def _is_deaf(self) -> bool:
        """Whether the model reads only words."""
        return self.processor.feature_extractor is None and self.processor.image_processor is None

    @property
    def _reads_text(self) -> bool:
        return "text" in (self.processor.trained_modalities or ["text"])

    @property
    def _features(self) -> list[str]:
        """The modalities that the model reads as precomputed features, which a sample cannot have."""
        sizes = {name: getattr(self.model.config, f"{name}_feature_size") for name in ("audio", "vision")}
        return [name for name, size in sizes.items() if size is not None]

    @property
    def _sampling_rate(self) -> int | None:
        return getattr(self.processor.feature_extractor, "sampling_rate", None)

    def _collate(self, batch: list[dict], task: AffectTask, transcriber: Any = None) -> dict[str, Any]:
        """The model's inputs for prepared samples (None if all have an error), and their reports."""
        reports, columns = [], []
        features = self._features
        centers: dict[int, Mapping] = {}  # by the identity of `speaker_clips`, which samples may share
        tasks = self.processor.tasks
        trained = {label for name in self.processor.trained_tasks or tasks for label in tasks[name].answers}
        untrained = [repr(label) for label in task.answers if label not in trained]
        for one in batch:
            if one["error"] is not None:
                reports.append({"seconds": None, "warnings": [], "error": str(one["error"])})
                continue
            fields, report = one["fields"], {**one["report"], "warnings": [*one["report"]["warnings"]], "error": None}
            if transcriber is not None and not fields.get("text"):
                words = self._recognized(transcriber, fields["source"])
                words.pop("chunks", None)
                fields, report = {**fields, **words}, {**words, **report}
            if not self._reads_text and any(fields.get(name) for name in WORDS):
                fields = {name: value for name, value in fields.items() if name not in WORDS}
                report["warnings"].append("the model was trained without words: text, speaker and context are ignored")
            if features:
                known = f"the model reads {' and '.join(features)} as precomputed features"
                report["warnings"].append(f"{known}, and none were given")
            media, clips = fields["media"], fields.get("speaker_clips")
            if clips is not None and id(clips) not in centers:
                centers[id(clips)] = self.speaker_center(clips)
            center = centers.get(id(clips), {})
            if not str(fields.get("text") or "").strip() and not any(media):
                report["warnings"].append("there is no text, no sound and no picture: the answer is a guess")
            present = [name for name, clip in zip(("audio", "vision"), media, strict=True) if clip is not None]
            centred = [field.removesuffix("_center") for field in center]
            if warning := adaptation_warning(self.model.config, present, centred):
                report["warnings"].append(warning)
            if untrained:
                report["warnings"].append(f"the model was not trained on the labels {', '.join(untrained)}")
            columns.append(fields | media._asdict() | {"center": center})
            reports.append(report)
        if not columns:
            return {"reports": reports, "task": task, "inputs": None}
        answered = [report for report in reports if report["error"] is None]
        names = ("text", "speaker", "context", "audio", "video")
        fields = {name: [column.get(name) for column in columns] for name in names}
        with self.processor.kept_warnings() as cut:  # texts that are too long
            inputs = self.processor(task=task, **fields)
        for warning in cut:
            answered[warning.index]["warnings"].append(str(warning))
        return {"reports": reports, "task": task, "inputs": dict(inputs) | self._centers(columns, inputs)}

    def _recognized(self, transcriber: Any, source: Any, progress: Any = None) -> dict[str, Any]:
        """The words of a sample's sound, as a transcriber returns them; empty without sound."""
        try:
            return transcriber(source, progress) if source is not None else {}
        except self.processor.media_error as error:
            if error.kind != "no audio":
                raise
            return {}

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

    def postprocess(self, outputs: dict[str, Any], task: AffectTask, top_k: int | None = None):
        """The answers to a batch."""
        scores, config = outputs["scores"], self.model.config
        results = iter(())
        if scores is not None:
            gates = gate_names(scores["gate_weights"], config.experts, config.modalities)
            results = zip(self.processor.summarize(scores["log_probs"], task), gates, strict=True)
        answers = []
        for report in outputs["reports"]:
            distribution, gate = (None, None) if report["error"] else next(results)
            answer = {**self._values(task, distribution), "gate_weights": gate, **report}
            answers.append(best_answers(answer, top_k))
        return answers

    @staticmethod
    def _values(task: AffectTask, distribution: Any) -> dict[str, Any]:
        """An answer's values from its distribution; all None without one."""
        value = distribution and (distribution.top if task.kind == "classification" else distribution.expected)
        return {
            "label" if task.kind == "classification" else "score": value,
            "probabilities": distribution and distribution.probabilities,
            "median": distribution and distribution.median,
            "interval": distribution and distribution.interval,
        }


def _is_dataset(inputs: Any) -> bool:
    """Whether inputs are a data set: torch's, such as `KeyDataset`, or one of `datasets`."""
    return isinstance(inputs, Dataset) or type(inputs).__module__ in DATASETS


def _has_size(inputs: Any) -> bool:
    return hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__")


__all__ = ["AffectRecognitionPipeline"]
