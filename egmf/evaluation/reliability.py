"""How far the probabilities of answers can be trusted: expected calibration error and negative log-likelihood."""

import numpy as np

from egmf.processing_egmf import AffectTask


BINS = 15


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[tuple[int, float, float]]:
    """Rows, mean confidence and accuracy of each bin of equal width over (0, 1] that is not empty.

    Args:
        confidence: Probability of the most probable answer, (N,).
        right: Whether it is the gold answer, (N,).
    """
    places = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    return [
        (int(inside.sum()), float(confidence[inside].mean()), float(right[inside].mean()))
        for inside in (places == place for place in range(BINS))
        if inside.any()
    ]


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error (Guo et al. 2017): mean over rows of a bin's |accuracy - mean confidence|."""
    bins = reliability(confidence, right)
    return sum(count * abs(accuracy - mean) for count, mean, accuracy in bins) / len(confidence)


def top_answers(predictions: list[dict], task: AffectTask, power: float = 1.0) -> tuple[np.ndarray, ...]:
    """Confidence (N,), whether the top answer is the gold one (N,), and the gold answer's probability (N,).

    Args:
        predictions: Of [`Predictor`], with a distribution over `task`.
        task: The task.
        power: To which the probabilities are raised before they are normalised again.
    """
    by_row = [[row["distribution"][answer] for answer in task.answers] for row in predictions]
    probabilities = np.array(by_row) ** power
    probabilities /= probabilities.sum(1, keepdims=True)
    gold = np.array([task.answers.index(task.format(row["gold"])) for row in predictions])
    rows = np.arange(len(gold))
    return probabilities.max(1), probabilities.argmax(1) == gold, probabilities[rows, gold]


def calibration_of(predictions: list[dict], task: AffectTask, temperature: float) -> dict:
    """Calibration of the distributions, which have the `temperature`, and of the same at temperature 1.

    Returns:
        `temperature`, and for `before` and `after` it `ece` (15 bins) and `nll`, the mean negative log-likelihood of
        the gold answers (natural logarithm).
    """
    measured: dict = {"temperature": temperature}
    for name, power in (("before", temperature), ("after", 1.0)):
        confidence, right, likelihood = top_answers(predictions, task, power)
        nll = float(-np.log(likelihood.clip(min=np.finfo(np.float32).tiny)).mean())
        measured[name] = {"ece": calibration_error(confidence, right), "nll": nll}
    return measured
