"""The metrics of results/*.md, and bootstraps that draw whole clusters: videos, dialogues, actors or speakers."""

import numpy as np

from metrics.emotion.measures import emotion_metrics


RESAMPLES, BOOTSTRAP_SEED = 10_000, 0
METRICS = {"accuracy": "accuracy", "weighted_f1": "weighted F1", "ua": "UA"}  # their names in tables


def draw(clusters: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The number of each sample's cluster (samples,), and how often each resample has it (resamples, clusters)."""
    names, owner = np.unique(clusters, return_inverse=True)
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    return owner, rng.multinomial(len(names), [1 / len(names)] * len(names), size=RESAMPLES)


def unweighted_accuracy(gold: np.ndarray, right: np.ndarray) -> float:
    """Mean of the classes' recalls."""
    return float(np.mean([right[gold == label].mean() for label in sorted(set(gold))]))


def measure(gold: list[str], given: list[str | None]) -> dict[str, float]:
    """The metrics of `METRICS`."""
    found = emotion_metrics(gold, given)
    right = np.array([one == other for one, other in zip(gold, given, strict=True)])
    figures = {"accuracy": found["accuracy"], "weighted_f1": found["weighted_f1"]}
    return figures | {"ua": unweighted_accuracy(np.array(gold), right)}


def interval(metric: str, gold: list[str], given: list[list[str | None]], clusters: list[str]) -> list[float]:
    """95 % percentile interval of a metric's mean over seeds, under a bootstrap that draws clusters.

    Args:
        metric: One of `METRICS`.
        gold: Labels of all samples.
        given: Answers to them, by seed.
        clusters: The cluster of each sample.
    """
    owner, drawn = draw(clusters)
    labels, index = np.unique(gold, return_inverse=True)
    count, drawn = len(labels), drawn.astype(np.float64)
    totals = np.zeros(RESAMPLES)
    for answers in given:
        place = {label: number for number, label in enumerate(labels)}
        answered = np.array([place.get(answer, count) for answer in answers])
        table_of_counts = np.zeros((drawn.shape[1], count, count + 1))
        np.add.at(table_of_counts, (owner, index, answered), 1)
        confusion = (drawn @ table_of_counts.reshape(drawn.shape[1], -1)).reshape(RESAMPLES, count, count + 1)
        hits, support = np.einsum("rcc->rc", confusion[:, :, :count]), confusion.sum(2)
        if metric == "ua":
            totals += np.nanmean(np.where(support > 0, hits / support.clip(min=1), np.nan), 1)
        elif metric == "accuracy":
            totals += hits.sum(1) / support.sum(1)
        else:
            f1 = 2 * hits / (support + confusion[:, :, :count].sum(1)).clip(min=1)
            totals += (f1 * support).sum(1) / support.sum(1)
    return [round(float(bound), 6) for bound in np.quantile(totals / len(given), (0.025, 0.975))]


def cluster_bootstrap(difference: np.ndarray, clusters: list[str]) -> dict[str, float]:
    """Bootstrap of a mean over clustered samples: draws whole clusters with replacement.

    The interval is the percentile interval. The two-sided p-value is twice the smaller share of resamples on either
    side of 0, including the observed sample (Davison and Hinkley 1997, Bootstrap Methods and their Application,
    sections 3.8 and 4.2).

    Args:
        difference: Difference of two models on each sample, averaged over seeds, (samples,).
        clusters: The cluster of each sample.
    """
    owner, drawn = draw(clusters)
    sums, sizes = np.bincount(owner, weights=difference), np.bincount(owner)
    means = (drawn @ sums) / (drawn @ sizes)
    low, high = np.quantile(means, (0.025, 0.975))
    tail = 1 + min((means <= 0).sum(), (means >= 0).sum())
    figures = {"difference": difference.mean(), "low": low, "high": high}
    figures = {key: round(float(value), 6) for key, value in figures.items()}
    return figures | {"p_value": min(1.0, 2 * float(tail) / (RESAMPLES + 1)), "resamples": RESAMPLES}
