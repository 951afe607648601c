"""Affect tasks: the question about an utterance, its legal answers, and summaries of distributions over the answers.

In the paper (arXiv 2601.07565) the LLM answers classification and regression tasks as text. This implementation
chooses the wording of the prompts and the format of the answers.
"""

import math
from dataclasses import asdict, dataclass
from decimal import ROUND_HALF_EVEN, Decimal
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import LogitsProcessor


# Default prompt and cue by kind and language.
DEFAULTS = {
    ("classification", "en"): ("Which emotion does the last speaker express?", "Emotion:"),
    ("classification", "zh"): ("最后一位说话人表达了哪种情绪？", "情绪："),
    ("regression", "en"): ("How negative or positive is the last speaker's sentiment?", "Sentiment:"),
    ("regression", "zh"): ("最后一位说话人的情感有多消极或积极？", "情感："),
}


def _number(value: Any) -> Decimal | None:
    """Converts a finite real number to a Decimal with the digits of its printed form; None for anything else."""
    value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    if isinstance(value, bool | str | np.bool_):
        return None
    try:
        return Decimal(str(value)) if math.isfinite(value) else None
    except (TypeError, ArithmeticError):
        return None


def _tenths(value: Any) -> int | None:
    """Converts `value` to a number of tenths; None if it is not a multiple of 0.1."""
    number = _number(value)
    return int(number * 10) if number is not None and number * 10 == int(number * 10) else None


@dataclass(frozen=True)
class AffectTask:
    """The question about an utterance and its legal answers.

    Args:
        name: Key of the task in `EGMFProcessor.tasks`.
        kind: `"classification"` (one of `labels`) or `"regression"` (a score from `low` to `high` in steps of `step`).
        labels: The legal labels, in the order of reported distributions. Classification only.
        low, high, step: Range and spacing of the legal scores. All three are multiples of 0.1, and `low` and `high`
            are multiples of `step`. Regression only.
        language: `"en"` or `"zh"`, the language of the prompt and the punctuation of lines. Labels may be in another
            language.
        prompt: The instruction at the start of the sequence. It is constant, so its prefix is computed only once.
        cue: The text before the answer, such as `"Emotion:"`. Prompt and cue have a default per kind and language.

    Raises:
        ValueError: If the fields do not describe a valid task.
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
            wanted = (
                "two or more different `labels` without outer spaces (in YAML with numbers, yes, no, on and off in "
            )
            wanted += "quotes), no `low`, `high`, `step`"
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
        """All legal answer texts: the labels, or the scores from low to high, such as `"-3.0"`, `"+0.0"`, `"+3.0"`."""
        if self.kind == "classification":
            return self.labels
        low, high, step = (_tenths(value) for value in (self.low, self.high, self.step))
        return tuple(f"{tenth / 10:+.1f}" for tenth in range(low, high + 1, step))

    def parse(self, text: str) -> str | float | None:
        """Converts a legal answer text to its label or score, ignoring outer white space; None for any other text."""
        text = text.strip()
        if text not in self.answers:
            return None
        return text if self.kind == "classification" else float(text)

    def format(self, value: Any) -> str:
        """Converts a label or a score to its legal answer text.

        A score is rounded to the nearest multiple of `step`, ties to the even multiple. Rounding uses the decimal
        digits of the printed number (with a step of 0.1, 0.25 becomes "+0.2" and 0.35 becomes "+0.4").

        Raises:
            ValueError: If `value` is not a label of the task, not a finite number, or outside `[low, high]`.
        """
        if self.kind == "classification":
            if not isinstance(value, str) or value not in self.labels:
                raise ValueError(f"Task {self.name!r}: got the label {value!r}, wanted one of {list(self.labels)}.")
            return value
        number = _number(value)
        # The tolerance accepts labels that float32 rounding moved slightly outside the scale.
        tolerance = max(1e-6, 1e-7 * abs(self.low or 0.0), 1e-7 * abs(self.high or 0.0))
        if number is None or not self.low - tolerance <= number <= self.high + tolerance:
            wanted = f"a finite number in [{self.low}, {self.high}]"
            raise ValueError(f"Task {self.name!r}: got the score {value!r}, wanted {wanted}.")
        steps = (number / Decimal(str(self.step))).to_integral_value(ROUND_HALF_EVEN)
        return f"{int(steps) * _tenths(self.step) / 10:+.1f}"

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "AffectTask":
        """Builds a task from its fields; raises a ValueError for an unknown or missing field."""
        known = [*cls.__dataclass_fields__]
        if unknown := [name for name in fields if name not in known]:
            got = f"the unknown field {unknown[0]}"
            raise ValueError(f"Task {fields.get('name')!r}: got {got}, wanted some of {', '.join(known)}.")
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"Task {fields.get('name')!r}: {error}.") from error

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, as JSON-compatible values."""
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


