"""Result tables of Avatars: runs on disk give the right figures, and the files in the repository match the JSON."""

import json

import pytest

from corpora.avatars import KINDS
from experiments import avatars
from experiments.pages import README, fill_readme
from experiments.running import VARIANTS


def write_run(folder, accuracy: float, mae: float) -> None:
    """Write a run in which accuracy falls and error rises with the index of the kind."""
    for task, measure, worst in (("avatars", "accuracy", accuracy), ("avatars_score", "mae", mae)):
        groups = {kind: worst + place / 100 for place, kind in enumerate(KINDS)}
        reports = {
            group: {answer: {measure: value, "unparsable": 1} for answer in ("greedy", "distribution", "median")}
            for group, value in ({"all": worst} | groups).items()
        }
        (folder / task).mkdir(parents=True)
        report = {"samples": 960, "answers": reports.pop("all"), "groups": reports}
        (folder / task / "metrics.json").write_text(json.dumps(report))
        rows = [
            {"id": f"avatars_test_{kind}_{number:04d}", "gate_weights": {"expert": {"local": w, "global": 1 - w}}}
            for kind in KINDS
            for number, w in enumerate((accuracy, accuracy - 0.2))
        ]
        (folder / task / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "command.txt").write_text(f"python train.py {folder.name}\n")


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "full_1111", 0.9, 0.1)
    write_run(tmp_path / "full_2222", 0.8, 0.2)
    write_run(tmp_path / "no_local_1111", 0.5, 0.4)
    (tmp_path / "no_global_1111").mkdir()
    return tmp_path


def test_collect_and_render(runs, capsys):
    collected = avatars.collect(runs, known=[])
    assert "no_global_1111: not evaluated, left out" in capsys.readouterr().out
    assert [(entry["variant"], entry["seed"]) for entry in collected] == [
        ("full", 1111),
        ("full", 2222),
        ("no_local", 1111),
    ]
    text = avatars.render(collected)
    assert "| text, audio and vision | 2 | 85.0 ± 7.1 | 85.0 ± 7.1 | 86.0 ± 7.1 |" in text
    assert "| without the local expert | 1 | 50.0 | 50.0 | 51.0 | 52.0 | 53.0 | 54.0 | 55.0 |" in text
    assert "| without the local expert | 1 | 0.400 | 0.400 | 0.410 |" in text
    assert "| local | 75 ± 7 | 75 ± 7 |" in text and "| global | 25 ± 7 |" in text  # of the gate, whole models alone
    assert "6 answers of all runs and both tasks together were not a legal answer" in text
    assert "| text | 37.5 |" in text and "| all three | 100.0 |" in text  # what the corpus's rules allow
    assert "# full, seed 2222\npython train.py full_2222" in text
    assert "--output_dir RUNS_DIR/towers_2222 --seed 2222" in text


def test_runs_of_several_machines_add_up(runs, tmp_path):
    known = avatars.collect(runs, known=[])
    elsewhere = tmp_path / "elsewhere"
    write_run(elsewhere / "full_3333", 0.7, 0.3)
    write_run(elsewhere / "full_1111", 1.0, 0.0)
    both = avatars.collect(elsewhere, known)
    assert [entry["seed"] for entry in both] == [1111, 2222, 3333, 1111]
    assert both[0]["accuracy_distribution"]["all"] == 1.0  # the newer one of a seed


def test_commands_differ_in_what_the_variant_names(tmp_path):
    of = {variant: avatars.steps_of(variant, 7, "DIR", tmp_path)[0][0] for variant in ("towers", *avatars.NAMES)}
    towers = tmp_path / "towers_7"
    assert of["towers"][-4:] == ["--output_dir", str(towers), "--seed", "7"]
    for variant, change in ((name, VARIANTS[name]) for name in avatars.NAMES):
        assert str(towers / "towers/audio") in of[variant]
        assert of[variant][len(of["full"]) :] == change


def test_tables_in_the_repository_are_what_render_makes():
    runs = json.loads((avatars.RESULTS / "avatars.json").read_text(encoding="utf-8"))
    assert (avatars.RESULTS / "avatars.md").read_text(encoding="utf-8") == avatars.render(runs)
    readme = README.read_text(encoding="utf-8")
    assert readme == fill_readme(readme, "avatars", avatars.main_table(runs))
