"""EGMF's processor: a question about an utterance becomes model inputs, generated tokens become labels or scores.

`EGMFProcessor` lays out one utterance with its context, its sound and its pictures (files, arrays, or features made
beforehand), for a task of `tasks_egmf.py`, and offers everything that reads answers: the candidates that the model
scores, a logits processor that admits legal answers only, and the reading of generated text and of distributions.

The paper (arXiv 2601.07565) asks an LLM with a prompt and pseudo tokens; the layout and the wording below are this
implementation's own choice.
"""

import os
import warnings
from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers import LogitsProcessorList
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin


try:
    from .media_egmf import AudioClip, MediaError, VideoClip, load_audio, load_video
    from .tasks_egmf import BUILTIN_TASKS, AffectTask, AnswerConstraint, AnswerDistribution, AnswerText
except ImportError:
    from media_egmf import AudioClip, MediaError, VideoClip, load_audio, load_video
    from tasks_egmf import BUILTIN_TASKS, AffectTask, AnswerConstraint, AnswerDistribution, AnswerText


# How each language writes a line: what follows a name, what follows a colon, and the head of the later lines.
COLON = {"en": ":", "zh": "："}
SPACE = {"en": " ", "zh": ""}
FOLLOWING = {"en": "Afterwards:\n", "zh": "之后：\n"}

# Spare special tokens, by what their names contain; the first pattern that matches wins.
SPARE_TOKENS = ("pseudo", "reserved", "unused", "placeholder", "extra", "empty_output", "_pad")
NEW_PSEUDO_TOKEN = "<|pseudo|>"


class MediaWarning(UserWarning):
    """Something of a file is missing from what the model is given."""


class Media(NamedTuple):
    """One sample's decoded sound and pictures; None where there are none."""

    audio: AudioClip | None = None
    video: VideoClip | None = None