_MELD = ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger")
_CHERMA = ("愤怒", "厌恶", "恐惧", "高兴", "平静", "悲伤", "惊奇")
_RAVDESS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
_CASIA = ("愤怒", "恐惧", "高兴", "平静", "悲伤", "惊奇")
_MVSA = ("positive", "neutral", "negative")
_AVATARS = ("joy", "sadness", "anger", "surprise")
_AVATARS_ZH = ("高兴", "悲伤", "愤怒", "惊奇")
_MVSA_PROMPT = "Which sentiment does the last speaker's post express?"
_MOSI_PROMPT = "Is the last speaker's opinion negative or positive?"
_TASKS = (
    AffectTask("mosi", "classification", ("negative", "positive"), prompt=_MOSI_PROMPT, cue="Opinion:"),
    AffectTask("mosei", "regression", low=-3.0, high=3.0, step=0.1),
    AffectTask("meld", "classification", _MELD),
    AffectTask("cherma", "classification", _CHERMA, language="zh"),
    AffectTask("simsv2", "regression", low=-1.0, high=1.0, step=0.1, language="zh"),
    AffectTask("ravdess", "classification", _RAVDESS),
    AffectTask("casia", "classification", _CASIA, language="zh"),
    AffectTask("mvsa", "classification", _MVSA, prompt=_MVSA_PROMPT, cue="Sentiment:"),
    AffectTask("avatars", "classification", _AVATARS),
    AffectTask("avatars_score", "regression", low=-1.0, high=1.0, step=0.1),
    AffectTask("avatars_zh", "classification", _AVATARS_ZH, language="zh"),
    AffectTask("avatars_score_zh", "regression", low=-1.0, high=1.0, step=0.1, language="zh"),
    # The four benchmarks with a prompt in the other language. The labels keep the language of the data set.
    AffectTask("meld_zh", "classification", _MELD, language="zh"),
    AffectTask("cherma_en", "classification", _CHERMA),
    AffectTask("mosei_zh", "regression", low=-3.0, high=3.0, step=0.1, language="zh"),
    AffectTask("simsv2_en", "regression", low=-1.0, high=1.0, step=0.1),
)
BUILTIN_TASKS = {task.name: task for task in _TASKS}


class AnswerText(NamedTuple):
    """A generated answer: its text, and its label or score (None if the text is not a legal answer)."""

    text: str
    value: str | float | None


@dataclass(frozen=True)
class AnswerDistribution:
    """A distribution over a task's legal answers.

    Attributes:
        probabilities: Probability of every legal answer text, in task order.
        top: The most probable answer text.
        expected: The mean score, which is best for correlation.
        median: The median score, which is best for the mean absolute error.
        interval: The 5 % and the 95 % quantile. The interval contains at least 90 % of the probability.

    The last three are None for classification. The q-quantile is the smallest legal score whose cumulative probability
    is at least q.
    """

    probabilities: dict[str, float]
    top: str
    expected: float | None = None
    median: float | None = None
    interval: tuple[float, float] | None = None

    @classmethod
    def over(cls, task: AffectTask, probabilities: np.ndarray) -> "AnswerDistribution":
        """Summarises `probabilities` `(C,)` over `task.answers`."""
        by_answer = dict(zip(task.answers, probabilities.tolist(), strict=True))
        top = max(by_answer, key=by_answer.get)
        if task.kind == "classification":
            return cls(by_answer, top)
        scores = np.array([float(answer) for answer in task.answers])
        # Without the tolerance, a rounding error could skip a score whose cumulative probability is exactly q.
        ranks = np.searchsorted(probabilities.cumsum() + 1e-12, (0.05, 0.5, 0.95))
        low, median, high = scores[ranks].tolist()
        return cls(by_answer, top, float(probabilities @ scores), median, (low, high))


class AnswerConstraint(LogitsProcessor):
    """Allows only tokens that continue a legal answer of the task, then EOS, then EOS or padding.

    Rows are independent, so the constraint works for greedy search, sampling and beam search. Beams beyond the number
    of legal answers score -inf.

    Args:
        tries: One dict per input, from a generated prefix to the token ids that may follow. With `n` rows per input,
            row `r` belongs to input `r // n`.
        prompt_length: Number of tokens before the generated ones, including padding.
        ended: The token ids that may follow a finished answer.
    """

    def __init__(self, tries: list[dict[tuple[int, ...], list[int]]], prompt_length: int, ended: list[int]):
        self.tries = tries
        self.prompt_length = prompt_length
        self.ended = ended

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Sets scores `(rows, vocabulary)` to -inf for tokens that may not follow `input_ids` `(rows, length)`."""
        constrained = torch.full_like(scores, -math.inf)
        repeats = len(input_ids) // len(self.tries)
        for row, generated in enumerate(input_ids[:, self.prompt_length :].tolist()):
            allowed = self.tries[row // repeats].get(tuple(generated), self.ended)
            constrained[row, allowed] = scores[row, allowed]
        return constrained
