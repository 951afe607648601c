"""Result tables of RAVDESS: unweighted accuracy, its interval, and the file in the repository."""

import json

import numpy as np
import pytest

from experiments import ravdess
from experiments.pages import README, fill_readme


EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")


@pytest.fixture
def runs(tmp_path):
    """Six folds with one clip per actor and emotion; every neutral clip is wrong, and every clip of actor 24."""
    for fold in ravdess.FOLDS:
        folder = tmp_path / f"fold{fold}_1111"
        (folder / "test").mkdir(parents=True)
        (folder / "command.txt").write_text(f"python train.py {fold}\npython eval.py {fold}\n")
        lines = []
        for actor in range(4 * fold - 3, 4 * fold + 1):
            for number, label in enumerate(EMOTIONS, 1):
                answer = "sad" if label == "neutral" else "neutral" if actor == 24 else label
                answers = {"distribution": answer, "greedy": None if label == "neutral" else answer}
                lines.append(
                    json.dumps({"id": f"03-01-{number:02}-01-01-01-{actor:02}", "gold": label, "answers": answers})
                )
        (folder / "test/predictions.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_unweighted_accuracy_weighs_classes_alike():
    gold = np.array(["a", "a", "a", "b"])
    assert ravdess.unweighted_accuracy(gold, np.array([True, True, True, False])) == 0.5


def test_collect_and_render(runs):
    data, answers = ravdess.collect(runs)
    assert data["test_set"] == {"samples": 192, "actors": 24, "classes": 8} and len(answers) == 192
    distribution = data["pooled"][0]
    assert distribution["ua"] == pytest.approx(7 / 8 * 23 / 24, abs=1e-6)
    assert distribution["recall"]["neutral"] == 0 and distribution["recall"]["sad"] == pytest.approx(23 / 24, abs=1e-6)
    # One actor of 24 has nothing right: drawn 0 to about 3 times.
    assert distribution["high"] == pytest.approx(7 / 8, abs=1e-6) and 0.7 < distribution["low"] < distribution["ua"]
    by_fold = {run["fold"]: run for run in data["runs"] if run["answer"] == "greedy"}
    assert by_fold[1]["ua"] == 0.875 and by_fold[6]["ua"] == pytest.approx(7 / 8 * 3 / 4)
    assert by_fold[1]["unparsable"] == 4
    text = ravdess.render(data)
    assert "| 1111 | distribution | 87.50 | 87.50 | 87.50 | 87.50 | 87.50 | 65.62 | 83.85 |" in text
    assert "# fold 6, seed 1111\npython train.py 6\npython eval.py 6" in text


def test_collect_wants_every_fold(runs):
    (runs / "fold3_1111" / "test/predictions.jsonl").unlink()
    with pytest.raises(ValueError, match="fold3_1111: not evaluated, wanted folds 1 to 6"):
        ravdess.collect(runs)


def test_table_in_the_repository_is_what_render_makes():
    data = json.loads((ravdess.RESULTS / "ravdess.json").read_text(encoding="utf-8"))
    assert (ravdess.RESULTS / "ravdess.md").read_text(encoding="utf-8") == ravdess.render(data)
    readme = README.read_text(encoding="utf-8")
    assert readme == fill_readme(readme, "ravdess", ravdess.main_table(data))
