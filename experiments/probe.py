"""Measures what a linear probe reads from the features of a recipe's model.

    python -m experiments.probe RECIPE --corpus_dir DIR [--any_field value ...] --split test --output FILE.json

The probe reads the inputs of the recipe's fusion and learns from the same rows, so its row in a table of results shows
what the fusion and the LLM add. Features of a row, for each of the recipe's `modalities`:

- text: TF-IDF (with sublinear counts) of the LLM's tokens and pairs of tokens in the utterance, without its context;
  of those that occur in at least two rows.
- audio, vision: mean and deviation over the clip's frames, of each hidden layer of the tower or of the precomputed
  features (`ClipStatistics.measure`). The tower is not trained, and its hidden layers come from the cache of
  `train.py`. If the recipe sets `speaker_adaptation`, the statistics are those of frames that are adapted to the rows
  of the same speaker in the same split, as in the model; it uses no labels.

The columns of audio and vision are standardised with the training split and limited to 5 deviations, as in the fusion.
Constant columns are dropped. They are divided by the root of their number, so that a row of each modality has a length
of about 1, as a row of TF-IDF has, and one penalty fits all. A missing modality is zero.

The probe is a logistic regression for classes and a ridge regression for scores, with answers clipped to the task's
scale. It is fitted on the training split. Its penalty is one of `PENALTIES`: the one with the best weighted F1 or mean
absolute error on the validation split. If that is empty, a cross-validation of the training split chooses it, with
speakers in one fold each if the corpus names them, otherwise its clusters (`corpora.clusters_of`).
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold

from corpora import clusters_of, speakers_of
from egmf.commands import run_command
from egmf.data.collator import LABEL_COLUMNS, check_labels
from egmf.data.mixture import check_corpora, load_corpora
from egmf.data.tower_cache import COLUMNS, TowerCache
from egmf.evaluation.measures import measure_of
from egmf.fusion_egmf import FeatureNorm
from egmf.media_features_egmf import adapt_to_speaker
from egmf.processing_egmf import EGMFProcessor
from egmf.recipe import MODALITIES, Recipe
from egmf.recipe_reading import load_recipe
from egmf.tables import table
from egmf.tasks_egmf import AffectTask
from egmf.training.assembly import (
    build_model,
    build_processor,
    build_towers,
    describes_new_tower,
)
from egmf.training.language_models import resolve_language_model
from egmf.training.statistics import clip_statistics
from train import autocast_of


# Logistic regression: sum of the rows' losses + penalty / 2 * |w|^2; ridge: sum of squares + penalty * |w|^2.
PENALTIES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
MAX_FOLDS = 5  # of the cross-validation
DENSE_BYTES = 2**31  # a larger matrix that contains TF-IDF stays sparse, which is slower
SHOWN = {"classification": ("accuracy", "weighted_f1", "ua"), "regression": ("mae", "corr")}

Features = dict[str, np.ndarray]  # by modality: text (N,), token ids as a string; others (N, D), NaN if missing


@dataclass
class Rows:
    """Features and gold labels (N,) of some rows."""

    features: Features
    gold: np.ndarray

    def __getitem__(self, places: np.ndarray) -> "Rows":
        return Rows({name: values[places] for name, values in self.features.items()}, self.gold[places])


class Columns:
    """Converts features to the columns of the probe; the statistics are those of the features it is created from."""

    def __init__(self, features: Features):
        self.vectorizer, self.statistics = None, {}
        for modality, values in features.items():
            if modality == "text":
                self.vectorizer = TfidfVectorizer(
                    token_pattern=r"\S+", ngram_range=(1, 2), min_df=2, sublinear_tf=True, dtype=np.float32
                ).fit(values)
            else:
                known = values[is_present(values)].astype(np.float64)
                self.statistics[modality] = known.mean(0), known.std(0)

    def __call__(self, features: Features) -> np.ndarray | sparse.csr_matrix:
        """The matrix (N, columns) in float32; sparse for text alone and above `DENSE_BYTES`."""
        dense = [self._standardise(features[name], *statistics) for name, statistics in self.statistics.items()]
        if self.vectorizer is None:
            return np.concatenate(dense, 1)
        words = self.vectorizer.transform(features["text"])
        if not dense:
            return words
        width = words.shape[1] + sum(block.shape[1] for block in dense)
        if len(dense[0]) * width * words.dtype.itemsize <= DENSE_BYTES:
            return np.concatenate([words.toarray(), *dense], 1)
        return sparse.hstack([words, *dense], format="csr")

    @staticmethod
    def _standardise(values: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
        kept, there = deviation > 1e-6, is_present(values)
        columns = np.zeros((len(values), kept.sum()), np.float32)
        if there.any():
            columns[there] = (values[there][:, kept] - mean[kept]) / deviation[kept]
        return columns.clip(-FeatureNorm.LIMIT, FeatureNorm.LIMIT) / np.float32(math.sqrt(max(1, kept.sum())))


def is_present(values: np.ndarray) -> np.ndarray:
    """Whether each row has the modality, (N,) bool."""
    return values != "" if values.ndim == 1 else ~np.isnan(values).all(1)


def token_texts(rows: Dataset, processor: EGMFProcessor) -> np.ndarray:
    """The token ids of each utterance, joined by spaces; empty for a row without text."""
    texts = [" ".join((text or "").split()) for text in rows["text"][:]]
    plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}  # as in prompts
    tokens = processor.tokenizer(texts, **plain)["input_ids"] if texts else []
    return np.array([" ".join(map(str, ids)) for ids in tokens], dtype=str)


def statistics_of(rows: Dataset, modality: str, cache: TowerCache | None) -> np.ndarray:
    """The statistics of each clip, (N, 2 * layers * width) in float32; NaN for a row without the modality."""
    measured = list(clip_statistics(rows, modality, cache))
    width = next((len(values) for values in measured if values is not None), 0)
    statistics = np.full((len(measured), width), np.nan, np.float32)
    for place, values in enumerate(measured):
        if values is not None:
            statistics[place] = values
    return statistics


def groups_of(corpus: str, rows: Dataset) -> list[str]:
    """The groups of the cross-validation: speakers if there are several, otherwise the corpus's clusters."""
    speakers = rows["speaker"][:]
    if None not in speakers and len(set(speakers)) > 1:
        return speakers
    return clusters_of(corpus, rows["id"][:], speakers)[1]


