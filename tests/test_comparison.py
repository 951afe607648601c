"""Bootstrap and paired tests: intervals have the theoretical width, clusters stay whole, and differences are real."""

import numpy as np
import pytest
from scipy.stats import ttest_rel

from corpora import clusters_of
from egmf.evaluation.significance import RESAMPLES, intervals, mcnemar, paired_differences, resample
from metrics.emotion.measures import emotion_metrics
from metrics.sentiment.measures import mosei_metrics


@pytest.mark.parametrize(
    ("corpus", "row_id", "speaker", "wanted"),
    [
        ("mosi", "03bSnISJMiM$_$11", None, ("videos", ["03bSnISJMiM"])),
        ("meld", "test_dia12_utt3", "Ross", ("dialogues", ["test_dia12"])),
        ("meld", "test_00012", "Ross", ("utterances", ["test_00012"])),  # a pickle that has no dialogues
        ("simsv2", "video_0001/0003", None, ("videos", ["video_0001"])),
        ("ravdess", "03-01-06-01-02-01-12", None, ("actors", ["12"])),
        ("avatars", "avatars_test_brief_0000", "Avatar 7", ("people", ["Avatar 7"])),
        ("generated", "test_0001", "Ann", ("utterances", ["test_0001"])),
    ],
)
def test_clusters_of_the_corpora(corpus, row_id, speaker, wanted):
    assert clusters_of(corpus, [row_id], [speaker]) == wanted


def test_whole_clusters_are_drawn():
    ids = [f"video{number % 5}" for number in range(23)]
    samples = resample(ids)
    assert len(samples) == RESAMPLES and len({tuple(rows) for rows in samples}) > 100
    for rows in list(samples)[:50]:
        times = np.bincount(rows, minlength=len(ids))
        assert sum(times[:5]) == 5 and all(times[i] == times[i % 5] for i in range(len(ids)))
    assert all(np.array_equal(a, b) for a, b in zip(samples, resample(ids), strict=True))


def test_an_interval_is_as_wide_as_theory_says():
    rng = np.random.default_rng(0)
    gold = ["joy"] * 400
    given = ["joy" if right else "anger" for right in rng.random(400) < 0.7]
    share = given.count("joy") / 400
    low, high = intervals(emotion_metrics, gold, given, resample([str(i) for i in range(400)]))["accuracy"]
    error = 1.96 * np.sqrt(share * (1 - share) / 400)
    assert (low, high) == pytest.approx((share - error, share + error), abs=0.15 * error)
    # Every answer five times, in clusters, is no more evidence than once.
    fivefold = resample([f"video{i // 5}" for i in range(2000)])
    again = intervals(emotion_metrics, np.repeat(gold, 5).tolist(), np.repeat(given, 5).tolist(), fivefold)["accuracy"]
    assert again[1] - again[0] == pytest.approx(high - low, rel=0.1)


def test_what_is_not_defined_has_no_interval():
    ids = [str(number) for number in range(6)]
    gold = [1.0, 0.0, -1.0, 2.0, 0.4, -0.2]
    constant = intervals(mosei_metrics, gold, [0.5] * 6, resample(ids))
    assert constant["corr"] is None and constant["mae"][0] < constant["mae"][1]
    assert "unparsable" not in constant and "zero_predictions" not in constant
    silent = intervals(emotion_metrics, ["joy", "fear"] * 3, [None] * 6, resample(ids))
    assert silent == dict.fromkeys(("accuracy", "weighted_f1", "ua"), [0.0, 0.0])
    one_video = resample(["video"] * 6)
    assert intervals(mosei_metrics, gold, [0.5] * 6, one_video)["mae"] is None
    assert paired_differences(mosei_metrics, gold, gold, [0.5] * 6, one_video)["mae"] is None


def test_a_run_does_not_differ_from_itself():
    rng = np.random.default_rng(1)
    gold, given = rng.uniform(-3, 3, (2, 50)).tolist()
    found = paired_differences(mosei_metrics, gold, given, given, resample([str(i) for i in range(50)]))
    assert found["mae"] == {"difference": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}
    assert set(found) == {name for name, value in mosei_metrics(gold, given).items() if isinstance(value, float)}


def test_paired_differences_of_the_error_agree_with_the_t_test():
    """For slightly different errors, the bootstrap's p-value is close to that of the paired t-test."""
    rng = np.random.default_rng(5)
    gold = rng.uniform(-3, 3, 300)
    second = gold + rng.normal(0, 0.5, 300)
    samples = resample([str(i) for i in range(300)])
    p_values = []
    for gain in (0.0, 0.04, 0.2):
        first = gold + (second - gold) * (1 - gain) + rng.normal(0, 0.1, 300)
        found = paired_differences(mosei_metrics, gold.tolist(), first.tolist(), second.tolist(), samples)["mae"]
        errors = [np.abs(run - gold) for run in (first, second)]
        assert found["difference"] == pytest.approx(errors[0].mean() - errors[1].mean(), abs=1e-5)
        assert found["low"] < found["difference"] < found["high"]
        assert found["p_value"] == pytest.approx(ttest_rel(*errors).pvalue, abs=0.05)
        p_values.append(found["p_value"])
    assert p_values[0] > 0.05 and p_values[2] == pytest.approx(2 / (RESAMPLES + 1))


def test_a_better_classifier_is_found():
    rng = np.random.default_rng(2)
    gold = rng.choice(["joy", "anger", "fear"], 200).tolist()
    worse = [g if rng.random() < 0.6 else "joy" for g in gold]
    better = [g if rng.random() < 0.5 else a for g, a in zip(gold, worse, strict=True)]
    found = paired_differences(emotion_metrics, gold, better, worse, resample([str(i) for i in range(200)]))
    for name in ("accuracy", "weighted_f1"):
        assert 0 < found[name]["low"] < found[name]["high"] and found[name]["p_value"] < 0.01


def test_mcnemar_is_the_exact_binomial():
    # 5 samples that the first run alone has right, none the other way: 2 * 0.5 ** 5.
    test = mcnemar([True] * 5 + [True, False], [False] * 5 + [True, False])
    assert test == {"first_only": 5, "second_only": 0, "p_value": pytest.approx(2 * 0.5**5)}
