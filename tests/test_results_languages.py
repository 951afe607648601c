"""The comparison across languages: its tables, its figures, and the files in the repository."""

import csv
import json

import pytest
from corpus_files import write_ravdess

from corpora import casia
from experiments import languages
from experiments.pages import RESULTS


def test_no_speaker_and_no_other_label_crosses(tmp_path):
    write_ravdess(tmp_path / "english")
    (tmp_path / "chinese").mkdir()
    with (tmp_path / "chinese" / "metadata.csv").open("w", encoding="utf-8") as file:
        file.write("file,speaker,emotion,emotion_zh,sentence,seconds\n")
        for speaker in "1234":
            for name in casia.EMOTIONS:
                clip = f"{speaker}_{name}_201.flac"
                (tmp_path / "chinese" / clip).touch()
                file.write(f"{clip},{speaker},x,{name},201,1\n")
    found = languages.clips(tmp_path / "english", tmp_path / "chinese")
    tested: list[set[str]] = []
    languages.write_tables(found, tmp_path / "runs")
    for name in languages.TABLES:
        with (tmp_path / "runs" / f"{name}.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        speakers = [{row["speaker"] for row in rows if row["split"] == split} for split in ("train", "test")]
        assert not speakers[0] & speakers[1] and {row["label"] for row in rows} == {*languages.SHARED}
        sides = [{speaker.split()[0] for speaker in side} for side in speakers]
        if name in languages.BOTH:
            assert sides == [{"ravdess", "casia"}] * 2 and len(rows) == sum(map(len, found.values()))
            tested.append(speakers[1])
        else:
            assert sides == ([{"ravdess"}, {"casia"}] if name == "english_chinese" else [{"casia"}, {"ravdess"}])
    assert len(set().union(*tested)) == sum(map(len, tested)) == 4 + 20


def test_both_languages_are_judged_apart(tmp_path):
    for fold, name in enumerate(languages.BOTH, 1):
        folder = tmp_path / f"{name}_adapted_7"
        (folder / "test").mkdir(parents=True)
        ids = {f"{fold}_angry_201": "angry", f"03-01-05-01-01-01-{fold:02}": "angry"}
        rows = []
        for row_id, gold in ids.items():
            answer = "sad" if row_id.startswith("03") else gold
            answers = dict.fromkeys(("distribution", "experts", "llm", "greedy"), answer)
            rows.append({"id": row_id, "gold": gold, "answers": answers})
        (folder / "test" / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)))
        probed = [{"id": row["id"], "gold": row["gold"], "answer": "angry"} for row in rows]
        (folder / "probe.json").write_text(json.dumps({"tasks": {"table": {"predictions": probed}}}))
        (folder / "command.txt").write_text("python train.py\n")
    chinese, english = languages.collect(tmp_path)
    assert (chinese["direction"], english["direction"]) == ("both to Chinese", "both to English")
    assert chinese["samples"] == english["samples"] == chinese["speakers"] == english["speakers"] == 4
    assert (chinese["distribution"]["accuracy"], english["distribution"]["accuracy"]) == (1, 0)
    assert english["probe"]["accuracy"] == 1


def test_collect_and_render(tmp_path):
    folder = tmp_path / "chinese_english_full_1111"
    (folder / "test").mkdir(parents=True)
    rows = []
    for actor in range(1, 5):
        for label in languages.SHARED:
            answer = "sad" if label == "neutral" else label
            answers = {"distribution": answer, "experts": label, "llm": "sad", "greedy": answer}
            emotion = [*languages.SHARED].index(label) + 1
            rows.append({"id": f"03-01-{emotion:02}-01-01-01-{actor:02}", "gold": label, "answers": answers})
    (folder / "test" / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    probed = [{"id": row["id"], "gold": row["gold"], "answer": "happy"} for row in rows]
    (folder / "probe.json").write_text(json.dumps({"tasks": {"table": {"predictions": probed}}}))
    (folder / "command.txt").write_text("python train.py\n")
    [own] = languages.collect(tmp_path)
    assert (own["samples"], own["speakers"], own["seed"]) == (24, 4, 1111)
    assert own["distribution"]["accuracy"] == pytest.approx(5 / 6) and own["probe"]["ua"] == pytest.approx(1 / 6)
    page = languages.render([own])
    cells = "| 1111 | 83.33 (83.33 to 83.33) | 83.33 | 100.00 | 16.67 | 16.67 |"
    assert f"| Chinese to English | one clip at a time {cells}" in page and "python train.py" in page


def test_the_files_in_the_repository_match():
    found = json.loads((RESULTS / "languages.json").read_text(encoding="utf-8"))
    assert (RESULTS / "languages.md").read_text(encoding="utf-8") == languages.render(found)
