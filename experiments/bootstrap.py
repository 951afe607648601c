"""The metrics of results/*.md, averaged over seeds, with their intervals and paired tests over clusters.

Answers are given by seed. `samples` are those of `egmf.evaluation.significance.resample`.
"""

from collections.abc import Sequence

import numpy as np

from egmf.evaluation.significance import intervals, paired_differences
from metrics.emotion.measures import emotion_metrics


RESAMPLES = 10_000
METRICS = {"accuracy": "accuracy", "weighted_f1": "weighted F1", "ua": "UA"}  # their names in tables

Answers = list[list[str | None]]  # by seed


def measure(gold: list[str], *given: list[str | None]) -> dict[str, float]:
    """The means over seeds of `METRICS`."""
    runs = [emotion_metrics(gold, answers) for answers in given]
    return {metric: float(np.mean([run[metric] for run in runs])) for metric in METRICS}


def interval(gold: list[str], given: Answers, samples: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """The 95 % interval of each metric."""
    found = intervals(lambda gold, rows: measure(gold, *rows.T), gold, [*zip(*given, strict=True)], samples)
    return {metric: [round(bound, 6) for bound in bounds] for metric, bounds in found.items()}


def compare(
    gold: list[str], first: Answers, second: Answers, samples: Sequence[np.ndarray], metric: str = "accuracy"
) -> dict[str, float]:
    """The paired bootstrap of the difference in one of `METRICS`, first minus second."""
    runs = ([*zip(*answers, strict=True)] for answers in (first, second))
    measured = _accuracy if metric == "accuracy" else lambda gold, rows: measure(gold, *rows.T)
    found = paired_differences(measured, gold, *runs, samples)[metric]
    rounded = {name: round(found[name], 6) for name in ("difference", "low", "high")}
    return found | rounded | {"resamples": len(samples)}


def _accuracy(gold: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """Accuracy alone, much faster than [`measure`], of answers (samples, seeds)."""
    return {"accuracy": float((gold[:, None] == rows).mean())}
