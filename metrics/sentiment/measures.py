"""Metrics of sentiment scores, computed in float32 like MMSA: `mosei_metrics` (-3 to 3), `sims_metrics` (-1 to 1).

The formulas are written in NumPy because a bootstrap calls them thousands of times: `sklearn.metrics.f1_score` takes a
hundred times as long. Tests compare them with scikit-learn.
"""

from collections.abc import Sequence

import numpy as np


# Bins are open on the left: (lower, upper]. Edges are float32 like the labels, because 0.1 differs in float64.
EDGES = {
    "acc2": (-1.01, 0.0, 1.01),
    "acc3": (-1.01, -0.1, 0.1, 1.01),
    "acc5": (-1.01, -0.7, -0.1, 0.1, 0.7, 1.01),
}
WEAK = np.float32(0.4)  # gold scores from -0.4 to 0.4 are weak sentiments


def mosei_metrics(references: Sequence[float], predictions: Sequence[float | None]) -> dict[str, float | int | None]:
    """The regression protocol of MMSA (`src/MMSA/utils/metricsTop.py`; Mao et al. 2022, ACL demo, arXiv 2203.12441).

    - `mae`, `corr`: mean absolute error and Pearson correlation, nothing clipped.
    - `acc7`, `acc5`, `acc3`: both scores are clipped to [-3, 3], [-2, 2] or [-1, 1] and rounded, half to even; the
      proportion that agrees (Acc-7 is that of Zadeh et al. 2018, ACL).
    - `has0_acc2`, `has0_f1`: negative (score < 0) against non-negative (score >= 0), for all samples.
    - `non0_acc2`, `non0_f1`: positive (score > 0) against the rest, for samples whose gold score is not 0. An answer
      of exactly 0 counts as not positive here and as non-negative in `has0_*`. Use `non0_f1` if a paper does not
      specify the F1.
    - F1 is weighted by gold counts: scikit-learn's `f1_score(references, predictions, average="weighted")`.
    - `zero_predictions`: number of answers of exactly 0.
    - `unparsable`: number of answers that are None or NaN. They are excluded from `mae` and `corr` and count as wrong
      in all other metrics.

    Undefined metrics are None: `corr` of a constant, `non0_*` if all gold scores are 0, `mae` and `corr` if no answer
    could be parsed.

    Args:
        references: Gold scores, finite, at least one.
        predictions: Predicted scores; finite, None or NaN.

    Raises:
        ValueError: If there is no sample, the lengths differ, a score is infinite, or a gold score is NaN.
    """
    gold, given, parsed = _check_scores(references, predictions)
    y, p = gold[parsed], given[parsed]
    figures = {"mae": np.abs(p - y).mean() if len(y) else None, "corr": _pearson(y, p)}
    for limit in (3, 2, 1):
        same = np.round(np.clip(given, -limit, limit)) == np.round(np.clip(gold, -limit, limit))
        figures[f"acc{2 * limit + 1}"] = same.mean()
    polarity = np.where(parsed, given >= 0, -1)
    figures |= {"has0_acc2": (polarity == (gold >= 0)).mean(), "has0_f1": _weighted_f1(gold >= 0, polarity)}
    polar = gold != 0
    figures |= {"non0_acc2": None, "non0_f1": None}
    if polar.any():
        polarity = np.where(parsed, given > 0, -1)[polar]
        positive = gold[polar] > 0
        figures |= {"non0_acc2": (polarity == positive).mean(), "non0_f1": _weighted_f1(positive, polarity)}
    counts = {"zero_predictions": int((given == 0).sum()), "unparsable": int((~parsed).sum())}
    return _as_floats(figures) | counts


