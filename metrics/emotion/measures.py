"""Accuracy, F1 and unweighted accuracy of emotion labels, as the papers on the corpora define them.

The formulas are written in NumPy because a bootstrap calls them thousands of times: `sklearn.metrics.f1_score` takes a
hundred times as long. Tests compare them with scikit-learn.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def emotion_metrics(
    references: Sequence[str],
    predictions: Sequence[str | None],
    labels: Sequence[str] | None = None,
) -> dict[str, float | int | dict[str, float | None]]:
    """Compute accuracy, weighted F1, UA and the F1 of each class; neutral is a class like the others.

    - `accuracy`: proportion of correct answers.
    - `weighted_f1`: mean of the classes' F1, weighted by their gold counts (scikit-learn's `average="weighted"`).
      This is the metric of the MELD paper (Poria et al. 2019, ACL, arXiv 1810.02508) and later work, and of
      MSE-Adapter (Yang et al. 2025, arXiv 2502.12478) on MELD and CHERMA.
    - `ua`: unweighted accuracy, the mean of the recalls of the classes that occur in the references (scikit-learn's
      `balanced_accuracy_score`). This is the metric of emotional speech (Schuller et al. 2009, Interspeech), such as
      RAVDESS's.
    - `f1_by_class`: F1 = 2 TP / (2 TP + FP + FN) of each label; None if a label occurs neither in the references nor
      in the predictions.
    - `unparsable`: number of answers that are None. They are wrong and belong to no class.

    Args:
        references: Gold labels, at least one.
        predictions: Predicted labels; None is an unparsable answer.
        labels: All valid labels, in the order of `f1_by_class`; by default the labels that occur, sorted.

    Raises:
        ValueError: If there is no sample, the lengths differ, or a label is not one of `labels`.
    """
    if len(references) != len(predictions) or not len(references):
        raise ValueError(f"predictions: got {len(predictions)}, wanted one for each of {len(references)} references")
    found: dict[str, set[str]] = {
        "references": set(references),
        "predictions": {label for label in predictions if label is not None},
    }
    names = sorted(set().union(*found.values())) if labels is None else list(labels)
    for field, got in found.items():
        if unknown := got - set(names):
            raise ValueError(f"{field}: got {sorted(map(str, unknown))}, wanted labels of {names}")
    codes: dict[str | None, int] = {name: index for index, name in enumerate(names)} | {None: -1}
    gold = np.array([codes[label] for label in references])
    given = np.array([codes[label] for label in predictions])
    hits = np.bincount(gold[gold == given], minlength=len(names))
    support, answered = (np.bincount(which[which >= 0], minlength=len(names)) for which in (gold, given))
    f1 = 2 * hits / np.maximum(support + answered, 1)
    figures: dict[str, Any] = {
        "accuracy": float(hits.sum() / len(gold)),
        "weighted_f1": float((f1 * support).sum() / len(gold)),
        "ua": float((hits[support > 0] / support[support > 0]).mean()),
    }
    occurs = support + answered > 0
    by_class = {name: float(f1[i]) if occurs[i] else None for i, name in enumerate(names)}
    return figures | {"f1_by_class": by_class, "unparsable": int((given < 0).sum())}
