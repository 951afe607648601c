"""The benchmarks' metrics equal the published definitions, which are repeated here in plain Python."""

import csv
import json
import math
import os
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, r2_score

from metrics.emotion.measures import emotion_metrics
from metrics.sentiment.measures import mosei_metrics, sims_metrics


REPO = Path(__file__).resolve().parents[1]
CASES = 2_000
LABELS = ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger")


# The definitions, one sample at a time: exact shares, float32 values as Python numbers, no NumPy.


def single(value: float) -> float:
    """A number rounded to float32."""
    return struct.unpack("f", struct.pack("f", value))[0]


def share(hits: list[bool]) -> Fraction | None:
    return Fraction(sum(hits), len(hits)) if hits else None


def weighted_f1(gold: list, given: list) -> Fraction | None:
    total = Fraction(0)
    for label in set(gold):
        true = sum(g == label == a for g, a in zip(gold, given, strict=True))
        wrong = sum((g == label) != (a == label) for g, a in zip(gold, given, strict=True))
        total += Fraction(gold.count(label) * 2 * true, 2 * true + wrong)
    return total / len(gold) if gold else None


def distances(gold: list[float], given: list[float | None]) -> dict:
    """Mean absolute error and Pearson's r of the parsable answers."""
    pairs = [(g, a) for g, a in zip(gold, given, strict=True) if a is not None]
    if not pairs:
        return {"mae": None, "corr": None}
    figures = {"mae": math.fsum(abs(single(a - g)) for g, a in pairs) / len(pairs), "corr": None}
    if min(len(set(column)) for column in zip(*pairs, strict=True)) > 1:
        means = [math.fsum(column) / len(pairs) for column in zip(*pairs, strict=True)]
        centred = [(g - means[0], a - means[1]) for g, a in pairs]
        gg, aa, ga = (math.fsum(pair[i] * pair[j] for pair in centred) for i, j in ((0, 0), (1, 1), (0, 1)))
        figures["corr"] = ga / math.sqrt(gg * aa)
    return figures


def mosei_by_hand(gold: list[float], given: list[float | None]) -> dict:
    gold, given = [single(g) for g in gold], [None if a is None else single(a) for a in given]
    figures = distances(gold, given)
    for limit, name in ((3, "acc7"), (2, "acc5"), (1, "acc3")):

        def grade(score, limit=limit):
            return None if score is None else round(min(max(score, -limit), limit))

        figures[name] = share([grade(g) == grade(a) for g, a in zip(gold, given, strict=True)])
    for name, keep, is_high in (
        ("has0", lambda g: True, lambda score: score >= 0),
        ("non0", lambda g: g != 0, lambda score: score > 0),
    ):
        pairs = [(is_high(g), None if a is None else is_high(a)) for g, a in zip(gold, given, strict=True) if keep(g)]
        figures[f"{name}_acc2"] = share([g == a for g, a in pairs])
        figures[f"{name}_f1"] = weighted_f1([g for g, _ in pairs], [a for _, a in pairs])
    return figures | {"zero_predictions": given.count(0), "unparsable": given.count(None)}


def sims_by_hand(gold: list[float], given: list[float | None]) -> dict:
    gold = [min(max(single(g), -1.0), 1.0) for g in gold]
    given = [None if a is None else min(max(single(a), -1.0), 1.0) for a in given]
    figures = distances(gold, given) | {"r2": None}
    pairs = [(g, a) for g, a in zip(gold, given, strict=True) if a is not None]
    if len({g for g, _ in pairs}) > 1:
        mean = math.fsum(g for g, _ in pairs) / len(pairs)
        error, spread = (math.fsum((g - x) ** 2 for g, x in of) for of in (pairs, [(g, mean) for g, _ in pairs]))
        figures["r2"] = 1 - error / spread
    edges = {"acc2": [0.0], "acc3": [-0.1, 0.1], "acc5": [-0.7, -0.1, 0.1, 0.7]}
    classes = {}
    for name, inner in edges.items():
        # (lower, upper]: the class is the number of edges below.
        classes[name] = [
            [None if score is None else sum(score > single(edge) for edge in inner) for score in scores]
            for scores in (gold, given)
        ]
        figures[name] = share([g == a for g, a in zip(*classes[name], strict=True)])
    figures["f1"] = weighted_f1(*classes["acc2"])
    weak = [abs(g) <= single(0.4) for g in gold]
    figures["acc2_weak"] = share([g == a for g, a, w in zip(*classes["acc2"], weak, strict=True) if w])
    return figures | {"unparsable": given.count(None)}


