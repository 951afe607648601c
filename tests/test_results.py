"""Result tables: runs on disk give the right numbers, and every table in the repository matches its JSON."""

import json
from pathlib import Path

import pytest

from egmf.evaluation.significance import mcnemar
from experiments import benchmarks
from experiments.benchmarks import BENCHMARKS, collect, main, render
from experiments.pages import RESULTS, check_version


IDS = [f"video{number // 3}$_${number}" for number in range(9)]  # three videos of three clips


def write_run(folder: Path, distribution: list[bool], greedy: list[bool | None], weighted_f1=(0.5, 0.25)) -> None:
    """Write a run like `eval.py`, given which answers are right (None: unparsable)."""
    (folder / "test").mkdir(parents=True)
    rows, accuracy = [], {}
    for row_id, top, text in zip(IDS, distribution, greedy, strict=True):
        gold = "positive" if row_id.startswith("video0") else "negative"
        other = "negative" if gold == "positive" else "positive"
        answers = {"distribution": gold if top else other, "greedy": None if text is None else gold if text else other}
        rows.append(json.dumps({"id": row_id, "gold": gold, "answers": answers}))
    (folder / "test/predictions.jsonl").write_text("\n".join(rows) + "\n")
    for answer, right, f1 in zip(("distribution", "greedy"), (distribution, greedy), weighted_f1, strict=True):
        accuracy[answer] = {"accuracy": sum(map(bool, right)) / 9, "weighted_f1": f1, "unparsable": right.count(None)}
    (folder / "test/metrics.json").write_text(json.dumps({"answers": accuracy}))
    (folder / "command.txt").write_text(f"python train.py {folder.name}\npython eval.py {folder.name}\n")


@pytest.fixture
def runs(tmp_path) -> Path:
    right, wrong = [True], [False]
    folder = tmp_path / "runs"
    write_run(folder / "full_1111", right * 9, right * 8 + [None], (1.0, 0.9))
    write_run(folder / "full_2222", right * 7 + wrong * 2, right * 6 + [None] * 3, (0.8, 0.7))
    write_run(folder / "text_1111", right * 6 + wrong * 3, right * 6 + wrong * 3)
    write_run(folder / "text_2222", right * 5 + wrong * 3 + right, right * 6 + wrong * 3)
    write_run(folder / "no_local_1111", right * 4 + wrong * 5, wrong * 9, (0.4, 0.0))
    (folder / "flat_1111").mkdir()  # still training
    return folder


def test_runs_of_two_versions_are_not_averaged(tmp_path):
    with pytest.raises(ValueError, match="mosi.json: got runs of earlier code, wanted it and mosi_answers.csv"):
        check_version(tmp_path / "mosi.json", [{"seed": 1}, {"seed": 2, "earlier": True}])
    check_version(tmp_path / "mosi.json", [{"seed": 1}])


def test_collect(runs, capsys):
    data, _ = collect("mosi", runs)
    assert "flat_1111: not evaluated" in capsys.readouterr().out
    assert data["test_set"] == {"samples": 9, "clusters": 3, "majority_accuracy": 0.666667}
    order = [(run["variant"], run["seed"]) for run in data["runs"][::2]]
    assert order == [("full", 1111), ("full", 2222), ("text", 1111), ("text", 2222), ("no_local", 1111)]
    assert data["runs"][3] == {
        "variant": "full",
        "seed": 2222,
        "answer": "greedy",
        "accuracy": 0.666667,
        "weighted_f1": 0.7,
        "unparsable": 3,
        "command": "python train.py full_2222 && python eval.py full_2222",
    }

    tests = [test for test in data["paired_tests"] if test["answer"] == "distribution"]
    assert [(test["test"], test["seeds"]) for test in tests] == [
        ("mcnemar", [1111]),
        ("mcnemar", [2222]),
        ("bootstrap", [1111, 2222]),
    ]
    assert [(test["first_only"], test["second_only"]) for test in tests[:2]] == [(3, 0), (2, 1)]
    assert tests[1]["p_value"] == pytest.approx(mcnemar([True] * 2 + [False], [False] * 2 + [True])["p_value"])
    # By video: 0, then clips 5, 6, 7 gain (1/2, 1, 1/2) and clip 8 is right once in each model.
    assert tests[2] == tests[2] | {"difference": 0.222222, "low": 0.0, "high": 0.5, "resamples": 10_000}
    assert tests[2]["p_value"] == pytest.approx(2 / 27, abs=0.01)  # one in 27 resamples has the first video alone


