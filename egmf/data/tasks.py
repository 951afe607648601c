"""Tasks that follow from the labels of a table, for a recipe that names none."""

import logging
import math
import re
from decimal import Decimal

import numpy as np
from datasets import DatasetDict

from corpora.reading import read_number
from egmf.processing_egmf import AffectTask


STEPS = tuple(Decimal(step) * 10**power for power in range(4) for step in ("0.1", "0.2", "0.5"))
NAME = "table"  # of the task
DECIMAL = re.compile(r"[-+]?\d+([.,]\d+)?")
MANY_CLASSES = 50
MOST_ANSWERS = 61  # of a score, as from -3 to 3 in tenths


def infer_tasks(corpus: DatasetDict) -> list[AffectTask]:
    """A task for the labels of a corpus, in all splits: scores if all labels are numbers, classes otherwise.

    A corpus with labels and scores gets two tasks, `table` and `table_score`. The question is in
    Chinese if all rows that name a language are, otherwise in English.

    Raises:
        ValueError: If not all rows have a label or a score, there is only one label, or the scores span too little.
    """
    labels, scores, languages = (
        [value for rows in corpus.values() for value in rows[column][:]]
        for column in ("emotion", "sentiment", "language")
    )
    named, numbered = (None not in values and bool(values) for values in (labels, scores))
    numbers_as_labels = named and numbered and all(read_number(label) is not None for label in labels)
    named_languages = [value.lower() for value in languages if value]
    is_chinese = bool(named_languages) and all(value.startswith(("zh", "chinese")) for value in named_languages)
    language = "zh" if is_chinese else "en"
    tasks = []
    if named and not numbers_as_labels:
        if any("," in label for label in labels) and all(map(DECIMAL.fullmatch, labels)):
            label = next(label for label in labels if "," in label)
            wanted = (
                f"a decimal point ({label.replace(',', '.')}), or `tasks` in the recipe if the labels name classes"
            )
            raise ValueError(f"label: got {label!r}, wanted {wanted}")
        if len(set(labels)) > MANY_CLASSES:
            logging.warning("label: got %d different labels; is it the right column?", len(set(labels)))
        if len(set(labels)) < 2:
            raise ValueError(f"label: got {labels[0]!r} in every row, wanted two or more different labels")
        others = sorted({label for label in labels if read_number(label) is None})
        if 2 * len(others) < len(set(labels)):
            shown = ", ".join(map(repr, others[:5]))
            logging.warning(
                "label: most are numbers, but as %s are none, all are classes; scores are numbers alone", shown
            )
        tasks.append(AffectTask(NAME, "classification", tuple(sorted(set(labels))), language=language))
        logging.info("task %s: one of %s", NAME, ", ".join(tasks[-1].answers))
    if numbered:
        task = _score_task(f"{NAME}_score" if tasks else NAME, scores, language)
        tasks.append(task)
        range_seen = f"scores from {min(scores):g} to {max(scores):g}"
        rounded = f"answers from {task.low:g} to {task.high:g} in steps of {task.step:g}"
        logging.info("task %s: %s, %s", task.name, range_seen, rounded)
        if numbers_as_labels:
            classes = ", ".join(f'"{label}"' for label in sorted(set(labels), key=float)[:MOST_ANSWERS])
            hint = f"tasks: [{{name: {NAME}, labels: [{classes}]}}]"
            logging.warning(
                "label: all are numbers, so they are scores; if they name classes, add to the recipe %s", hint
            )
    if not tasks:
        raise ValueError("tasks: got none, and rows without a label, wanted `label` or `score` in every row")
    return tasks


def _score_task(name: str, scores: list[float], language: str) -> AffectTask:
    """The range of the scores, widened to multiples of the smallest of `STEPS` that gives at most `MOST_ANSWERS`."""
    # Corpora keep scores in float32: the shortest number that rounds to the same is the one in the table.
    lowest, highest = (
        Decimal(np.format_float_positional(np.float32(value), trim="-")) for value in (min(scores), max(scores))
    )
    if highest == lowest:
        raise ValueError(f"score: got {lowest} in every row, wanted two or more different scores")
    if highest - lowest < Decimal("0.2"):
        wanted = "a range of at least 0.2, as answers have one decimal: multiply them"
        raise ValueError(f"score: got scores from {lowest} to {highest}, wanted {wanted}")
    whole = all(float(score).is_integer() for score in scores)
    for step in STEPS:
        low, high = math.floor(lowest / step) * step, math.ceil(highest / step) * step
        if (high - low) / step < MOST_ANSWERS and (step >= 1 or not whole):
            return AffectTask(
                name, "regression", low=float(low), high=float(high), step=float(step), language=language
            )
    wanted = f"a range of at most {STEPS[-1] * (MOST_ANSWERS - 1)}"
    raise ValueError(f"score: got scores from {lowest} to {highest}, wanted {wanted}")