def emotion_by_hand(gold: list[str], given: list[str | None]) -> dict:
    by_class, recalls = {}, []
    for label in LABELS:
        among = label in gold or label in given
        true = sum(g == label == a for g, a in zip(gold, given, strict=True))
        by_class[label] = Fraction(2 * true, gold.count(label) + given.count(label)) if among else None
        recalls += [Fraction(true, gold.count(label))] if label in gold else []
    accuracy = share([g == a for g, a in zip(gold, given, strict=True)])
    figures = {"accuracy": accuracy, "weighted_f1": weighted_f1(gold, given), "ua": sum(recalls) / len(recalls)}
    return figures | {"f1_by_class": by_class, "unparsable": given.count(None)}


def assert_same(found: dict, wanted: dict, case: object) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, dict):
            assert_same(found[name], value, case)
        elif value is None or isinstance(value, int):
            assert found[name] == value and type(found[name]) is type(value), (name, case)
        else:
            assert abs(found[name] - value) < 2e-6 * max(1, abs(value)), (name, case)


def random_scores(rng: np.random.Generator) -> tuple[list[float], list[float | None]]:
    """Some scores and answers, many of them on the edge of a bin or one float32 step away from it."""
    edges = np.float32([0, 0.1, 0.4, 0.5, 0.7, 1, 1.01, 1.5, 2, 2.5, 3, 3.5, 7])
    edges = np.concatenate([edges, -edges])
    beside = np.concatenate([edges, np.nextafter(edges, np.float32(9)), np.nextafter(edges, np.float32(-9))])

    def draw(count: int) -> list[float]:
        kinds = (rng.choice(beside, count), rng.uniform(-4, 4, count), rng.integers(-30, 31, count) / 10)
        scores = np.choose(rng.integers(3, size=count), kinds)
        return scores.tolist() if rng.random() > 0.1 else [float(scores[0])] * count  # at times all are the same

    gold, given = draw(count := int(rng.integers(1, 9))), draw(count)
    given = [g if rng.random() < 0.2 else a for g, a in zip(gold, given, strict=True)]
    return gold, [None if rng.random() < 0.05 else a for a in given]


@pytest.mark.parametrize(
    ("measure", "by_hand"), [(mosei_metrics, mosei_by_hand), (sims_metrics, sims_by_hand)], ids=["mosei", "sims"]
)
def test_scores_are_measured_as_published(measure, by_hand):
    rng = np.random.default_rng(7)
    undefined = set()
    for _ in range(CASES):
        gold, given = random_scores(rng)
        wanted = by_hand(gold, given)
        undefined |= {name for name, value in wanted.items() if value is None}
        assert_same(measure(gold, given), wanted, (gold, given))
    assert undefined >= {"corr", "mae"}  # the cases reach what is not defined


