"""Fits the power of the experts' own answer and a temperature per task to the validation split, after training."""

import logging
from collections import Counter
from collections.abc import Iterable

import torch
from datasets import Dataset

from egmf.processing_egmf import EGMFProcessor
from egmf.recipe import PhaseArguments
from egmf.training.validation import AffectTrainer


GAINS = torch.tensor([0.0, *(2.0 ** (step / 2) for step in range(-8, 13))])  # 1/16 to 64
FEWEST = 5  # rows of each task; fewer would fit chance
TEMPERATURES = torch.tensor([2.0 ** (step / 8) for step in range(-24, 49)])  # 1/8 to 64


def fit(
    scores: list[tuple[torch.Tensor, torch.Tensor]], gains: torch.Tensor, temperatures: torch.Tensor = TEMPERATURES
) -> tuple[float, list[float], list[float]]:
    """Chooses one gain, and a temperature per task, by the mean negative log-likelihood of the gold answers.

    As for Platt scaling (Platt 1999), the targets are smoothed by what n rows can say at most: 1 / (n + 1) of the
    probability is spread evenly over all answers. Otherwise a split without an error would ask for a temperature of 0.

    Args:
        scores: Per task, log-probabilities (rows, gains, answers) and indices of the gold answers (rows,).
        gains: (G,) gains of the second axis.
        temperatures: (T,) temperatures to choose from.

    Returns:
        The gain with the lowest sum over the tasks, each at its best temperature; these temperatures; and the mean
        negative log-likelihoods, with targets that are not smoothed.
    """
    losses = [_losses(*pair, temperatures) for pair in scores]
    smoothed = torch.stack([by_target[1] for by_target in losses])  # (tasks, gains, temperatures)
    best = smoothed.min(-1)
    place = int(best.values.sum(0).argmin())
    chosen = best.indices[:, place]
    plain = [by_target[0][place, index].item() for by_target, index in zip(losses, chosen, strict=True)]
    return float(gains[place]), temperatures[chosen].tolist(), plain


def _losses(log_probs: torch.Tensor, gold: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of the gold answers and cross-entropy of the smoothed: (2, gains, temperatures)."""
    places = gold[:, None, None].expand(-1, log_probs.shape[1], 1)
    share, by_temperature = 1 / (len(gold) + 1), []
    for temperature in temperatures:
        tempered = (log_probs.double() / temperature).log_softmax(-1)
        plain, evenly = -tempered.gather(2, places).mean((0, 2)), -tempered.mean((0, 2))
        by_temperature.append(torch.stack([plain, (1 - share) * plain + share * evenly]))
    return torch.stack(by_temperature, -1)


def calibrate(
    trainer: AffectTrainer,
    processor: EGMFProcessor,
    tasks: list[str],
    validation: Iterable[Dataset],
    phases: PhaseArguments,
) -> None:
    """Sets the gain of the trained model and the temperatures of the processor, and logs them.

    The recipe's `expert_gain` and `temperature` are used as they are. What it leaves open is fitted to the validation
    split; without one, or if a task has fewer than 5 rows in it, both are 1. The gain of a readout that was trained
    with the LLM is 1 as well: the sum of both is what `generate()` has learned.

    Args:
        trainer: The trainer of the finished last phase.
        processor: The processor that is saved with the model.
        tasks: Names of the tasks.
        validation: Rows of the validation split, with one task in each data set.
        phases: The recipe's fields.
    """
    gain, figures, validation = phases.expert_gain, {}, list(validation)
    counts: Counter[str] = Counter()
    for rows in validation:
        counts[rows[0]["task"]] += len(rows)
    few = [f"{count} validation rows of {name}" for name, count in counts.items() if count < FEWEST]
    if few and None in (gain, phases.temperature):
        logging.warning("%s: expert_gain and temperature are not fitted; what the recipe lacks is 1", few[0])
        validation = []
    if gain is None and not (phases.fusion_epochs and validation):
        gain = 1.0
    temperatures = dict.fromkeys(tasks, phases.temperature) if phases.temperature is not None else {}
    found: dict[str, list] = {}
    for rows in validation:
        gains = GAINS if gain is None else torch.tensor([gain])
        found.setdefault(rows[0]["task"], []).append(trainer.scores_by_gain(rows, gains))
    if found:
        scores = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in found.values()]
        grid = TEMPERATURES if phases.temperature is None else torch.tensor([phases.temperature])
        gain, best, losses = fit(scores, gains, grid)
        temperatures |= dict(zip(found, best, strict=True))
        fitted = [("temperature", value, grid) for value in best]
        for name, value, tried in [("expert_gain", gain, gains), *fitted]:
            if len(tried) > 1 and value in (tried[0], tried[-1]) and value:  # a gain of 0 is no limit
                logging.warning("%s: %g is the limit of what is tried, a better value may lie beyond it", name, value)
        figures = {f"{name}_calibrated_loss": loss for name, loss in zip(found, losses, strict=True)}
    if gain is not None:
        trainer.accelerator.unwrap_model(trainer.model).get_base_model().model.readout.gain.fill_(gain)
        figures["expert_gain"] = gain
    processor.temperatures |= temperatures
    figures |= {f"{name}_temperature": value for name, value in temperatures.items()}
    if figures and trainer.is_world_process_zero():
        trainer.log_file.add_once(trainer.state.global_step, figures)
        logging.info("fitted after training: %s", ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