def sims_metrics(references: Sequence[float], predictions: Sequence[float | None]) -> dict[str, float | int | None]:
    """The regression protocol of CH-SIMS v2 (`utils/metricsTop.py` of thuiar/ch-sims-v2), and of MMSA for CH-SIMS.

    For all metrics, both scores are first clipped to [-1, 1].

    - `mae`, `corr`, `r2`: mean absolute error, Pearson correlation, and 1 - sum (y - p)^2 / sum (y - mean y)^2.
    - `acc2`: negative (-1.01, 0] against positive (0, 1.01]; 0 is negative. `f1` is the F1 of these classes, weighted
      by gold counts: scikit-learn's `f1_score(references, predictions, average="weighted")`.
    - `acc3`: edges -0.1 and 0.1. `acc5`: edges -0.7, -0.1, 0.1 and 0.7. Bins are open on the left.
    - `acc2_weak`: `acc2` for samples whose gold score is in [-0.4, 0.4] (Liu et al. 2022, ICMI, arXiv 2209.02604).
    - `unparsable`: number of answers that are None or NaN. They are excluded from `mae`, `corr` and `r2` and count as
      wrong in all other metrics.

    Undefined metrics are None: `corr` of a constant, `r2` of constant gold scores, `acc2_weak` without weak samples.

    Args:
        references: Gold scores, finite, at least one.
        predictions: Predicted scores; finite, None or NaN.

    Raises:
        ValueError: If there is no sample, the lengths differ, a score is infinite, or a gold score is NaN.
    """
    gold, given, parsed = _check_scores(references, predictions)
    gold, given = np.clip(gold, -1, 1), np.clip(given, -1, 1)
    y, p = gold[parsed], given[parsed]
    figures = {"mae": np.abs(p - y).mean() if len(y) else None, "corr": _pearson(y, p), "r2": _r2(y, p)}
    bins = {name: (_bins(gold, edges), _bins(given, edges)) for name, edges in EDGES.items()}
    figures |= {name: (truth == answer).mean() for name, (truth, answer) in bins.items()}
    truth, answer = bins["acc2"]
    figures["f1"] = _weighted_f1(truth, answer)
    weak = (gold >= -WEAK) & (gold <= WEAK)
    figures["acc2_weak"] = (truth == answer)[weak].mean() if weak.any() else None
    return _as_floats(figures) | {"unparsable": int((~parsed).sum())}


def _check_scores(
    references: Sequence[float], predictions: Sequence[float | None]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return gold scores and answers as (N,) float32, with NaN for None, and a mask (N,) of the parsed answers."""
    scores = {}
    for field, values in (("references", references), ("predictions", predictions)):
        # Convert to float32 first, because the conversion decides on which side of a bin edge a score lies.
        scores[field] = np.asarray(values, dtype=np.float32)
        if scores[field].ndim != 1 or np.isinf(scores[field]).any():
            got = f"the shape {scores[field].shape} or an infinite score"
            raise ValueError(f"{field}: got {got}, wanted a list of finite scores")
    gold, given = scores["references"], scores["predictions"]
    if gold.shape != given.shape or not len(gold):
        raise ValueError(f"predictions: got {len(given)}, wanted one for each of {len(gold)} references")
    if np.isnan(gold).any():
        raise ValueError(f"references: got NaN or None at {np.isnan(gold).argmax()}, wanted scores")
    return gold, given, ~np.isnan(given)


def _bins(scores: np.ndarray, edges: tuple[float, ...]) -> np.ndarray:
    """The index i of the bin (edge i, edge i + 1] of each score; -1 for NaN."""
    return np.where(np.isnan(scores), -1, np.searchsorted(np.array(edges, np.float32), scores, side="left") - 1)


def _pearson(y: np.ndarray, p: np.ndarray) -> float | None:
    """Pearson correlation; None if one of the two is constant."""
    # Unlike the range, the standard deviation of equal float32 values is not always exactly 0.
    return np.corrcoef(p, y)[0, 1] if len(y) and np.ptp(y) > 0 and np.ptp(p) > 0 else None


def _r2(y: np.ndarray, p: np.ndarray) -> float | None:
    """Coefficient of determination; None if the gold scores are constant."""
    if not len(y) or np.ptp(y) == 0:
        return None
    y, p = y.astype(np.float64), p.astype(np.float64)
    return 1 - np.square(y - p).sum() / np.square(y - y.mean()).sum()


def _weighted_f1(gold: np.ndarray, given: np.ndarray) -> float:
    """F1 of classes 0 and 1, weighted by their gold counts; an answer of -1 belongs to neither."""
    total = 0.0
    for label in (0, 1):
        support, answered = (gold == label).sum(), (given == label).sum()
        hits = ((gold == label) & (given == label)).sum()
        total += support * 2 * hits / max(support + answered, 1)
    return total / len(gold)


def _as_floats(figures: dict[str, float | None]) -> dict[str, float | None]:
    return {name: None if value is None else float(value) for name, value in figures.items()}