def test_emotions_are_measured_as_published():
    rng = np.random.default_rng(7)
    for _ in range(CASES):
        count = int(rng.integers(1, 12))
        gold = rng.choice(LABELS, count).tolist()
        given = [None if rng.random() < 0.1 else str(rng.choice(LABELS)) for _ in gold]
        assert_same(emotion_metrics(gold, given, LABELS), emotion_by_hand(gold, given), (gold, given))


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_agrees_with_scikit_learn():
    """The published code calls scikit-learn's `f1_score` and `r2_score`."""
    rng = np.random.default_rng(3)
    for _ in range(50):
        gold, given = rng.uniform(-3.5, 3.5, (2, 40)).astype(np.float32).round(1)
        figures, kept = mosei_metrics(gold, given), gold != 0
        assert figures["has0_f1"] == pytest.approx(f1_score(gold >= 0, given >= 0, average="weighted"))
        assert figures["non0_f1"] == pytest.approx(f1_score(gold[kept] > 0, given[kept] > 0, average="weighted"))
        assert figures["corr"] == pytest.approx(np.corrcoef(given, gold)[0][1])
        y, p = np.clip(gold, -1, 1), np.clip(given, -1, 1)
        figures = sims_metrics(gold, given)
        assert figures["f1"] == pytest.approx(f1_score(y > 0, p > 0, average="weighted"))
        assert figures["r2"] == pytest.approx(r2_score(y, p), abs=1e-6)
        words, answers = rng.choice(LABELS, (2, 40))
        figures = emotion_metrics(words, answers)
        assert figures["accuracy"] == pytest.approx(accuracy_score(words, answers))
        assert figures["ua"] == pytest.approx(balanced_accuracy_score(words, answers))
        assert figures["weighted_f1"] == pytest.approx(f1_score(words, answers, average="weighted", zero_division=0))


TENTH, WEAK, STRONG = (float(np.float32(value)) for value in (0.1, 0.4, -0.7))  # as float32 labels become in Python


@pytest.mark.parametrize(
    ("measure", "gold", "given", "wanted"),
    [
        # An answer of 0 is non-negative in Has0 and not positive in Non0; gold zeros, -0.0 too, are not in Non0.
        (
            mosei_metrics,
            [0.0, -0.0, 1.0, -1.0],
            [0.0, 0.0, -0.0, 0.0],
            {"has0_acc2": 0.75, "non0_acc2": 0.5, "zero_predictions": 4, "corr": None, "mae": 0.5},
        ),
        (mosei_metrics, [0.0, 0.0], [-0.1, 0.3], {"has0_acc2": 0.5, "non0_acc2": None, "non0_f1": None, "corr": None}),
        # Halves go to the even number: 0.5 is 0, 1.5 and 2.5 are 2, -0.4 is the same as 0.4.
        (mosei_metrics, [0.5, 1.5, 2.5, -0.4], [0.4, 2.4, 1.6, 0.4], {"acc7": 1.0, "acc5": 1.0}),
        (mosei_metrics, [0.2], [0.5 + 1e-9], {"acc7": 1.0}),  # in float64 it would be rounded to 1
        # Clipped for the classes, not for the distance.
        (mosei_metrics, [3.0, -2.0], [7.0, -3.0], {"acc7": 0.5, "acc5": 1.0, "acc3": 1.0, "mae": 2.5, "corr": 1.0}),
        # A constant that float32 cannot sum exactly: its deviation comes out as a little more than 0.
        (mosei_metrics, [1.0, 2.0, 3.0] * 7, [0.1] * 21, {"corr": None}),
        (mosei_metrics, [1.0, -1.0], [None, None], {"mae": None, "corr": None, "acc7": 0.0, "unparsable": 2}),
        (mosei_metrics, [1.0, -1.0], [math.nan, -1.0], {"mae": 0.0, "has0_acc2": 0.5, "unparsable": 1}),
        # Zero is negative, the smallest float32 above it is not.
        (sims_metrics, [0.0, -0.0, 0.0], [-0.5, 0.0, 1e-45], {"acc2": 2 / 3, "acc2_weak": 2 / 3}),
        # Labels that came through Python lists: in float64 they are above 0.1, 0.4 and -0.7.
        (sims_metrics, [TENTH, -TENTH], [0.05, -0.2], {"acc3": 1.0, "acc5": 1.0}),
        (sims_metrics, [STRONG], [-0.9], {"acc5": 1.0}),
        (sims_metrics, [WEAK, -WEAK, 0.5], [0.2, 0.2, -0.2], {"acc2_weak": 0.5, "acc2": 1 / 3}),
        (sims_metrics, [0.5, -0.6], [0.1, 0.1], {"acc2_weak": None, "corr": None}),
        # Clipped for every figure.
        (sims_metrics, [1.0, -1.5, 0.0], [1.7, -1.0, 0.0], {"mae": 0.0, "corr": 1.0, "r2": 1.0, "acc5": 1.0}),
        (sims_metrics, [1.0, 2.0], [0.5, 0.0], {"corr": None, "r2": None}),  # constant once clipped
        (sims_metrics, [0.3, -0.2], [None, None], {"mae": None, "corr": None, "r2": None, "f1": 0.0, "unparsable": 2}),
    ],
)
def test_edges(measure, gold, given, wanted):
    found = measure(gold, given)
    for name, value in wanted.items():
        assert found[name] == (value if value is None else pytest.approx(value, abs=1e-7)), name


