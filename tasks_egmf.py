"""Affect tasks: what is asked about an utterance, which answers are legal, and what a distribution over them says.

The paper (arXiv 2601.07565) answers classification and regression in text; the wording of the prompts and the form of
the answers are this implementation's own choice.
"""

import math
from dataclasses import asdict, dataclass
from decimal import ROUND_HALF_EVEN, Decimal
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import LogitsProcessor


# Prompt and cue of a task that brings none.
DEFAULTS = {
    ("classification", "en"): ("Which emotion does the last speaker express?", "Emotion:"),
    ("classification", "zh"): ("最后一位说话人表达了哪种情绪？", "情绪："),
    ("regression", "en"): ("How negative or positive is the last speaker's sentiment?", "Sentiment:"),
    ("regression", "zh"): ("最后一位说话人的情感有多消极或积极？", "情感："),
}


def _number(value: Any) -> Decimal | None:
    """A finite real number with the decimal digits that it prints with, or None."""
    value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    if isinstance(value, bool | str | np.bool_):
        return None
    try:
        return Decimal(str(value)) if math.isfinite(value) else None
    except (TypeError, ArithmeticError):
        return None


def _tenths(value: Any) -> int | None:
    """`value` in tenths, None if it is no multiple of 0.1."""
    number = _number(value)
    return int(number * 10) if number is not None and number * 10 == int(number * 10) else None