def test_render(runs):
    text = render("mosi", collect("mosi", runs)[0])
    # full: 9/9 and 7/9, greedy 8/9 and 6/9; sample standard deviations.
    cells = "88.89 ± 15.71 | 90.00 ± 14.14 | 77.78 ± 15.71 | 80.00 ± 14.14 | 4 |"
    assert f"| full model: text, audio and vision | 2 | {cells}" in text
    assert "| without the local expert | 1 | 44.44 | 40.00 | 0.00 | 0.00 | 0 |" in text
    assert "audio only" not in text and "flat gate" not in text
    assert "| distribution | 2222 | 2 | 1 | 1.0000 |" in text
    assert "| distribution | 1111, 2222 | +22.22 | +0.00 to +50.00 |" in text
    assert "9 test utterances of 3 videos" in text and "accuracy 66.67" in text
    assert "# full, seed 2222\npython train.py full_2222\npython eval.py full_2222" in text
    assert "| MMMU-BA | text, audio, vision | 82.31 | Ghosal et al. 2018, EMNLP |" in text


def test_commands(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmarks, "_paired_tests", lambda *_: [])
    (tmp_path / "meld.json").write_text(json.dumps({"test_set": None, "runs": [], "paired_tests": []}))
    main(["collect", "mosi", str(runs)])
    main(["render"])
    assert "| text only | 2 |" in (tmp_path / "mosi.md").read_text()
    assert "No run has been collected yet." in (tmp_path / "meld.md").read_text()


def test_runs_are_added_to_those_collected_before(runs, tmp_path, monkeypatch):
    """Runs collected in two steps, as from two machines, give the same result as all runs together."""
    monkeypatch.setattr(benchmarks, "RESULTS", tmp_path)
    wanted, _ = collect("mosi", runs)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("full_2222", "text_1111"):
        (runs / name).rename(other / name)
    for folder in (runs, other, runs):
        main(["collect", "mosi", str(folder)])
    assert json.loads((tmp_path / "mosi.json").read_text()) == wanted
    write_run(tmp_path / "again" / "full_1111", [False] * 9, [False] * 9, (0.0, 0.0))  # made anew: it replaces
    main(["collect", "mosi", str(tmp_path / "again")])
    replaced = json.loads((tmp_path / "mosi.json").read_text())["runs"]
    assert len(replaced) == len(wanted["runs"]) and replaced[0]["accuracy"] == 0.0


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("test/metrics.json", '{"answers": {"distribution": {"accuracy": 0.5}}}', "has accuracy 0.5"),
        ("command.txt", "python train.py\n", "wanted two lines"),
        ("test/predictions.jsonl", None, "same samples"),
    ],
)
def test_collect_refuses_a_run_that_does_not_fit(runs, file, content, message):
    path = runs / "text_2222" / file
    # None: another id in one row.
    path.write_text(path.read_text().replace(IDS[0], "video0$_$77") if content is None else content)
    with pytest.raises(ValueError, match=message):
        collect("mosi", runs)


def test_collect_refuses_unknown_names(runs, tmp_path):
    (runs / "full_1111").rename(runs / "best_1111")
    with pytest.raises(ValueError, match="VARIANT_SEED"):
        collect("mosi", runs)
    with pytest.raises(ValueError, match="no run has been evaluated"):
        collect("mosi", runs / "flat_1111")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_tables_in_the_repository_are_what_render_makes(name):
    data = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert (RESULTS / f"{name}.md").read_text(encoding="utf-8") == render(name, data)