def adapt_statistics(values: np.ndarray, speakers: Sequence[str]) -> np.ndarray:
    """Statistics (N, 2 D), means and deviations, of frames that are adapted to their speaker.

    Whether a channel varies is judged over all layers of a tower together, in the model layer by layer.
    """
    adapted, there, half = values.copy(), is_present(values), values.shape[1] // 2
    for speaker in set(speakers):
        own = (np.array(speakers) == speaker) & there
        if own.any():
            means, deviations = torch.from_numpy(values[own].astype(np.float64)).split(half, 1)
            center = means.mean(0)
            spread = ((means - center).square() + deviations.square()).mean(0).sqrt()
            adapted[own, :half] = adapt_to_speaker(means, center, spread)
            adapted[own, half:] = adapt_to_speaker(deviations, torch.zeros(()), spread)
    return adapted


def build_cache(
    recipe: Recipe, language_model: str, processor: EGMFProcessor, towers: dict[str, tuple], corpus: DatasetDict
) -> TowerCache:
    """The cache of the recipe's towers, filled with the clips of all splits; unreadable ones are logged."""
    device = recipe.training.device
    # With the LLM, because its dtype is that of the towers, on which the names of the entries depend.
    model = build_model(recipe, language_model, processor, towers, corpus["train"]).to(device)
    cache = TowerCache(model, processor, towers, autocast=autocast_of(recipe.training))
    for rows in corpus.values():
        cache.fill(rows.select_columns([*COLUMNS.values()]), device)
    for error in cache.errors.values():
        logging.warning("%s It counts as a missing modality.", error)
    return cache


