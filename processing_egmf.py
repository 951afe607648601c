"""EGMF's processor: converts utterances to model inputs, and generated tokens to labels or scores.

`EGMFProcessor` builds the input sequence of a task (`tasks_egmf.py`) from an utterance, its context, its sound and its
pictures (files, arrays or precomputed features). It also processes answers: it lists the candidates that the model
scores, constrains generation to legal answers, parses generated text and summarises distributions.

The paper (arXiv 2601.07565) prompts an LLM with a text prompt and pseudo tokens. This implementation chooses the
layout and the wording.
"""

import inspect
import math
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch
import transformers
from transformers import LogitsProcessorList, PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .batches_egmf import AffectBatch, as_columns, is_batch, pad, stack
from .chats_egmf import ChatsMixin
from .media_inputs_egmf import MediaInputsMixin, warn
from .recordings_egmf import RecordingsMixin
from .samples_egmf import with_rate
from .tasks_egmf import BUILTIN_TASKS, AffectTask, AnswerConstraint, AnswerDistribution, AnswerText
from .transcription_egmf import Transcriber


# By language: the colon after a name, and the space after a colon.
COLON = {"en": ":", "zh": "："}
SPACE = {"en": " ", "zh": ""}

# Name patterns of unused special tokens, in order of preference.
SPARE_TOKENS = ("pseudo", "reserved", "unused", "placeholder", "extra", "empty_output", "_pad")
MOST_CACHED = 256  # tasks whose answers are kept as tokens
NEW_PSEUDO_TOKEN = "<|pseudo|>"


class TextWarning(UserWarning):
    """A text exceeds the LLM's context length, and part of it is left out.

    Args:
        index: Index of the sample in its batch.
        message: What is left out.
    """

    def __init__(self, index: int, message: str):
        super().__init__(message)
        self.index = index


