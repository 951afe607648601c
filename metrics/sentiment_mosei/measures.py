"""Measures of sentiment scores from -3 to 3, as MMSA defines them for CMU-MOSI and CMU-MOSEI. Float32 throughout."""

from collections.abc import Sequence

import numpy as np


def mosei_metrics(
    references: Sequence[float], predictions: Sequence[float | None], decimals: int | None = None
) -> dict[str, float | int | None]:
    """The regression protocol of MMSA (`src/MMSA/utils/metricsTop.py`; Mao et al. 2022, ACL demo, arXiv 2203.12441).

    - `mae`, `corr`: mean absolute error and Pearson correlation, nothing clipped.
    - `acc7`, `acc5`, `acc3`: both clipped to [-3, 3], [-2, 2], [-1, 1] and rounded, half to even; the share that
      agrees (Acc-7 is that of Zadeh et al. 2018, ACL).
    - `has0_acc2`, `has0_f1`: negative (score < 0) against non-negative (score >= 0), all samples.
    - `non0_acc2`, `non0_f1`: samples whose gold score is not 0; positive (score > 0) or not. An answer of exactly 0 is
      not positive here, and not negative above. F1 where a paper does not say which.
    - F1 is weighted by gold counts: scikit-learn's `f1_score(references, predictions, average="weighted")`.
    - `zero_predictions`: answers of exactly 0; `unparsable`: answers that are None or NaN. The latter are left out of
      `mae` and `corr`, and wrong in all else.

    What is not defined is None: `corr` of a constant, `non0_*` without gold scores other than 0, all but counts of
    wrong answers without a parsable one.

    Args:
        references: The gold scores, finite, at least one.
        predictions: The answers, finite or None or NaN.
        decimals: Figures are rounded to so many; 4 is how MMSA reports them.

    Raises:
        ValueError: If there is no sample, the lengths differ, or a score is infinite, a gold one NaN.
    """
    gold, given = _scores("references", references), _scores("predictions", predictions)
    if gold.shape != given.shape or not len(gold):
        raise ValueError(f"predictions: got {len(given)}, wanted one for each of {len(gold)} references")
    if np.isnan(gold).any():
        raise ValueError(f"references: got NaN or None at {np.isnan(gold).argmax()}, wanted scores")
    parsed = ~np.isnan(given)
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
    return {name: _rounded(value, decimals) for name, value in figures.items()} | counts


def _scores(field: str, values: Sequence[float | None]) -> np.ndarray:
    """(N,) float32; None becomes NaN. Labels at a bin's edge are what float32 makes of them, so that comes first."""
    scores = np.asarray(values, dtype=np.float32)
    if scores.ndim != 1 or np.isinf(scores).any():
        raise ValueError(f"{field}: got the shape {scores.shape} or an infinite score, wanted a list of finite scores")
    return scores


def _pearson(y: np.ndarray, p: np.ndarray) -> float | None:
    """Pearson's correlation; None where one of the two is constant."""
    # The spread, not the deviation: that of equal float32 values need not come out as 0.
    return np.corrcoef(p, y)[0, 1] if len(y) and np.ptp(y) > 0 and np.ptp(p) > 0 else None


def _weighted_f1(gold: np.ndarray, given: np.ndarray) -> float:
    """Mean of the F1 of classes 0 and 1, weighted by their gold counts; an answer of -1 is of neither."""
    total = 0.0
    for label in (0, 1):
        support, answered = (gold == label).sum(), (given == label).sum()
        hits = ((gold == label) & (given == label)).sum()
        total += support * 2 * hits / max(support + answered, 1)
    return total / len(gold)


def _rounded(value: float | None, decimals: int | None) -> float | None:
    return None if value is None else float(value) if decimals is None else round(float(value), decimals)
