"""Measures of sentiment scores from -1 to 1, as MMSA and CH-SIMS v2 define them. Float32 throughout."""

from collections.abc import Sequence

import numpy as np


# Bins are open on the left: (lower, upper]. In float32, as the labels are: in float64, 0.1 is below its own edge.
EDGES = {
    "acc2": (-1.01, 0.0, 1.01),
    "acc3": (-1.01, -0.1, 0.1, 1.01),
    "acc5": (-1.01, -0.7, -0.1, 0.1, 0.7, 1.01),
}
WEAK = np.float32(0.4)  # a gold score from -0.4 to 0.4 is a weak sentiment


def sims_metrics(
    references: Sequence[float], predictions: Sequence[float | None], decimals: int | None = None
) -> dict[str, float | int | None]:
    """The regression protocol of CH-SIMS v2 (`utils/metricsTop.py` of thuiar/ch-sims-v2), and of MMSA for CH-SIMS.

    Both scores are clipped to [-1, 1] first, for every figure.

    - `mae`, `corr`, `r2`: mean absolute error, Pearson correlation, and 1 - sum (y - p)^2 / sum (y - mean y)^2.
    - `acc2`: negative (-1.01, 0] against positive (0, 1.01]: 0 is negative. `f1` is the F1 of these two, weighted by
      gold counts: scikit-learn's `f1_score(references, predictions, average="weighted")`.
    - `acc3`: edges -0.1 and 0.1. `acc5`: edges -0.7, -0.1, 0.1 and 0.7. Bins are open on the left.
    - `acc2_weak`: `acc2` of the samples whose gold score is in [-0.4, 0.4] (Liu et al. 2022, ICMI, arXiv 2209.02604).
    - `unparsable`: answers that are None or NaN. They are left out of `mae`, `corr` and `r2`, and wrong in all else.

    What is not defined is None: `corr` of a constant, `r2` of constant gold scores, `acc2_weak` without weak samples.

    Args:
        references: The gold scores, finite, at least one.
        predictions: The answers, finite or None or NaN.
        decimals: Figures are rounded to so many.

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
    figures = {"mae": np.abs(p - y).mean() if len(y) else None, "corr": _pearson(y, p), "r2": _r2(y, p)}
    bins = {name: (_bins(gold, edges), _bins(given, edges)) for name, edges in EDGES.items()}
    figures |= {name: (truth == answer).mean() for name, (truth, answer) in bins.items()}
    truth, answer = bins["acc2"]
    figures["f1"] = _weighted_f1(truth, answer)
    weak = (gold >= -WEAK) & (gold <= WEAK)
    figures["acc2_weak"] = (truth == answer)[weak].mean() if weak.any() else None
    return {name: _rounded(value, decimals) for name, value in figures.items()} | {"unparsable": int((~parsed).sum())}


def _scores(field: str, values: Sequence[float | None]) -> np.ndarray:
    """(N,) float32 in [-1, 1]; None becomes NaN."""
    scores = np.asarray(values, dtype=np.float32)
    if scores.ndim != 1 or np.isinf(scores).any():
        raise ValueError(f"{field}: got the shape {scores.shape} or an infinite score, wanted a list of finite scores")
    return np.clip(scores, -1, 1)


def _bins(scores: np.ndarray, edges: tuple[float, ...]) -> np.ndarray:
    """The bin (edge i, edge i + 1] that each score is in; of NaN, -1."""
    return np.where(np.isnan(scores), -1, np.searchsorted(np.array(edges, np.float32), scores, side="left") - 1)


def _pearson(y: np.ndarray, p: np.ndarray) -> float | None:
    """Pearson's correlation; None where one of the two is constant."""
    # The spread, not the deviation: that of equal float32 values need not come out as 0.
    return np.corrcoef(p, y)[0, 1] if len(y) and np.ptp(y) > 0 and np.ptp(p) > 0 else None


def _r2(y: np.ndarray, p: np.ndarray) -> float | None:
    """The coefficient of determination; None where the gold scores are constant."""
    if not len(y) or np.ptp(y) == 0:
        return None
    y, p = y.astype(np.float64), p.astype(np.float64)  # as `np.corrcoef` does by itself; no edge is near
    return 1 - np.square(y - p).sum() / np.square(y - y.mean()).sum()


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