def check_recipe(recipe: Recipe) -> None:
    """Raises a ValueError for a mixture and for towers without trained weights."""
    if recipe.data.corpora:
        raise ValueError(f"corpora: got a mixture of {', '.join(recipe.data.corpora)}, wanted `corpus` instead")
    if recipe.model.shrink != 1:
        raise ValueError(f"shrink: got {recipe.model.shrink}, wanted 1: a shrunk model has random weights")
    for modality in (name for name in recipe.data.modalities if name != "text"):
        if describes_new_tower(getattr(recipe.model, f"{modality}_tower")):
            wanted = "the folder or Hub id of a trained one"
            raise ValueError(f"{modality}_tower: got a description of a new tower, wanted {wanted}")


def read_features(
    recipe: Recipe, corpus: DatasetDict, processor: EGMFProcessor, cache: TowerCache | None
) -> dict[str, Features]:
    """The features of each split, for the recipe's modalities that the training split has.

    Raises:
        ValueError: If the training split has none of the modalities.
    """
    found: dict[str, Features] = {split: {} for split in corpus}
    for modality in (name for name in MODALITIES if name in recipe.data.modalities):
        for split, rows in corpus.items():
            if modality == "text":
                found[split][modality] = token_texts(rows, processor)
                continue
            values = statistics_of(rows, modality, cache)
            if recipe.data.speaker_adaptation:
                speakers = speakers_of(recipe.data.corpus, rows["id"][:], rows["speaker"][:])
                values = adapt_statistics(values, speakers)
            found[split][modality] = values
        if not is_present(found["train"][modality]).any():
            logging.warning("%s: no row of train has it; the probe does not read it", modality)
            for features in found.values():
                del features[modality]
    if not found["train"]:
        raise ValueError(f"modalities: got {recipe.data.modalities}, wanted one that the training split has")
    return found


def fit(task: AffectTask, penalty: float, columns, gold: np.ndarray) -> LogisticRegression | Ridge:
    """Fits the probe to columns (N, D) and labels (N,)."""
    if task.kind == "classification":
        return LogisticRegression(C=1 / penalty, max_iter=2000).fit(columns, gold)
    return Ridge(alpha=penalty).fit(columns.astype(np.float64), gold)


def answer(task: AffectTask, probe: LogisticRegression | Ridge, columns) -> list[str] | list[float]:
    """The probe's labels, or its scores within the scale of the task."""
    answers = probe.predict(columns)
    return (answers if task.kind == "classification" else answers.clip(task.low, task.high)).tolist()


def choose_penalty(task: AffectTask, rounds: Sequence[tuple[Rows, Rows]]) -> float:
    """The penalty with the best answers to the held-out rows of all rounds together; of equal ones the largest.

    Args:
        rounds: Pairs of rows to fit and held-out rows.
    """
    answers: dict[float, list] = {penalty: [] for penalty in PENALTIES}
    for train, held_out in rounds:
        columns = Columns(train.features)
        fitted, asked = columns(train.features), columns(held_out.features)
        for penalty in PENALTIES:
            answers[penalty] += answer(task, fit(task, penalty, fitted, train.gold), asked)
    gold = np.concatenate([held_out.gold for _, held_out in rounds]).tolist()

    def score(penalty: float) -> float:
        metrics = measure_of(task)(gold, answers[penalty])
        return metrics["weighted_f1"] if task.kind == "classification" else -metrics["mae"]

    return max(PENALTIES, key=score)