class EGMFProcessor(ChatsMixin, MediaInputsMixin, RecordingsMixin, ProcessorMixin):
    """Converts utterances to the inputs of EGMF, and answers of EGMF to labels and scores.

    One sample becomes one sequence:

        [bos] prompt \\n context lines K x pseudo token \\n [Speaker:] utterance \\n cue [answer eos]

    The gate is conditioned on the part before the pseudo tokens. The utterance follows the pseudo tokens, so the LLM
    can attend to the fused modalities when it reads the utterance. The pieces are tokenised separately. Special tokens
    inside a user's text remain plain text, so that no text can contain a placeholder. Consecutive white space in a
    text, including line ends, becomes one space.

    A sequence with its answer has at most `tokenizer.model_max_length` tokens. Text beyond this limit is left out with
    a [`TextWarning`]: the oldest lines of the context first, then the beginning of the utterance.

    Args:
        tokenizer: The LLM's tokenizer.
        feature_extractor: The audio tower's feature extractor, or None if the model has no audio tower.
        image_processor: The vision tower's image processor (PIL backend), or None if the model has no vision tower.
        pseudo_token: The placeholder of the pseudo tokens. With None, the processor selects an unused special token of
            the tokenizer, or adds `"<|pseudo|>"` to the tokenizer if there is none. In the latter case, resize the
            LLM's embeddings to `len(tokenizer)`.
        num_pseudo_tokens: Number K of placeholders per sample.
        num_frames: Number of frames sampled evenly from a video.
        tasks: Additional tasks, `{name: AffectTask or dict of its fields}`.
        max_context_tokens: Maximum number of tokens of the context. If it exceeds them, whole utterances are dropped,
            starting with the oldest.
        default_task: The task that is used if a call names none: the first one that the model was trained on.
        trained_tasks: The tasks that the model was trained on, or None if that is not known.
        trained_modalities: The modalities that training let the model see, or None if that is not known.
        temperatures: Temperature of the distribution over answers by task, fitted to validation data; otherwise 1.
        clip_seconds: Length that 95 % of the training clips do not exceed: by default that of windows of a recording.
        chat_template: Kept for the tokenizer; the sequences of EGMF do not use it.
    """

    text_kwargs = {"padding_side": "left"}
    # For callers: the copy of this code in a checkpoint has its own classes.
    transcriber_class = Transcriber

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
        temperatures: dict[str, float] | None = None,
        clip_seconds: float | None = None,
        trained_tasks: list[str] | None = None,
        trained_modalities: list[str] | None = None,
        chat_template=None,
    ):
        super().__init__(tokenizer, chat_template=chat_template or getattr(tokenizer, "chat_template", None))
        self.pseudo_token = pseudo_token or self.find_pseudo_token(tokenizer) or NEW_PSEUDO_TOKEN
        if tokenizer.eos_token is None or self.pseudo_token in _used_tokens(tokenizer):
            used = _used_tokens(tokenizer)
            raise ValueError(
                f"EGMF needs an `eos_token` and a `pseudo_token` ({self.pseudo_token!r}) other than {used}."
            )
        # An existing token keeps its id. Only a special token is never encoded from a user's text.
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
        self.temperatures = dict(temperatures or {})
        for name, value in self.temperatures.items():
            self._task(name)
            if not 0 < value < math.inf:
                raise ValueError(f"`temperatures[{name!r}]` got {value}, wanted a positive number.")
        self.clip_seconds = clip_seconds
        for name in (*filter(None, [default_task]), *(trained_tasks or ())):
            self._task(name)
        self.trained_tasks = trained_tasks
        self.trained_modalities = trained_modalities

        self._special_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids -= {tokenizer.unk_token_id} - {tokenizer.eos_token_id, self.pseudo_token_id}
        self._pieces: dict[str, list[int]] = {}
        self._answer_ids: dict[AffectTask, list[list[int]]] = {}
        # The tokens that the tokenizer adds before a text by default: bos or nothing.
        letter, full = self._piece("a"), tokenizer("a")["input_ids"]
        self._start_ids = full[: full.index(letter[0])] if letter and letter[0] in full else []

    @classmethod
    def from_args_and_dict(cls, args, processor_dict: dict[str, Any], **kwargs):
        if kwargs.get("tasks"):  # in addition to those of the checkpoint
            kwargs["tasks"] = {**processor_dict.get("tasks", {}), **kwargs["tasks"]}
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    @classmethod
    def get_attributes(cls) -> list[str]:
        # ProcessorMixin does not support None for the other two. processor_config.json contains them as well.
        return ["tokenizer"]

    @classmethod
    def _load_tokenizer_from_pretrained(cls, sub_processor_type, pretrained_model_name_or_path, **kwargs):
        # tokenizer_config.json names the tokenizer's class. Without a config argument, AutoTokenizer would load the
        # checkpoint's config and ask whether to trust its code, which the caller has already imported. The tokenizer
        # would save the processor's own arguments as its own.
        own = inspect.signature(cls.__init__).parameters
        kwargs = {name: value for name, value in kwargs.items() if name not in own}
        return super()._load_tokenizer_from_pretrained(
            sub_processor_type, pretrained_model_name_or_path, config=PreTrainedConfig(), **kwargs
        )

    @staticmethod
    def find_pseudo_token(tokenizer) -> str | None:
        """Returns a special token of `tokenizer` that the tokenizer does not use, or None if there is none."""
        used = _used_tokens(tokenizer)
        special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
        spare = (token for pattern in SPARE_TOKENS for token in special if pattern in token and token not in used)
        return next(spare, None)

    def limit_length(self, text_config: PreTrainedConfig) -> None:
        """Lowers `tokenizer.model_max_length` to the LLM's `max_position_embeddings`, if its config has a value."""
        positions = getattr(text_config, "max_position_embeddings", None)
        if positions:
            self.tokenizer.model_max_length = min(self.tokenizer.model_max_length, positions)

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
        """Prepares the model inputs of one sample, or of a batch if `text` is a list of samples.

        Without text, media or features determine whether the input is a batch. In a batch every argument is None or a
        list with one entry per sample; a single `task` applies to all samples. A missing modality is None (for text
        also ""); any modality may be missing.

        Args:
            text: The utterance.
            context: Per sample the preceding utterances, oldest first: strings or `{"speaker", "text"}` dicts.
            speaker: The name of the speaker.
            audio: Per sample a file with sound, an [`AudioClip`], or `{"array", "sampling_rate"}`: (samples,),
                (samples, channels) or (channels, samples), floats from -1 to 1 or integers; channels are averaged.
                With `sampling_rate`, a plain array.
            video: Per sample a file with pictures, a [`VideoClip`], a picture of PIL, or an array of RGB frames (F,
                height, width, 3), uint8, of which `num_frames` are read. The sound track of a video file is used as
                the sample's audio if `audio` is None.
            audio_features, vision_features: Per sample an array `(T, D)` of finite numbers, `T` >= 1; for a model with
                a tower the tower's hidden layers `(T, layers, D)`.
            audio_times, vision_times: Per sample the times `(T,)` of the features' rows in seconds, NaN if unknown.
            task: Name of a task in `tasks`, or an `AffectTask`; by default `default_task`.
            answer: The label or score to learn; adds `labels`, and the answer and EOS to the sequence.
            return_tensors: `"pt"`, or `"np"` or None for numpy arrays.
            sampling_rate: Sampling rate in Hz of `audio` that is given as plain arrays.
            sound_track: Whether to use the sound track of a video file; True by default.
            padding_side: `"left"` (default, required for generation) or `"right"`; also inside `text_kwargs`.
            padding: True; a batch is always padded to its longest sample. Options that are None are ignored.

        Returns:
            A batch, padded to the longest sequence L and the longest clip T:

            - `input_ids`, `attention_mask`, `utterance_mask` (1 on the tokens of the utterance, including a space in
              front of it) and, given answers, `labels` (-100 except on the answer and EOS): `(B, L)` int64.
            - With audio features: `audio_features` `(B, T, D)` float32 (float16 if all of the batch are) padded with
              zeros on the right, `audio_mask` `(B, T)` int64, `audio_times` `(B, T)` float32 (NaN if unknown or
              padding). The same for vision.
            - With media: the towers' inputs, which are `input_features` or `input_values` with `audio_mask`, and
              `pixel_values` `(B, F, 3, height, width)` with `vision_mask` and `vision_times` `(B, F)`.

        Raises:
            ValueError: If an argument is invalid. The message gives the argument, its value and the valid values.
            MediaError: If a file cannot be read. Missing parts of a readable file cause a `MediaWarning`.
        """
        options = {**self.text_kwargs, **(kwargs.pop("text_kwargs", None) or {}), **kwargs}
        options = {name: value for name, value in options.items() if value is not None}
        padding_side, sound_track = options.pop("padding_side"), options.pop("sound_track", True)
        sampling_rate, padding = options.pop("sampling_rate", None), options.pop("padding", True)
        if options or padding_side not in ("left", "right") or padding not in (True, "longest"):
            wanted = (
                "`padding_side` 'left' or 'right', `padding=True`, `sound_track`, `sampling_rate`, no other option"
            )
            raise ValueError(f"EGMFProcessor wanted {wanted}, got {padding_side!r}, {padding!r} and {options}.")

        columns = dict(text=text, context=context, speaker=speaker, task=task, answer=answer)
        columns.update(audio=audio, video=video, audio_features=audio_features, audio_times=audio_times)
        columns.update(vision_features=vision_features, vision_times=vision_times)
        dims = {"audio_features": 2 + bool(self.feature_extractor), "vision_features": 2 + bool(self.image_processor)}
        batched = is_batch(columns, dims)
        columns = as_columns(columns) if batched else {name: [value] for name, value in columns.items()}
        if sampling_rate is not None:
            columns["audio"] = [with_rate(clip, sampling_rate) for clip in columns["audio"]]
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

        # Padding is masked, so EOS can replace a missing padding token.
        no_pad = self.tokenizer.pad_token_id is None
        fill = {"input_ids": self.tokenizer.eos_token_id if no_pad else self.tokenizer.pad_token_id, "labels": -100}
        data = {name: pad(values, fill.get(name, 0), padding_side) for name, values in rows.items()}
        for modality in ("audio", "vision"):
            data.update(stack(modality, columns[f"{modality}_features"], columns[f"{modality}_times"]))
        clips = zip(columns["audio"], columns["video"], strict=True)
        media = self.media_inputs([self.load_media(*clip, sound_track, f"[{i}]") for i, clip in enumerate(clips)])
        if both := media.keys() & data.keys():
            name = min(both).replace("mask", "features")
            raise ValueError(f"`{name}` got values together with media, wanted one of the two in a batch.")
        return AffectBatch({**data, **media}, tensor_type=return_tensors)

    def candidates(self, task: str | AffectTask) -> list[list[int]]:
        """Token ids of every legal answer, in task order. No candidate is a prefix of another.

        EOS is appended only to an answer that is a proper prefix of another one ("calm", "calm down"). The other
        candidates are distinct without it.
        """
        task = self._task(task)
        trie = self.continuations(task)
        return [
            ids + [self.tokenizer.eos_token_id] * (len(trie[tuple(ids)]) > 1) for ids in self._all_answer_ids(task)
        ]

    def answer_ids(self, task: str | AffectTask, answer: Any) -> list[int]:
        """Token ids of an answer after the cue, without EOS. `answer` is a legal answer text, a label or a score."""
        task = self._task(task)
        text = answer if isinstance(answer, str) and answer in task.answers else task.format(answer)
        return list(self._all_answer_ids(task)[task.answers.index(text)])

    def max_answer_tokens(self, task: str | AffectTask) -> int:
        """Number of tokens of the longest legal answer with EOS, the minimum for `max_new_tokens`."""
        return max(len(ids) for ids in self._all_answer_ids(self._task(task))) + 1

    def logits_processor(self, task: "str | AffectTask | Sequence", inputs: dict[str, Any]) -> LogitsProcessorList:
        """Constrains generation to legal answers, for `generate(**inputs, logits_processor=...)`.

        Args:
            task: One task, or a list with one task per row.
            inputs: The output of this processor, left-padded and without answers.
        """
        size, prompt_length = inputs["input_ids"].shape
        tasks = self._tasks(task, size)
        tries = {one: self.continuations(one) for one in set(tasks)}
        ended = [i for i in (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id) if i is not None]
        return LogitsProcessorList([AnswerConstraint([tries[one] for one in tasks], prompt_length, ended)])

    def decode_answers(self, generated_ids: Any, task: "str | AffectTask | Sequence") -> list[AnswerText]:
        """Decodes the answers in newly generated tokens.

        Args:
            generated_ids: `(B, N)`, `generated[:, inputs["input_ids"].shape[1]:]`. An answer ends at EOS or padding.
            task: One task, or a list with one task per generated row.
        """
        rows = generated_ids.tolist() if hasattr(generated_ids, "tolist") else generated_ids
        # An LLM may end at several tokens, such as Gemma's <end_of_turn>. No answer contains a special token.
        ends = self._special_ids | {self.tokenizer.eos_token_id, self.tokenizer.pad_token_id}
        texts = [self._decode(list(takewhile(lambda token: token not in ends, ids))) for ids in rows]
        tasks = self._tasks(task, len(rows))
        return [AnswerText(text, one.parse(text)) for text, one in zip(texts, tasks, strict=True)]

    def summarize(self, log_probs: Any, task: str | AffectTask) -> list[AnswerDistribution]:
        """Summarises the distributions over `task.answers`, one per row, at the task's temperature.

        Args:
            log_probs: `(B, C)` natural logarithms, normalised or not.
            task: The task whose C legal answers the columns represent.

        Raises:
            ValueError: If the shape is wrong, or a row contains NaN or +inf, or only -inf.
        """
        task = self._task(task)
        scores = torch.as_tensor(log_probs).detach().double().cpu()
        if scores.ndim != 2 or scores.shape[1] != len(task.answers):
            wanted = f"(batch, {len(task.answers)}) for task {task.name!r}"
            raise ValueError(f"`log_probs` has the shape {tuple(scores.shape)}, wanted {wanted}.")
        rows = (scores / self.temperatures.get(task.name, 1.0)).softmax(dim=-1).numpy()
        if not np.isfinite(rows).all():
            raise ValueError("`log_probs` got a row with NaN, +inf or no finite value, wanted logarithms.")
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
        # Unigram and word-level vocabularies contain special tokens as ordinary pieces and match them despite
        # `split_special_tokens`. Remove these.
        return [[i for i in row if i not in self._special_ids] for row in rows]

    def _piece(self, text: str) -> list[int]:
        """Token ids of a constant piece of text, cached."""
        if (ids := self._pieces.get(text)) is None:
            ids = self._encode([text])[0]
            _keep(self._pieces, text, ids)
        return ids

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).strip()

    def _layout(self, i: int, columns: dict[str, list], task: AffectTask) -> tuple[list[int], list[int], list[int]]:
        """Token ids of sample `i` in three parts: before the utterance, the utterance, after it up to the cue."""
        colon, space = COLON[task.language], SPACE[task.language]
        context = _lines(f"context[{i}]", columns["context"][i], colon + space)
        name, utterance = _fold(f"speaker[{i}]", columns["speaker"][i]), _fold(f"text[{i}]", columns["text"][i])
        if name:
            name, utterance = name + colon, utterance and space + utterance

        *context, name, utterance = self._encode([*context, name, utterance])
        prompt = self._start_ids + self._piece(task.prompt) + self._piece("\n")
        pseudo = [self.pseudo_token_id] * self.num_pseudo_tokens + self._piece("\n")
        end = self._piece("\n") + self._piece(task.cue)
        lines = self._fit(context, self.max_context_tokens)
        limit = self.tokenizer.model_max_length
        fixed = sum(map(len, (prompt, pseudo, name, end)))
        # Answers are tokenised only for long sequences: an answer is shorter than half of any context length.
        room = limit - fixed - (self.max_answer_tokens(task) if 2 * (fixed + len(lines + utterance)) > limit else 0)
        if (excess := len(lines) + len(utterance) - room) > 0:
            shorter = self._fit(context, max(0, len(lines) - excess))
            cut = max(0, len(shorter) + len(utterance) - max(0, room))
            lost = [f"{len(lines) - len(shorter)} tokens of the context"] if len(shorter) < len(lines) else []
            lost += [f"the first {cut} of {len(utterance)} tokens of the text"] if cut else []
            message = f"the language model reads {limit} tokens: {' and '.join(lost)} are left out"
            warn(TextWarning(i, message), stacklevel=3)
            lines, utterance = shorter, utterance[cut:]
        return prompt + lines + pseudo + name, utterance, end

    @staticmethod
    def _fit(context: list[list[int]], budget: int) -> list[int]:
        """Joins the last lines of the context, as many as fit the budget."""
        first = len(context)
        while first and len(context[first - 1]) <= budget:
            first -= 1
            budget -= len(context[first])
        return [token for line in context[first:] for token in line]

    def _all_answer_ids(self, task: AffectTask) -> list[list[int]]:
        """Token ids of every legal answer. Checks that they decode to the answer, which makes them distinct."""
        if (rows := self._answer_ids.get(task)) is None:
            cue, space = self._piece(task.cue), SPACE[task.language]
            joined = self._encode([task.cue + space + answer for answer in task.answers])
            separate = self._encode([space + answer for answer in task.answers])
            # If the tokenizer merges the end of the cue with the answer, use the tokens of the answer without the cue.
            rows = [a[len(cue) :] if a[: len(cue)] == cue else b for a, b in zip(joined, separate, strict=True)]
            for answer, ids in zip(task.answers, rows, strict=True):
                if (spelled := self._decode(ids)) != answer:
                    raise ValueError(f"Task {task.name!r}: the tokenizer turns answer {answer!r} into {spelled!r}.")
            _keep(self._answer_ids, task, rows)
        return rows

    def continuations(self, task: str | AffectTask) -> dict[tuple[int, ...], list[int]]:
        """Maps each token prefix of the legal answers (with EOS) to the token ids that may follow."""
        trie: dict[tuple[int, ...], list[int]] = {}
        for ids in self._all_answer_ids(self._task(task)):
            path = (*ids, self.tokenizer.eos_token_id)
            for n, token in enumerate(path):
                allowed = trie.setdefault(path[:n], [])
                if token not in allowed:
                    allowed.append(token)
        return trie


