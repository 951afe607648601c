"""Measures how well MOSI's audio and vision vectors predict the label on videos that a linear probe has not seen.

    python -m experiments.mosi_leak DIR > results/mosi_leak.md

The probe is a logistic regression on the target utterance's vector only. It is fitted on the train split with Gaussian
noise (in units of the feature's standard deviation) and tested on the validation split with the same noise and on the
test split without noise. The vision vectors were extracted by a network fitted on the train labels, so they leak the
labels of *all* train videos, including those of validation. The noise of `recipes/mosi_smollm2.yaml` was chosen from
the validation column: with this noise the accuracy is near chance. The test column was not used for the choice.
"""

import argparse
import sys

import numpy as np
from sklearn.linear_model import LogisticRegression

from corpora import load_corpus
from egmf.commands import run_command


NOISE = (0.0, 1.0, 2.0, 4.0, 8.0)
COPIES, SEED = 10, 0


def target_vectors(split, modality: str) -> tuple[np.ndarray, np.ndarray]:
    """The target utterances' vectors (N, D), at time 0, and whether each utterance is positive (N,)."""
    rows = zip(split[f"{modality}_features"], split[f"{modality}_times"], strict=True)
    vectors = [features[times.index(0.0)] for features, times in rows]
    return np.asarray(vectors), np.asarray(split["emotion"]) == "positive"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpus_dir", help="folder of MOSI")
    corpus = load_corpus("mosi", parser.parse_args(arguments).corpus_dir, context=0, validation_vision=True)
    rng = np.random.default_rng(SEED)
    print("# What a linear probe reads from MOSI's audio and vision vectors\n")
    print("Command: `python -m experiments.mosi_leak DIR > results/mosi_leak.md`. Accuracy in percent.\n")
    print("| modality | noise | validation, noised | test |\n| --- | --- | --- | --- |")
    for modality in ("audio", "vision"):
        train, labels = target_vectors(corpus["train"], modality)
        held_out, held_out_labels = target_vectors(corpus["validation"], modality)
        test, test_labels = target_vectors(corpus["test"], modality)
        for noise in NOISE:
            copies = COPIES if noise else 1
            noised = np.tile(train, (copies, 1))
            noised += noise * rng.normal(size=noised.shape)
            probe = LogisticRegression(max_iter=500).fit(noised, np.tile(labels, copies))
            unseen = np.tile(held_out, (copies, 1))
            unseen += noise * rng.normal(size=unseen.shape)
            scores = (probe.score(unseen, np.tile(held_out_labels, copies)), probe.score(test, test_labels))
            print(f"| {modality} | {noise:g} | {100 * scores[0]:.1f} | {100 * scores[1]:.1f} |")
    majority = [
        100 * max(np.mean(np.asarray(corpus[s]["emotion"]) == name) for name in ("positive", "negative"))
        for s in ("validation", "test")
    ]
    print(f"| majority class | | {majority[0]:.1f} | {majority[1]:.1f} |")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