class EGMFProcessor(ProcessorMixin):
    """Turns utterances into the inputs of EGMF, and its answers into labels and scores.

    One sample becomes one sequence:

        [bos] prompt \\n context lines [following lines] K x pseudo token \\n [Speaker:] utterance \\n cue [answer eos]

    What stands in front of the pseudo tokens conditions the gate. The utterance comes after them, so that the LLM
    reads it with the fused modalities in view. The pieces are tokenised one by one, and special tokens inside a user's
    text stay plain text, so nobody can write a placeholder. White space in a text, line ends included, is folded.

    Args:
        tokenizer: The LLM's tokenizer.
        feature_extractor: The audio tower's, None where the model has no audio tower.
        image_processor: The vision tower's, likewise, with the PIL backend.
        pseudo_token: The placeholder of the pseudo tokens. None takes a spare special token of the tokenizer, or else
            adds `"<|pseudo|>"` to it; the LLM's embeddings then have to be resized to `len(tokenizer)`.
        num_pseudo_tokens: Number K of placeholders per sample.
        num_frames: How many frames of a video are read, spread evenly over it.
        tasks: The user's own tasks, `{name: AffectTask or dict of its fields}`, beside the built-in ones.
        max_context_tokens: Budget of the context and following lines together. While they exceed it, the utterance
            farthest from the one in question is dropped whole (of two equally far ones, the following one).
        default_task: What is asked where no task is named: the one that the model was trained on.
        chat_template: Kept for the tokenizer's sake; EGMF's own sequences do not use it.
    """

    text_kwargs = {"padding_side": "left"}
    # What this code raises and gives: a checkpoint's code and a clone's are loaded apart, with classes of their own.
    media_error, media_warning = MediaError, MediaWarning

    def __init__(
        self,
        tokenizer=None,
        feature_extractor=None,
        image_processor=None,
        pseudo_token: str | None = None,
        num_pseudo_tokens: int = 8,
        num_frames: int = 16,
        tasks: dict[str, Any] | None = None,
        max_context_tokens: int = 256,
        default_task: str | None = None,
        chat_template=None,
    ):
        super().__init__(tokenizer, chat_template=chat_template or getattr(tokenizer, "chat_template", None))
        self.pseudo_token = pseudo_token or self.find_pseudo_token(tokenizer) or NEW_PSEUDO_TOKEN
        if tokenizer.eos_token is None or self.pseudo_token in _used_tokens(tokenizer):
            used = _used_tokens(tokenizer)
            raise ValueError(
                f"EGMF needs an `eos_token` and a `pseudo_token` ({self.pseudo_token!r}) apart from {used}."
            )
        # A token that is there already keeps its id; being special is what keeps users' texts clear of it.
        tokenizer.add_tokens([self.pseudo_token], special_tokens=True)
        self.feature_extractor = _sub_processor("feature_extractor", feature_extractor)
        self.image_processor = _sub_processor("image_processor", image_processor)
        self.num_pseudo_tokens = num_pseudo_tokens
        self.num_frames = num_frames
        self.max_context_tokens = max_context_tokens
        self.tasks = dict(BUILTIN_TASKS)
        for name, task in (tasks or {}).items():
            task = task if isinstance(task, AffectTask) else AffectTask.from_dict({"name": name, **task})
            if task.name != name:
                raise ValueError(f"`tasks[{name!r}]` holds a task of another name, {task.name!r}.")
            self.tasks[name] = task
        self.default_task = default_task
        if default_task is not None:
            self._task(default_task)

        self._special_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids -= {tokenizer.unk_token_id} - {tokenizer.eos_token_id, self.pseudo_token_id}
        self._pieces: dict[str, list[int]] = {}
        self._answer_ids: dict[AffectTask, list[list[int]]] = {}
        # What the tokenizer puts in front of a text by default: often bos, often nothing.
        letter, full = self._piece("a"), tokenizer("a")["input_ids"]
        self._start_ids = full[: full.index(letter[0])] if letter and letter[0] in full else []

    @classmethod
    def get_attributes(cls) -> list[str]:
        # The other two may be None, which ProcessorMixin does not foresee; processor_config.json holds them as well.
        return ["tokenizer"]

    @staticmethod
    def find_pseudo_token(tokenizer) -> str | None:
        """A spare special token that `tokenizer` already has, never one it uses itself; None if there is none."""
        used = _used_tokens(tokenizer)
        special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
        spare = (token for pattern in SPARE_TOKENS for token in special if pattern in token and token not in used)
        return next(spare, None)

    @property
    def pseudo_token_id(self) -> int:
        """Token id of the placeholders, the model's `config.pseudo_token_id`."""
        return self.tokenizer.convert_tokens_to_ids(self.pseudo_token)

    @property
    def model_input_names(self) -> list[str]:
        media = [f"{name}_{part}" for name in ("audio", "vision") for part in ("features", "mask", "times")]
        towers = [part.model_input_names[0] for part in (self.feature_extractor, self.image_processor) if part]
        return ["input_ids", "attention_mask", "utterance_mask", *media, *towers]

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "tasks": {name: task.to_dict() for name, task in self.tasks.items()}}

    def __call__(
        self,
        text: str | Sequence[str | None] | None = None,
        context: Sequence | None = None,
        following: Sequence | None = None,
        speaker: str | Sequence[str | None] | None = None,
        audio: Any = None,
        video: Any = None,
        audio_features: Any = None,
        vision_features: Any = None,
        audio_times: Any = None,
        vision_times: Any = None,
        task: "str | AffectTask | Sequence[str | AffectTask] | None" = None,
        answer: Any = None,
        return_tensors: str | None = "pt",
        **kwargs,
    ) -> BatchFeature:
        """Model inputs of one sample, or of a batch if `text` (without text: media or features) is a list of samples.

        In a batch every argument is None or a list with one entry per sample; a single `task` serves all samples.
        A missing modality is None (for text also ""), and always legal.

        Args:
            text: The utterance.
            context: Per sample the preceding utterances, oldest first: strings or `{"speaker", "text"}` dicts.
            following: Per sample the utterances after it, nearest first, in the same form.
            speaker: Who says the utterance.
            audio: Per sample a file with sound, an [`AudioClip`], or `{"array", "sampling_rate"}`, mono (samples,).
            video: Per sample a file with pictures, a [`VideoClip`], or an array of RGB frames (F, height, width, 3),
                uint8. The sound track of a video file is the sample's audio unless one is given.
            audio_features, vision_features: Per sample an array `(T, D)` of finite numbers, `T` >= 1; for a model with
                a tower the tower's hidden layers `(T, layers + 1, D)`.
            audio_times, vision_times: Per sample the seconds `(T,)` of the features' rows; NaN where unknown.
            task: Name of a task in `tasks`, or an `AffectTask`; by default `default_task`.
            answer: The label or score to learn; adds `labels`, and the answer and EOS to the sequence.
            return_tensors: `"pt"`, or `"np"` or None for numpy arrays.
            sound_track: Whether a video file's own sound is used; True by default.
            padding_side: `"left"` (default, what generation needs) or `"right"`; also inside `text_kwargs`.

        Returns:
            Padded to the longest sequence L, clip T: `input_ids`, `attention_mask`, `utterance_mask` (1 on the tokens
            of the utterance, a space in front of it included) and, given answers, `labels` (-100 except on the answer
            and EOS), all `(B, L)` int64; where the batch has audio, `audio_features` `(B, T, D)` float32 padded with
            zeros on the right, `audio_mask` `(B, T)` int64, `audio_times` `(B, T)` float32 (NaN: unknown or padding);
            the same for vision. Media come as what the towers read, `input_features` or `input_values` with
            `audio_mask`, and `pixel_values` `(B, F, 3, height, width)` with `vision_mask` and `vision_times` `(B, F)`.

        Raises:
            ValueError: If an argument is not as described; the message names it, what it got and what it wanted.
            MediaError: If a file cannot be read. What is missing from one that can be is a `MediaWarning`.
        """
        options = {**self.text_kwargs, **kwargs.pop("text_kwargs", {}), **kwargs}
        padding_side, sound_track = options.pop("padding_side"), options.pop("sound_track", True)
        if options or padding_side not in ("left", "right"):
            wanted = "`padding_side` 'left' or 'right', `sound_track`, and no other option"
            raise ValueError(f"EGMFProcessor wanted {wanted}, got {padding_side!r} and {options}.")

        columns = dict(text=text, context=context, following=following, speaker=speaker, task=task, answer=answer)
        columns.update(audio=audio, video=video, audio_features=audio_features, audio_times=audio_times)
        columns.update(vision_features=vision_features, vision_times=vision_times)
        columns = _as_columns(columns) if _is_batch(columns) else {name: [value] for name, value in columns.items()}
        tasks = [self._task(self.default_task if one is None else one) for one in columns["task"]]

        rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "utterance_mask": []}
        if answer is not None:
            rows["labels"] = []
        for i, one in enumerate(tasks):
            before, utterance, after = self._layout(i, columns, one)
            if answer is not None:
                target = [*self.answer_ids(one, columns["answer"][i]), self.tokenizer.eos_token_id]
                rows["labels"].append([-100] * len(before + utterance + after) + target)
                after = after + target
            rows["input_ids"].append(before + utterance + after)
            rows["attention_mask"].append([1] * len(before + utterance + after))
            rows["utterance_mask"].append([0] * len(before) + [1] * len(utterance) + [0] * len(after))

        # Padding is masked, so that EOS will do where there is no token for it.
        no_pad = self.tokenizer.pad_token_id is None
        fill = {"input_ids": self.tokenizer.eos_token_id if no_pad else self.tokenizer.pad_token_id, "labels": -100}
        data = {name: _pad(values, fill.get(name, 0), padding_side) for name, values in rows.items()}
        for modality in ("audio", "vision"):
            data.update(_stack(modality, columns[f"{modality}_features"], columns[f"{modality}_times"]))
        clips = zip(columns["audio"], columns["video"], strict=True)
        media = self.media_inputs([self.load_media(*clip, sound_track, f"[{i}]") for i, clip in enumerate(clips)])
        if both := media.keys() & data.keys():
            name = min(both).replace("mask", "features")
            raise ValueError(f"`{name}` got values beside media, wanted one of the two in a batch.")
        return BatchFeature({**data, **media}, tensor_type=return_tensors)

    def load_file(self, path: str | os.PathLike) -> Media:
        """A file's sound and pictures, whichever it has and the model takes; a MediaError if that is nothing."""
        loaders = {"audio": self._audio_clip, "video": self._video_clip}
        if self.feature_extractor is None:
            loaders.pop("audio")
        if self.image_processor is None:
            loaders.pop("video")
        found, error = {}, MediaError(path, "not media", "the model takes neither sound nor pictures")
        for name, load in loaders.items():
            try:
                found[name] = load(name, path)
            except MediaError as raised:
                error = raised
                if raised.kind != f"no {name}":
                    raise
        if not found:
            raise error
        return Media(**found)

    def media_inputs(self, media: list[Media], return_tensors: str | None = None) -> BatchFeature:
        """What the towers read of loaded clips, without a prompt; empty if there is neither sound nor picture."""
        inputs = self._audio_inputs([clip.audio for clip in media])
        inputs.update(self._vision_inputs([clip.video for clip in media]))
        return BatchFeature(inputs, tensor_type=return_tensors)

    def load_media(self, audio: Any = None, video: Any = None, sound_track: bool = True, index: str = "") -> Media:
        """One sample's `audio` and `video`, as `__call__` takes them, decoded; it takes the clips in their place."""
        heard = sound_track and _is_path(video) and self.feature_extractor is not None
        if audio is not None and self.feature_extractor is None:
            raise ValueError(f"`audio{index}` got a value, wanted None: the processor has no `feature_extractor`.")
        if video is not None and self.image_processor is None and not heard:
            raise ValueError(f"`video{index}` got a value, wanted None: the processor has no `image_processor`.")
        pictures = self._video_clip(f"video{index}", video)
        if audio is None and heard:
            try:
                return Media(self._audio_clip(f"audio{index}", video), pictures)
            except MediaError as error:
                if error.kind != "no audio":  # that is legal, and nothing is missing
                    warnings.warn(MediaWarning(str(error)), stacklevel=3)
        return Media(self._audio_clip(f"audio{index}", audio), pictures)

    def _audio_clip(self, name: str, value: Any) -> AudioClip | None:
        if value is None:
            return None
        rate = self.feature_extractor.sampling_rate
        if _is_path(value):
            name, value = os.fspath(value), _reported(value, load_audio(value, rate))
        if isinstance(value, dict) and {"array", "sampling_rate"} <= value.keys():
            samples = _array(f"{name}['array']", value["array"], 1, "an array (samples)")
            value = AudioClip(samples, value["sampling_rate"], [])
        if not hasattr(value, "samples"):  # by its form, as the class may be another copy's
            wanted = "a file, an AudioClip or a dict of `array` and `sampling_rate`"
            raise ValueError(f"`{name}` must be {wanted}, got {type(value).__name__}.")
        if not value.samples.size or not np.isfinite(value.samples).all():
            raise ValueError(f"`{name}` must have samples, all finite, got {value.samples.size} with NaN or infinity.")
        if value.sampling_rate != rate:
            try:  # transformers makes users install what is imported outside of one
                import soxr
            except ImportError as error:
                raise ImportError(
                    f"`{name}` is at {value.sampling_rate} Hz, the model hears {rate}: needs soxr"
                ) from error
            value = AudioClip(soxr.resample(value.samples, value.sampling_rate, rate), rate, value.warnings)
        if value.duration > self.audio_window + 0.1:
            message = f"{name}: the model hears the first {self.audio_window:.1f} of {value.duration:.1f} seconds"
            warnings.warn(MediaWarning(message), stacklevel=4)
        return value

    def _video_clip(self, name: str, value: Any) -> VideoClip | None:
        if value is None or self.image_processor is None:
            return None
        if _is_path(value):
            return _reported(value, load_video(value, self.num_frames))
        if hasattr(value, "frames"):
            return value
        frames = np.asarray(value)
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
            wanted = "a file, a VideoClip or uint8 frames (F, height, width, 3)"
            raise ValueError(f"`{name}` must be {wanted}, got {frames.dtype} of the shape {frames.shape}.")
        return VideoClip(frames, np.full(len(frames), np.nan), np.nan, [])

    @cached_property
    def audio_input_rate(self) -> float:
        """Positions per second of what the feature extractor makes, the model's `config.audio_input_rate`."""
        rate = self.feature_extractor.sampling_rate
        short, long = (self._extract(np.zeros(quarters * rate // 4, np.float32))[1].sum() for quarters in (1, 3))
        return 2.0 * float(long - short)

    @cached_property
    def audio_window(self) -> float:
        """Seconds that the model hears at the most: a fixed window, or infinity."""
        mask = self._extract(np.zeros(self.feature_extractor.sampling_rate // 4, np.float32))[1]
        return float("inf") if mask.all() else len(mask) / self.audio_input_rate

    def _extract(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the audio tower reads of one clip, and its mask (positions,)."""
        options = {"sampling_rate": self.feature_extractor.sampling_rate, "return_attention_mask": True}
        made = self.feature_extractor(samples, **options, return_tensors="np")
        return made[self.feature_extractor.model_input_names[0]][0], made["attention_mask"][0]

    def _audio_inputs(self, clips: list[AudioClip | None]) -> dict[str, np.ndarray]:
        """The audio tower's input and mask, made clip by clip; nothing if no sample has sound."""
        if all(clip is None for clip in clips):
            return {}
        made = {i: self._extract(clip.samples) for i, clip in enumerate(clips) if clip is not None}
        # A fixed window has its positions last.
        axis = next(-1 if mask.shape == values.shape[-1:] else 0 for values, mask in made.values())
        longest = max(len(mask) for _, mask in made.values())
        shape = list(next(values.shape for values, _ in made.values()))
        shape[axis] = longest
        inputs = np.zeros((len(clips), *shape), np.float32)
        masks = np.zeros((len(clips), longest), np.int64)
        for i, (values, mask) in made.items():
            masks[i, : len(mask)] = mask
            inputs[(i, ..., slice(len(mask))) if axis else (i, slice(len(mask)))] = values
        return {self.feature_extractor.model_input_names[0]: inputs, "audio_mask": masks}

    def _vision_inputs(self, clips: list[VideoClip | None]) -> dict[str, np.ndarray]:
        """The vision tower's input, mask and times; nothing if no sample has pictures."""
        seen = {i: clip for i, clip in enumerate(clips) if clip is not None}
        if not seen:
            return {}
        images = {i: self.image_processor(list(clip.frames), return_tensors="np") for i, clip in seen.items()}
        images = {i: image["pixel_values"] for i, image in images.items()}
        shape = (len(clips), max(map(len, images.values())))
        pixels = np.zeros((*shape, *next(iter(images.values())).shape[1:]), np.float32)
        mask, times = np.zeros(shape, np.int64), np.full(shape, np.nan, np.float32)
        for i, image in images.items():
            pixels[i, : len(image)], mask[i, : len(image)], times[i, : len(image)] = image, 1, seen[i].times
        return {"pixel_values": pixels, "vision_mask": mask, "vision_times": times}

    def candidates(self, task: str | AffectTask) -> list[list[int]]:
        """Token ids of every legal answer, in task order, none a prefix of another.

        EOS closes an answer only where it is a proper prefix of another one ("calm", "calm down"), so that comparing
        the candidates needs no EOS elsewhere.
        """
        task = self._task(task)
        trie = self._trie(task)
        return [
            ids + [self.tokenizer.eos_token_id] * (len(trie[tuple(ids)]) > 1) for ids in self._all_answer_ids(task)
        ]

    def answer_ids(self, task: str | AffectTask, answer: Any) -> list[int]:
        """Token ids of a legal answer text, label or score as it follows the cue, without EOS."""
        task = self._task(task)
        text = answer if isinstance(answer, str) and answer in task.answers else task.format(answer)
        return list(self._all_answer_ids(task)[task.answers.index(text)])

    def max_answer_tokens(self, task: str | AffectTask) -> int:
        """Length of the longest legal answer and its EOS: what `max_new_tokens` has to allow."""
        return max(len(ids) for ids in self._all_answer_ids(self._task(task))) + 1

    def logits_processor(self, task: "str | AffectTask | Sequence", inputs: dict[str, Any]) -> LogitsProcessorList:
        """For `generate(**inputs, logits_processor=...)`: admits only legal answers of `task` (or of a task per row).

        `inputs` are the processor's own, left-padded and without answers.
        """
        size, prompt_length = inputs["input_ids"].shape
        tasks = self._tasks(task, size)
        tries = {one: self._trie(one) for one in set(tasks)}
        ended = [i for i in (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id) if i is not None]
        return LogitsProcessorList([AnswerConstraint([tries[one] for one in tasks], prompt_length, ended)])

    def decode_answers(self, generated_ids: Any, task: "str | AffectTask | Sequence") -> list[AnswerText]:
        """The answers in newly generated tokens, `generated[:, inputs["input_ids"].shape[1]:]`, of shape `(B, N)`.

        An answer ends at EOS or padding. `task` is one task or one per row (`num_return_sequences` included).
        """
        rows = generated_ids.tolist() if hasattr(generated_ids, "tolist") else generated_ids
        ends = {self.tokenizer.eos_token_id, self.tokenizer.pad_token_id}
        texts = [self._decode(list(takewhile(lambda token: token not in ends, ids))) for ids in rows]
        tasks = self._tasks(task, len(rows))
        return [AnswerText(text, one.parse(text)) for text, one in zip(texts, tasks, strict=True)]

    def summarize(self, log_probs: Any, task: str | AffectTask) -> list[AnswerDistribution]:
        """The distributions in `log_probs` `(B, C)`, natural logarithms over `task.answers`, normalised or not.

        ValueError if the shape is another, or a row holds NaN, +inf or nothing but -inf.
        """
        task = self._task(task)
        scores = torch.as_tensor(log_probs).detach().double().cpu()
        if scores.ndim != 2 or scores.shape[1] != len(task.answers):
            wanted = f"(batch, {len(task.answers)}) for task {task.name!r}"
            raise ValueError(f"`log_probs` has the shape {tuple(scores.shape)}, wanted {wanted}.")
        rows = scores.softmax(dim=-1).numpy()
        if not np.isfinite(rows).all():
            raise ValueError("`log_probs` must have a finite value and neither NaN nor +inf in every row.")
        return [AnswerDistribution.over(task, row) for row in rows]

    def _task(self, task: str | AffectTask | None) -> AffectTask:
        if isinstance(task, AffectTask):
            return task
        if not isinstance(task, str) or task not in self.tasks:
            raise ValueError(f"`task` got {task!r}, wanted an AffectTask or one of {sorted(self.tasks)}.")
        return self.tasks[task]

    def _tasks(self, task: Any, rows: int) -> list[AffectTask]:
        tasks = list(task) if isinstance(task, list | tuple) else [task] * rows
        if len(tasks) != rows:
            raise ValueError(f"`task` has {len(tasks)} entries, wanted one, or one per row of {rows}.")
        return [self._task(one) for one in tasks]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of one or more plain texts."""
        plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        rows = self.tokenizer(texts, return_attention_mask=False, **plain)["input_ids"]
        # Unigram and word-level vocabularies hold special tokens as ordinary pieces and match them in spite of
        # `split_special_tokens`; those are left out.
        return [[i for i in row if i not in self._special_ids] for row in rows]

    def _piece(self, text: str) -> list[int]:
        """Token ids of a constant piece of text, tokenised once."""
        if text not in self._pieces:
            self._pieces[text] = self._encode([text])[0]
        return self._pieces[text]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).strip()

    def _layout(self, i: int, columns: dict[str, list], task: AffectTask) -> tuple[list[int], list[int], list[int]]:
        """Token ids of sample `i`: up to the utterance, the utterance, and from there to the cue."""
        colon, space = COLON[task.language], SPACE[task.language]
        context = _lines(f"context[{i}]", columns["context"][i], colon + space)
        following = _lines(f"following[{i}]", columns["following"][i], colon + space)
        name, utterance = _fold(f"speaker[{i}]", columns["speaker"][i]), _fold(f"text[{i}]", columns["text"][i])
        if name:
            name, utterance = name + colon, utterance and space + utterance

        ids = self._encode([*context, *following, name, utterance])
        name, utterance = ids[-2:]
        marker = self._piece(FOLLOWING[task.language])
        lines = self._fit(ids[: len(context)], ids[len(context) : -2], marker)
        prompt = self._start_ids + self._piece(task.prompt) + self._piece("\n")
        pseudo = [self.pseudo_token_id] * self.num_pseudo_tokens + self._piece("\n")
        return prompt + lines + pseudo + name, utterance, self._piece("\n") + self._piece(task.cue)

    def _fit(self, context: list[list[int]], following: list[list[int]], marker: list[int]) -> list[int]:
        """The context lines, then marker and following lines, less the farthest ones that exceed the budget."""
        while True:
            lines = sum(context + [marker] * bool(following) + following, [])
            if not lines or len(lines) <= self.max_context_tokens:
                return lines
            if len(following) >= len(context):
                following = following[:-1]
            else:
                context = context[1:]

    def _all_answer_ids(self, task: AffectTask) -> list[list[int]]:
        """Token ids of every legal answer, checked to decode to the answer (so no two are the same)."""
        if task not in self._answer_ids:
            cue, space = self._piece(task.cue), SPACE[task.language]
            joined = self._encode([task.cue + space + answer for answer in task.answers])
            alone = self._encode([space + answer for answer in task.answers])
            # Where the tokenizer merges cue and answer, the answer is spelled as it stands alone.
            rows = [a[len(cue) :] if a[: len(cue)] == cue else b for a, b in zip(joined, alone, strict=True)]
            for answer, ids in zip(task.answers, rows, strict=True):
                if (spelled := self._decode(ids)) != answer:
                    raise ValueError(f"Task {task.name!r}: the tokenizer turns answer {answer!r} into {spelled!r}.")
            self._answer_ids[task] = rows
        return self._answer_ids[task]

    def _trie(self, task: AffectTask) -> dict[tuple[int, ...], list[int]]:
        """From each prefix of a legal answer and its EOS to the ids that may follow."""
        trie: dict[tuple[int, ...], list[int]] = {}
        for ids in self._all_answer_ids(task):
            path = (*ids, self.tokenizer.eos_token_id)
            for n, token in enumerate(path):
                allowed = trie.setdefault(path[:n], [])
                if token not in allowed:
                    allowed.append(token)
        return trie


def _is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


def _reported(path: str | os.PathLike, clip):
    """The clip, once its warnings have been given."""
    for warning in clip.warnings:
        warnings.warn(MediaWarning(f"{os.fspath(path)}: {warning}"), stacklevel=5)
    return clip


def _sub_processor(kind: str, value: Any):
    """A feature extractor or image processor from what `processor_config.json` holds; anything else as it is."""
    if not isinstance(value, dict):
        return value
    name = value.get(f"{kind}_type", "")
    # The PIL form of an image processor: the same pixels with and without torchvision.
    found = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name, None)
    if found is None:
        raise ValueError(f"`{kind}` got the type {name!r}, wanted the name of a class in transformers.")
    return found.from_dict(value)


def _used_tokens(tokenizer) -> set[str]:
    """The special tokens that have a part in the tokenizer."""
    names = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
    return {getattr(tokenizer, f"{name}_token", None) for name in names} - {None}


def _fold(name: str, text: str | None) -> str:
    """One line of text, "" for None."""
    if text is not None and not isinstance(text, str):
        raise ValueError(f"`{name}` must be a string or None, got {type(text).__name__} {text!r}.")
    return " ".join((text or "").split())


def _lines(name: str, items: Any, colon: str) -> list[str]:
    """The lines of context utterances, empty ones left out."""
    wanted = "a list of strings or {'speaker', 'text'} dicts"
    if not isinstance(items, list | tuple | None):
        raise ValueError(f"`{name}` must be {wanted}, got {items!r}.")
    lines = []
    for item in items or ():
        item = {"text": item} if isinstance(item, str) else item
        if not isinstance(item, dict) or "text" not in item:
            raise ValueError(f"`{name}` must be {wanted}, got {item!r} in it.")
        text, speaker = _fold(name, item["text"]), _fold(name, item.get("speaker"))
        if text:
            lines.append(f"{speaker}{colon if speaker else ''}{text}\n")
    return lines


def _ndim(value: Any) -> int:
    """Array dimensions of nested lists or an array; a missing sample counts as a 2-D one."""
    if hasattr(value, "ndim"):
        return value.ndim
    if isinstance(value, list | tuple):
        return 1 + next((_ndim(item) for item in value if item is not None), 2)
    return 0


def _is_batch(columns: dict[str, Any]) -> bool:
    if columns["text"] is not None:
        return not isinstance(columns["text"], str)
    features = [columns[name] for name in ("audio_features", "vision_features") if columns[name] is not None]
    if features:
        return any(_ndim(value) > 2 for value in features)
    return any(isinstance(columns[name], list | tuple) for name in ("audio", "video", "speaker", "task", "answer"))


def _as_columns(columns: dict[str, Any]) -> dict[str, list]:
    """Every argument as a list with one entry per sample; a single task serves all samples."""
    lists = {}
    for name, value in columns.items():
        single = isinstance(value, str | dict | AffectTask) or not hasattr(value, "__len__")
        if single and value is not None and name != "task":
            raise ValueError(f"`{name}` must be a list with one entry per sample of the batch, got {value!r}.")
        if not single:
            lists[name] = list(value)
    longest = max(lists, key=lambda name: len(lists[name]))
    size = len(lists[longest])
    for name, values in lists.items():
        if len(values) != size or size == 0:
            raise ValueError(f"`{name}` has {len(values)} entries, wanted {size or 'at least 1'} as in `{longest}`.")
    return {name: lists.get(name, [value] * size) for name, value in columns.items()}


def _pad(rows: list[list[int]], fill: int, side: str) -> np.ndarray:
    """`(B, L)` int64, each row padded to the longest."""
    padded = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[len(target) - len(row) if side == "left" else 0 :][: len(row)] = row
    return padded


def _array(name: str, value: Any, ndim: int, wanted: str) -> np.ndarray:
    """`value` as a float32 array of `ndim` dimensions."""
    try:
        array = np.asarray(value.detach().float().cpu() if isinstance(value, torch.Tensor) else value, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` must be {wanted} of numbers, got {type(value).__name__} ({error}).") from error
    if array.ndim != ndim:
        raise ValueError(f"`{name}` must be {wanted} of numbers, got the shape {array.shape}.")
    return array


def _features(name: str, value: Any) -> np.ndarray:
    """One sample's features `(T, D)`, or a tower's hidden layers `(T, layers, D)`, checked."""
    layers = _ndim(value) == 3
    wanted = "an array (frames, layers, features)" if layers else "an array (frames, features)"
    array = _array(name, value, 2 + layers, wanted)
    size = " x ".join(map(str, array.shape))
    if array.size == 0:
        raise ValueError(f"`{name}` is empty ({size}), wanted at least one frame; pass None for a missing modality.")
    if not np.isfinite(array).all():
        counts = f"{np.isnan(array).sum()} NaN and {np.isinf(array).sum()} infinite values"
        raise ValueError(f"`{name}` has {counts} in {size}, wanted finite values only.")
    return array


def _stack(modality: str, features: list, times: list) -> dict[str, np.ndarray]:
    """A modality's features, mask and times, padded on the right; nothing if no sample has it."""
    arrays = {i: _features(f"{modality}_features[{i}]", x) for i, x in enumerate(features) if x is not None}
    untimed = [i for i, seconds in enumerate(times) if seconds is not None and i not in arrays]
    if untimed:
        raise ValueError(f"`{modality}_times[{untimed[0]}]` is given without `{modality}_features[{untimed[0]}]`.")
    if not arrays:
        return {}
    first, width = next((i, array.shape[1:]) for i, array in arrays.items())
    shape = (len(features), max(map(len, arrays.values())))
    stacked, mask = np.zeros((*shape, *width), dtype=np.float32), np.zeros(shape, dtype=np.int64)
    clock = np.full(shape, np.nan, dtype=np.float32)
    for i, array in arrays.items():
        if array.shape[1:] != width:
            name, other = f"{modality}_features[{i}]", f"{modality}_features[{first}]"
            got, wanted = (" x ".join(map(str, size)) for size in (array.shape[1:], width))
            raise ValueError(f"`{name}` has {got} columns, wanted {wanted} as in `{other}`.")
        stacked[i, : len(array)], mask[i, : len(array)] = array, 1
        if times[i] is not None:
            name = f"{modality}_times[{i}]"
            seconds = _array(name, times[i], 1, "a list (frames) of seconds")
            if len(seconds) != len(array) or np.isinf(seconds).any():
                raise ValueError(f"`{name}` has {len(seconds)} times, wanted {len(array)}, finite or NaN.")
            clock[i, : len(array)] = seconds
    return {f"{modality}_features": stacked, f"{modality}_mask": mask, f"{modality}_times": clock}


EGMFProcessor.register_for_auto_class()