def test_swapped_arguments_are_not_the_same():
    gold, given = [1.0, 1.0, 1.0, -1.0], [1.0, -1.0, -1.0, -1.0]
    assert mosei_metrics(gold, given)["has0_f1"] == pytest.approx((3 * 0.5 + 0.5) / 4)
    assert mosei_metrics(given, gold)["has0_f1"] == pytest.approx((0.5 + 3 * 0.5) / 4)
    gold[1] = -1.0
    assert mosei_metrics(gold, given)["has0_f1"] != pytest.approx(mosei_metrics(given, gold)["has0_f1"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mosei_metrics([], []), "predictions: got 0, wanted one for each of 0"),
        (lambda: mosei_metrics([1.0], [1.0, 2.0]), "predictions: got 2, wanted one for each of 1"),
        (lambda: mosei_metrics([1.0, math.nan], [1.0, 2.0]), "references: got NaN or None at 1"),
        (lambda: sims_metrics([1.0], [math.inf]), "predictions: got .* infinite"),
        (
            lambda: emotion_metrics(["高兴"], ["joy"], ("高兴", "悲伤")),
            r"predictions: got \['joy'\], wanted labels of",
        ),
        (lambda: emotion_metrics(["joy"], [None], ("高兴", "悲伤")), r"references: got \['joy'\]"),
    ],
)
def test_what_cannot_be_measured_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["mosi", "meld"])
def test_results_in_the_repository_keep_their_numbers(name):
    runs = json.loads((REPO / f"results/{name}.json").read_text(encoding="utf-8"))["runs"]
    with (REPO / f"results/{name}_answers.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for run in runs:
        answers = [row[f"{run['variant']}_{run['seed']}:{run['answer']}"] or None for row in rows]
        figures = emotion_metrics([row["gold"] for row in rows], answers)
        assert {key: round(figures[key], 6) for key in ("accuracy", "weighted_f1")} == {
            key: run[key] for key in ("accuracy", "weighted_f1")
        }
        assert figures["unparsable"] == run["unparsable"]


LOADER = """
import json, socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("the network was asked")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import evaluate

calls = json.load(sys.stdin)
found = {}
for name, call in calls.items():
    module, *config = name.split()
    found[name] = evaluate.load(f"{sys.argv[1]}/{module}", *config).compute(**call)
print(json.dumps(found))
"""


def test_modules_load_by_path_without_a_network(tmp_path):
    labels = ["joy", "anger", "fear"]
    calls = {
        "emotion": {"predictions": [None, "joy", "anger"], "references": ["joy", "joy", "anger"], "labels": labels},
        "sentiment mosei": {"predictions": [None, 0.4, -1.0], "references": [2.2, 0.5, -1.0]},
        "sentiment sims": {"predictions": [0.05, -0.9, 0.2], "references": [TENTH, STRONG, WEAK]},
    }
    environment = {key: value for key, value in os.environ.items() if key != "HF_MODULES_CACHE"}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOADER, str(REPO / "metrics")]
    process = subprocess.run(
        command, cwd=tmp_path, env=environment, input=json.dumps(calls), capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.strip().splitlines()[-1])
    measures = {"emotion": emotion_metrics, "sentiment mosei": mosei_metrics, "sentiment sims": sims_metrics}
    assert found == {name: measures[name](**call) for name, call in calls.items()}
    assert found["emotion"]["unparsable"] == found["sentiment mosei"]["unparsable"] == 1
    assert found["sentiment sims"]["acc3"] == 1.0