def rounds_of(train: Rows, validation: Rows, groups: Sequence[str]) -> list[tuple[Rows, Rows]]:
    """The rounds of [`choose_penalty`]: the validation split, or a cross-validation if it is empty.

    Raises:
        ValueError: If the validation split is empty and all rows of train are in one group.
    """
    if len(validation.gold):
        return [(train, validation)]
    folds = min(MAX_FOLDS, len(set(groups)))
    if folds < 2:
        raise ValueError("validation: got no rows, and one group in train, wanted rows or several groups")
    parts = GroupKFold(folds).split(train.gold, groups=groups)
    return [(train[fitted], train[held_out]) for fitted, held_out in parts]


def probe_task(task: AffectTask, corpus: DatasetDict, features: dict[str, Features], groups, split: str) -> dict:
    """Chooses the penalty, fits the probe, and tests it on a split: the penalty, metrics and predictions of a task."""
    gold = {name: np.array(rows[LABEL_COLUMNS[task.kind]][:]) for name, rows in corpus.items()}
    train, validation, tested = (Rows(features[name], gold[name]) for name in ("train", "validation", split))
    penalty = choose_penalty(task, rounds_of(train, validation, groups))
    columns = Columns(train.features)
    probe = fit(task, penalty, columns(train.features), train.gold)
    answers, labels = answer(task, probe, columns(tested.features)), tested.gold.tolist()
    predictions = [
        {"id": row_id, "gold": label, "answer": answered}
        for row_id, label, answered in zip(corpus[split]["id"][:], labels, answers, strict=True)
    ]
    return {"penalty": penalty, "metrics": measure_of(task)(labels, answers), "predictions": predictions}


def parse_arguments(arguments: list[str]) -> tuple[argparse.Namespace, Recipe]:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.probe",
        usage="%(prog)s RECIPE [--any_field value ...] --output FILE.json [--split SPLIT]",
        description=__doc__,
        epilog="`python train.py --help` lists the fields of a recipe.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the metrics and the predictions")
    parser.add_argument("--split", default="test", choices=["train", "validation", "test"])
    own, others = parser.parse_known_args(arguments)
    return own, load_recipe(others)


def main(arguments: list[str]) -> None:
    args, recipe = parse_arguments(arguments)
    check_recipe(recipe)
    data = recipe.data
    (corpus,) = corpora = load_corpora(data)
    if not len(corpus[args.split]):
        raise ValueError(f"split: got {args.split}, which is empty, wanted one with rows")
    language_model = resolve_language_model(recipe.model.language_model)
    towers = build_towers(recipe)
    processor = build_processor(recipe, language_model, towers)
    tasks = [processor.tasks[name] for name in data.tasks]
    check_corpora(recipe, corpora, processor)
    for task in tasks:
        check_labels(f"{data.corpus} / {args.split}", corpus[args.split], task)
    corpus = DatasetDict({split: corpus[split] for split in ("train", "validation", args.split)})
    cache = build_cache(recipe, language_model, processor, towers, corpus) if towers else None
    features = read_features(recipe, corpus, processor, cache)
    groups = groups_of(data.corpus, corpus["train"])
    results = {task.name: probe_task(task, corpus, features, groups, args.split) for task in tasks}

    modalities = [*features["train"]]
    report = {"corpus": data.corpus, "corpus_options": data.corpus_options, "modalities": modalities}
    report |= {"speaker_adaptation": data.speaker_adaptation, "split": args.split, "tasks": results}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(table_of(tasks, results, modalities))


def table_of(tasks: list[AffectTask], results: dict[str, dict], modalities: list[str]) -> str:
    """A Markdown table with a row per task. A metric that the task does not have is empty."""
    names = [name for kind in SHOWN for name in SHOWN[kind] if any(task.kind == kind for task in tasks)]
    lines = []
    for name, result in results.items():
        figures = (result["metrics"].get(metric) for metric in names)
        cells = ["" if figure is None else f"{figure:.4f}" for figure in figures]
        lines.append([name, " + ".join(modalities), str(len(result["predictions"])), f"{result['penalty']:g}", *cells])
    return table(["task", "modalities", "rows", "penalty", *names], lines)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_command(main, sys.argv[1:])
