"""Calibration: the fitted gain and temperature, and how far probabilities can be trusted."""

import math

import numpy as np
import pytest
import torch

from egmf.evaluation.reliability import calibration_error, calibration_of
from egmf.processing_egmf import BUILTIN_TASKS
from egmf.training.calibration import GAINS, fit


def distributions(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, and gold answers that are drawn from them."""
    generator = torch.Generator().manual_seed(0)
    log_probs = logits.log_softmax(-1)
    return log_probs, torch.multinomial(log_probs.exp(), 1, generator=generator)[:, 0]


def test_fit_finds_the_temperature_that_made_the_answers():
    true, gold = distributions(torch.randn(4000, 5, generator=torch.Generator().manual_seed(1)) * 2)
    overconfident = true * 4
    gain, [temperature], [loss] = fit([(overconfident[:, None].expand(-1, 2, -1), gold)], torch.ones(2))
    assert gain == 1.0 and temperature == pytest.approx(4, rel=0.1)
    assert loss == pytest.approx(torch.nn.functional.nll_loss(true, gold).item(), abs=0.01)


def test_fit_lets_the_better_of_both_prevail():
    """Where the LLM knows nothing, the experts' power is large; where the experts know nothing, it is 0."""
    known, gold = distributions(torch.randn(2000, 4, generator=torch.Generator().manual_seed(2)) * 3)
    noise = torch.randn(2000, 4, generator=torch.Generator().manual_seed(3)) * 3
    for llm, experts, wanted in ((noise, known, GAINS[-4:]), (known, noise, GAINS[:3])):
        by_gain = (llm[:, None] + GAINS[:, None] * experts[:, None]).log_softmax(-1)
        gain, _, _ = fit([(by_gain, gold)], GAINS)
        assert gain in wanted


def test_a_split_without_an_error_does_not_ask_for_certainty():
    log_probs = torch.tensor([[0.9, 0.1]] * 20).log()[:, None]
    _, [temperature], [loss] = fit([(log_probs, torch.zeros(20, dtype=torch.long))], torch.ones(1))
    # Of 20 rows and two answers, the smoothed target is 1 - 1 / 42.
    assert math.exp(-loss) == pytest.approx(1 - 1 / 42, abs=0.005) and 0.4 < temperature < 0.8


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    confidence = np.array([0.9] * 10 + [0.3] * 10)
    right = np.array([True] * 6 + [False] * 4 + [True] * 3 + [False] * 7)
    assert calibration_error(confidence, right) == pytest.approx(0.5 * 0.3 + 0.5 * 0.0)


def test_calibration_before_and_after_the_temperature():
    """The distributions in predictions have the temperature; before it they are raised to its power."""
    task = BUILTIN_TASKS["mosi"]
    sharp = {"positive": 0.99, "negative": 0.01}
    flat = {name: value**0.5 / (0.99**0.5 + 0.01**0.5) for name, value in sharp.items()}
    rows = [{"gold": gold, "distribution": flat} for gold in ("positive", "positive", "negative")]
    found = calibration_of(rows, task, 2.0)
    assert found["temperature"] == 2.0
    assert found["before"]["nll"] == pytest.approx(-(2 * math.log(0.99) + math.log(0.01)) / 3)
    assert found["before"]["ece"] == pytest.approx(0.99 - 2 / 3)
    assert found["after"]["nll"] < found["before"]["nll"]
    assert found["after"]["ece"] == pytest.approx(flat["positive"] - 2 / 3)
