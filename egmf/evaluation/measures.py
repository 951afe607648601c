"""The metrics of each task, by the protocol of its corpus."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from egmf.processing_egmf import AffectTask
from metrics.emotion.measures import emotion_metrics
from metrics.sentiment.measures import mosei_metrics, sims_metrics


def measure_of(task: AffectTask) -> Callable[[Sequence, Sequence], dict[str, Any]]:
    """The metric function of a task, called with gold labels and answers.

    Classes: [`emotion_metrics`]. Scores from -3 to 3: the protocol of MOSI and MOSEI, [`mosei_metrics`]; from -1 to 1:
    that of SIMS, [`sims_metrics`]; on any other scale, [`regression_metrics`].
    """
    if task.kind == "classification":
        return partial(emotion_metrics, labels=task.answers)
    return {(-3.0, 3.0): mosei_metrics, (-1.0, 1.0): sims_metrics}.get((task.low, task.high), regression_metrics)


def metrics_of(predictions: list[dict], task: AffectTask) -> dict[str, dict]:
    """Metrics by kind of answer, for predictions with labels of `task`."""
    gold, measure = [row["gold"] for row in predictions], measure_of(task)
    return {
        answer: measure(gold, [row["answers"][answer] for row in predictions]) for answer in predictions[0]["answers"]
    }


def classification_metrics(gold: Sequence[str], predicted: Sequence[str | None]) -> dict[str, float]:
    """Metrics of classes during training: `accuracy`, `weighted_f1` and `unparsable` of [`emotion_metrics`]."""
    metrics = emotion_metrics(gold, predicted)
    return {name: metrics[name] for name in ("accuracy", "weighted_f1", "unparsable")}


def regression_metrics(gold: Sequence[float], predicted: Sequence[float | None]) -> dict[str, float | None]:
    """Metrics that are valid on every scale: `mae`, `corr` and `unparsable` of [`mosei_metrics`], without clipping."""
    metrics = mosei_metrics(gold, predicted)
    return {name: metrics[name] for name in ("mae", "corr", "unparsable")}