@dataclass(frozen=True)
class AffectTask:
    """What is asked about an utterance, and which answers are legal.

    Args:
        name: Key of the task in `EGMFProcessor.tasks`.
        kind: `"classification"` (one of `labels`) or `"regression"` (a score from `low` to `high` in `step`s).
        labels: The legal labels, in the order in which distributions are reported. Classification only.
        low, high, step: The legal scores, all in tenths, `low` and `high` multiples of `step`. Regression only.
        language: `"en"` or `"zh"`, the language of the prompt, and how lines are written; labels may be in another.
        prompt: The instruction in front of the sequence. Constant, so that its prefix is computed once.
        cue: What the answer follows, such as `"Emotion:"`. Prompt and cue have a default for each kind and language.

    Fields that do not describe a task are a ValueError.
    """

    name: str
    kind: str
    labels: tuple[str, ...] | None = None
    low: float | None = None
    high: float | None = None
    step: float | None = None
    language: str = "en"
    prompt: str = ""
    cue: str = ""

    def __post_init__(self):
        if (self.kind, self.language) not in DEFAULTS:
            wanted = f"a pair (kind, language) of {list(DEFAULTS)}"
            raise ValueError(f"Task {self.name!r}: wanted {wanted}, got {(self.kind, self.language)}.")
        labels, scale = self.labels, (self.low, self.high, self.step)
        if self.kind == "classification":
            labels = tuple(labels) if isinstance(labels, list | tuple) else ()
            clean = all(isinstance(label, str) and label and label == label.strip() for label in labels)
            legal = clean and len(set(labels)) == len(labels) > 1 and scale == (None, None, None)
            wanted = "two or more different `labels` without outer spaces, and no `low`, `high`, `step`"
        else:
            low, high, step = map(_tenths, scale)
            legal = None not in (low, high, step) and low < high and 0 < step and not (low % step or high % step)
            legal = legal and labels is None
            wanted = "`low` < `high`, multiples of `step`, which is a positive multiple of 0.1, and no `labels`"
        if not legal:
            raise ValueError(f"Task {self.name!r}: wanted {wanted}; got {self.labels} and {scale}.")
        prompt, cue = DEFAULTS[self.kind, self.language]
        for field, value in (("labels", labels), ("prompt", self.prompt or prompt), ("cue", self.cue or cue)):
            object.__setattr__(self, field, value)

    @cached_property
    def answers(self) -> tuple[str, ...]:
        """All legal answer texts: the labels, or the scores from low to high as `"-3.0"`, ..., `"+0.0"`, `"+3.0"`."""
        if self.kind == "classification":
            return self.labels
        low, high, step = (_tenths(value) for value in (self.low, self.high, self.step))
        return tuple(f"{tenth / 10:+.1f}" for tenth in range(low, high + 1, step))

    def parse(self, text: str) -> str | float | None:
        """The label or score that `text` is, outer white space aside; None if it is not exactly a legal answer."""
        text = text.strip()
        if text not in self.answers:
            return None
        return text if self.kind == "classification" else float(text)

    def format(self, value: Any) -> str:
        """The legal answer text of a label or of a score.

        A score is rounded to the nearest multiple of `step`, a tie to the even one, on its decimal digits as printed
        (with a step of 0.1, 0.25 is "+0.2" and 0.35 is "+0.4"). ValueError if `value` is no label of the task, no
        finite number, or outside `[low, high]`.
        """
        if self.kind == "classification":
            if not isinstance(value, str) or value not in self.labels:
                raise ValueError(f"Task {self.name!r}: got the label {value!r}, wanted one of {list(self.labels)}.")
            return value
        number = _number(value)
        # The tolerance lets a label through that left float32 a hair outside the scale.
        if number is None or not self.low - 1e-6 <= number <= self.high + 1e-6:
            wanted = f"a finite number in [{self.low}, {self.high}]"
            raise ValueError(f"Task {self.name!r}: got the score {value!r}, wanted {wanted}.")
        steps = (number / Decimal(str(self.step))).to_integral_value(ROUND_HALF_EVEN)
        return f"{int(steps) * _tenths(self.step) / 10:+.1f}"

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "AffectTask":
        """A task from its fields; a ValueError names a field that does not exist or is missing."""
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"Task {fields.get('name')!r}: {error}.") from error

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, in a form that JSON holds."""
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


_MELD = ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger")
_CHERMA = ("愤怒", "厌恶", "恐惧", "高兴", "平静", "悲伤", "惊奇")
_RAVDESS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
_AVATARS = ("joy", "sadness", "anger", "surprise")
_AVATARS_ZH = ("高兴", "悲伤", "愤怒", "惊奇")
_MOSI_PROMPT = "Is the last speaker's opinion negative or positive?"
_TASKS = (
    AffectTask("mosi", "classification", ("negative", "positive"), prompt=_MOSI_PROMPT, cue="Opinion:"),
    AffectTask("mosei", "regression", low=-3.0, high=3.0, step=0.1),
    AffectTask("meld", "classification", _MELD),
    AffectTask("cherma", "classification", _CHERMA, language="zh"),
    AffectTask("simsv2", "regression", low=-1.0, high=1.0, step=0.1, language="zh"),
    AffectTask("ravdess", "classification", _RAVDESS),
    AffectTask("avatars", "classification", _AVATARS),
    AffectTask("avatars_score", "regression", low=-1.0, high=1.0, step=0.1),
    AffectTask("avatars_zh", "classification", _AVATARS_ZH, language="zh"),
    AffectTask("avatars_score_zh", "regression", low=-1.0, high=1.0, step=0.1, language="zh"),
    # The four benchmarks with a prompt in the other language; the labels stay the data set's own.
    AffectTask("meld_zh", "classification", _MELD, language="zh"),
    AffectTask("cherma_en", "classification", _CHERMA),
    AffectTask("mosei_zh", "regression", low=-3.0, high=3.0, step=0.1, language="zh"),
    AffectTask("simsv2_en", "regression", low=-1.0, high=1.0, step=0.1),
)
BUILTIN_TASKS = {task.name: task for task in _TASKS}


class AnswerText(NamedTuple):
    """A generated answer: its text, and the label or score that it is (None if it is no legal answer)."""

    text: str
    value: str | float | None


@dataclass(frozen=True)
class AnswerDistribution:
    """A distribution over a task's legal answers.

    `probabilities` maps every legal answer text to its probability, in task order, and `top` is the most probable
    one. The rest is for scores only, None otherwise: `expected` is the mean, which is best for correlation; `median`
    is best for the mean absolute error; `interval` holds the 5 % and the 95 % quantile, so at least 90 % of the mass
    lies in it. The q-quantile is the smallest legal score whose cumulative probability is at least q.
    """

    probabilities: dict[str, float]
    top: str
    expected: float | None = None
    median: float | None = None
    interval: tuple[float, float] | None = None

    @classmethod
    def over(cls, task: AffectTask, probabilities: np.ndarray) -> "AnswerDistribution":
        """The summary of `probabilities` `(C,)` over `task.answers`."""
        by_answer = dict(zip(task.answers, probabilities.tolist(), strict=True))
        top = max(by_answer, key=by_answer.get)
        if task.kind == "classification":
            return cls(by_answer, top)
        scores = np.array([float(answer) for answer in task.answers])
        # The tolerance keeps rounding in the sum from skipping a score whose cumulative probability is exactly q.
        ranks = np.searchsorted(probabilities.cumsum() + 1e-12, (0.05, 0.5, 0.95))
        low, median, high = scores[ranks].tolist()
        return cls(by_answer, top, float(probabilities @ scores), median, (low, high))


class AnswerConstraint(LogitsProcessor):
    """Admits only the legal continuations of what has been generated: a task's answers, then EOS, then EOS or padding.

    Rows are independent, so it holds for greedy search, sampling and beams; beams beyond the number of legal answers
    score -inf. `tries` has one dict per input, from a generated prefix to the token ids that may follow (row `r` of a
    generation with `n` rows per input belongs to input `r // n`); `prompt_length` is the number of tokens in front of
    the generated ones, padding included; `ended` are the ids that may follow a finished answer.
    """

    def __init__(self, tries: list[dict[tuple[int, ...], list[int]]], prompt_length: int, ended: list[int]):
        self.tries = tries
        self.prompt_length = prompt_length
        self.ended = ended

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores `(rows, vocabulary)` with -inf wherever a token may not follow `input_ids` `(rows, length)`."""
        constrained = torch.full_like(scores, -math.inf)
        repeats = len(input_ids) // len(self.tries)
        for row, generated in enumerate(input_ids[:, self.prompt_length :].tolist()):
            allowed = self.tries[row // repeats].get(tuple(generated), self.ended)
            constrained[row, allowed] = scores[row, allowed]
        return constrained