def _keep(cache: dict, key: Any, value: Any) -> None:
    """Adds an entry, and drops the oldest of many: callers may bring ever new labels, also in several threads."""
    cache[key] = value
    if len(cache) > MOST_CACHED:
        cache.pop(next(iter(list(cache))), None)


def _sub_processor(kind: str, value: Any):
    """Builds a feature extractor or image processor from its dict in `processor_config.json`.

    Any other value is returned unchanged.
    """
    if not isinstance(value, dict):
        return value
    name = value.get(f"{kind}_type", "")
    # The PIL version of an image processor gives the same pixels with and without torchvision.
    found = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name, None)
    if found is None:
        raise ValueError(f"`{kind}` got the type {name!r}, wanted the name of a class in transformers.")
    return found.from_dict(value)


def _used_tokens(tokenizer) -> set[str]:
    """The special tokens with a role in the tokenizer, such as bos or eos."""
    names = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
    return {getattr(tokenizer, f"{name}_token", None) for name in names} - {None}


def _fold(name: str, text: str | None) -> str:
    """Joins the words of a text with single spaces; "" for None. Checks that the text is valid."""
    if text is not None and not isinstance(text, str):
        raise ValueError(f"`{name}` got {type(text).__name__} {text!r}, wanted a string or None.")
    if text and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            wanted = "valid Unicode"
            raise ValueError(f"`{name}` got a lone surrogate at character {error.start}, wanted {wanted}.") from None
    return " ".join((text or "").split())


def _lines(name: str, items: Any, colon: str) -> list[str]:
    """Formats the non-empty context utterances as lines."""
    wanted = "a list of strings or {'speaker', 'text'} dicts"
    if not isinstance(items, list | tuple | None):
        raise ValueError(f"`{name}` got {items!r}, wanted {wanted}.")
    lines = []
    for item in items or ():
        item = {"text": item} if isinstance(item, str) else item
        if not isinstance(item, dict) or "text" not in item:
            raise ValueError(f"`{name}` got {item!r} in it, wanted {wanted}.")
        text, speaker = _fold(name, item["text"]), _fold(name, item.get("speaker"))
        if text:
            lines.append(f"{speaker}{colon if speaker else ''}{text}\n")
    return lines


EGMFProcessor.register_for_auto_class()
