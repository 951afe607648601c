"""Result tables of corpora with folds: metrics, intervals, paired tests, and the files in the repository."""

import json
import re
import shutil

import numpy as np
import pytest

from egmf.evaluation.significance import resample
from experiments import bootstrap, folds
from experiments.pages import README, RESULTS, fill_readme, read_answers, write_answers


EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
ACTORS = {
    1: (2, 5, 14, 15, 16),
    2: (3, 6, 7, 13, 18),
    3: (10, 11, 12, 19, 20),
    4: (8, 17, 21, 23, 24),
    5: (1, 4, 9, 22),
}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Five folds with one clip per actor and emotion. Neutral clips are wrong, and clips of actor 24; voice alone is
    also wrong about sad ones. A bootstrap draws 500 resamples."""
    monkeypatch.setattr(folds, "RESAMPLES", 500)
    for variant in ("full", "audio"):
        for fold, actors in ACTORS.items():
            folder = tmp_path / f"{variant}_fold{fold}_1111"
            (folder / "test").mkdir(parents=True)
            (folder / "command.txt").write_text(f"python train.py {fold}\npython eval.py {fold}\n")
            lines = []
            for actor in actors:
                for number, label in enumerate(EMOTIONS, 1):
                    answer = "sad" if label == "neutral" else "neutral" if actor == 24 else label
                    if variant == "audio" and label == "sad":
                        answer = "happy"
                    answers = dict.fromkeys(folds.ANSWERS, answer) | {"greedy": None if label == "neutral" else answer}
                    row = {"id": f"03-01-{number:02}-01-01-01-{actor:02}", "gold": label, "answers": answers}
                    lines.append(json.dumps(row | {"distribution": dict.fromkeys(EMOTIONS, 1 / 8)}))
            (folder / "test/predictions.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_collect_and_render(runs):
    part, answers = folds.add_runs("ravdess_faces", runs, {}, {})
    assert part["test_set"] == {"samples": 192, "clusters": 24, "unit": "actors", "classes": 8}
    assert sum(map(len, answers.values())) == 2 * 192
    full = part["variants"]["full"]
    right = 7 / 8 * 23 / 24
    assert full["answers"]["distribution"]["accuracy"] == [pytest.approx(right, abs=1e-6)]
    assert full["answers"]["greedy"]["unparsable"] == 24 and full["nll"] == [pytest.approx(np.log(8), abs=1e-6)]
    # One actor of 24 has nothing right: drawn 0 to about 3 times.
    low, high = full["answers"]["distribution"]["accuracy_interval"]
    assert high == pytest.approx(7 / 8, abs=1e-6) and 0.7 < low < right
    [test] = part["mcnemar"]["audio"]
    assert (test["first_only"], test["second_only"]) == (23, 0) and test["p_value"] == pytest.approx(2 / 2**23)
    data = {"ravdess_faces": part | {"probe": {"audio": {"accuracy": 0.5, "weighted_f1": 0.5, "ua": 0.25}}}}
    text = folds.render(data)
    assert re.search(r"\| speech and faces \| 1 \| 83\.85 \(7\d\.\d\d to 87\.50\) \| 83\.85 \(", text)
    assert "| speech, linear probe |  | 50.00 | 25.00 |" in text
    assert "python train.py 1\npython eval.py 1" in text
    assert "| RAVDESS | speech | accuracy | 71.88 |" in folds.headline(data)


@pytest.mark.parametrize("gone", ["audio", "full"])
def test_later_runs_replace_those_of_their_seed_and_keep_the_others(runs, gone, tmp_path):
    part, answers = folds.add_runs("ravdess_faces", runs, {"probe": {}}, {})
    for folder in runs.glob(f"{gone}_fold*"):
        shutil.rmtree(folder)
    write_answers(tmp_path / "answers.csv", answers)
    as_read = read_answers(tmp_path / "answers.csv")
    again, kept = folds.add_runs("ravdess_faces", runs, part, as_read)
    assert again == part and kept == answers
    for folder in [*runs.iterdir()]:
        folder.rename(folder.with_name(folder.name.replace("1111", "2222")))
    more, rows = folds.add_runs("ravdess_faces", runs, part, as_read)
    other = "full" if gone == "audio" else "audio"
    assert more["variants"][other]["seeds"] == [1111, 2222] and more["variants"][gone] == part["variants"][gone]
    assert (
        more["variants"][other]["answers"]["distribution"]["ua"]
        == 2 * part["variants"][other]["answers"]["distribution"]["ua"]
    )
    assert sum(map(len, rows.values())) == 3 * 192 and len(more["mcnemar"]["audio"]) == 1
    with pytest.raises(ValueError, match="its samples are not those of the earlier runs of ravdess_faces"):
        one = {key: dict([*found.items()][:-1]) for key, found in as_read.items()}
        folds.add_runs("ravdess_faces", runs, part, one)


def test_intervals_of_all_metrics():
    """A corpus of which every cluster looks alike has no spread."""
    gold, given = ["a", "b", "b"] * 4, [["a", "b", None] * 4]
    bounds = bootstrap.interval(gold, given, resample([str(place // 3) for place in range(12)]))
    assert bounds == {metric: [round(value, 6)] * 2 for metric, value in bootstrap.measure(gold, *given).items()}


def test_collect_wants_every_fold(runs):
    (runs / "audio_fold3_1111" / "test/predictions.jsonl").unlink()
    with pytest.raises(ValueError, match="audio_fold3_1111: not evaluated, wanted folds 1 to 5"):
        folds.collect("ravdess_faces", runs)


def test_page_and_readme_are_rendered_from_the_figures():
    data = json.loads((RESULTS / "folds.json").read_text(encoding="utf-8"))
    assert (RESULTS / "folds.md").read_text(encoding="utf-8") == folds.render(data)
    readme = README.read_text(encoding="utf-8")
    assert readme == fill_readme(readme, "folds", folds.headline(data))
