"""Confidence intervals and paired tests: a bootstrap over clusters, and McNemar's test.

Utterances of one video, dialogue or actor share speaker, topic and microphone. The bootstrap therefore draws whole
clusters; drawing single utterances would give intervals that are too narrow. McNemar's test ignores clusters. If the
utterances of a cluster tend to be correct or wrong together, its p-value is too small; use the bootstrap's instead.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest


RESAMPLES, SEED, LEVEL = 1000, 0, 0.95
ENOUGH = 10  # clusters; the percentile intervals of fewer are clearly too narrow
Measure = Callable[[Any, Any], dict[str, Any]]  # of arrays: gold labels or scores, and answers


class Resamples(Sequence):
    """Row indices (N,) of each bootstrap sample. They are made when they are used: all together are large.

    Args:
        cluster: The cluster of each row, as a number, (rows,).
        drawn: How often each cluster is drawn, (resamples, clusters).
    """

    def __init__(self, cluster: np.ndarray, drawn: np.ndarray):
        self.cluster, self.drawn = cluster, drawn

    def __len__(self) -> int:
        return len(self.drawn)

    def __getitem__(self, place):
        return np.repeat(np.arange(len(self.cluster)), self.drawn[place][self.cluster])


def resample(clusters: Sequence[str], resamples: int = RESAMPLES) -> Sequence[np.ndarray]:
    """Bootstrap samples with a fixed seed: row indices of whole clusters, drawn with replacement.

    Args:
        clusters: The cluster of each row, see `corpora.clusters_of`.
        resamples: The number of samples.

    Returns:
        Nothing if all rows are of one cluster, because one cluster does not show how much clusters differ.
    """
    names, index = np.unique(clusters, return_inverse=True)
    if len(names) == 1:
        return []
    rng, shares = np.random.default_rng(SEED), [1 / len(names)] * len(names)
    drawn = [rng.multinomial(len(names), shares).astype(np.uint16) for _ in range(resamples)]
    return Resamples(index, np.stack(drawn))


def intervals(
    measure: Measure, gold: Sequence, predicted: Sequence, samples: Sequence[np.ndarray]
) -> dict[str, list[float] | None]:
    """The 95 % percentile interval of every metric of a run (Efron and Tibshirani 1993, chapter 13).

    Counts have no interval. An interval leaves out resamples on which its metric is undefined. It is None if the
    metric itself is undefined.
    """
    truth, answers = _arrays(gold, predicted)
    observed = _figures(measure(truth, answers))
    drawn = [_figures(measure(truth[rows], answers[rows])) for rows in samples]
    return {name: _quantiles(_defined(drawn, name)) if value is not None else None for name, value in observed.items()}


def paired_differences(
    measure: Measure, gold: Sequence, first: Sequence, second: Sequence, samples: Sequence[np.ndarray]
) -> dict[str, dict[str, float] | None]:
    """For every metric, first run minus second: `difference`, its 95 % interval `low` to `high`, and `p_value`.

    Both runs are measured on the same resamples. The two-sided p-value is twice the smaller share of resamples on
    either side of 0, including the observed sample (Davison and Hinkley 1997, section 4.2). The result is None if the
    metric is undefined for one of the runs, or if there are no resamples.
    """
    truth, one, other = _arrays(gold, first, second)
    observed = _subtracted(measure(truth, one), measure(truth, other))
    drawn = [_subtracted(measure(truth[rows], one[rows]), measure(truth[rows], other[rows])) for rows in samples]
    found: dict[str, dict[str, float] | None] = {}
    for name, difference in observed.items():
        values = _defined(drawn, name)
        if difference is None or not len(values):
            found[name] = None
            continue
        low, high = _quantiles(values)
        tail = 1 + min((values <= 0).sum(), (values >= 0).sum())
        p_value = min(1.0, 2 * float(tail) / (len(values) + 1))
        found[name] = {"difference": difference, "low": low, "high": high, "p_value": p_value}
    return found


def mcnemar(first_correct: Sequence[bool], second_correct: Sequence[bool]) -> dict[str, float]:
    """Exact two-sided McNemar test of two runs' answers to the same samples (McNemar 1947, Psychometrika 12).

    If the runs are equally good, each is correct on about half of the samples that exactly one run answers correctly;
    the test is binomial. It assumes independent samples and ignores clusters. `first_only` and `second_only` count
    the samples that only the first or only the second run answers correctly.
    """
    pairs = list(zip(first_correct, second_correct, strict=True))
    first_only = sum(a and not b for a, b in pairs)
    second_only = sum(b and not a for a, b in pairs)
    total = first_only + second_only
    p_value = binomtest(first_only, total).pvalue if total else 1.0
    return {"first_only": first_only, "second_only": second_only, "p_value": float(p_value)}


def _arrays(gold: Sequence, *predicted: Sequence) -> list[np.ndarray]:
    """Converts scores to float32 arrays, with NaN for None, and labels to object arrays."""
    dtype = object if isinstance(gold[0], str) else np.float32
    return [np.asarray(values, dtype=dtype) for values in (gold, *predicted)]


def _figures(metrics: dict[str, Any]) -> dict[str, float | None]:
    """The scalar metrics of a report, without counts and tables."""
    return {name: value for name, value in metrics.items() if value is None or isinstance(value, float)}


def _subtracted(first: dict[str, Any], second: dict[str, Any]) -> dict[str, float | None]:
    pairs = ((name, value, second[name]) for name, value in _figures(first).items())
    return {name: None if a is None or b is None else a - b for name, a, b in pairs}


def _defined(drawn: list[dict[str, float | None]], name: str) -> np.ndarray:
    return np.array([figures[name] for figures in drawn if figures[name] is not None])


def _quantiles(values: np.ndarray) -> list[float] | None:
    outside = (1 - LEVEL) / 2
    return np.quantile(values, (outside, 1 - outside)).tolist() if len(values) else None
