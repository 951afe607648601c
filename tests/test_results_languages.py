"""The comparison across languages: its tables, its figures, and the files in the repository."""

import csv
import json

import pytest
from test_corpora import write_ravdess

from corpora import casia
from experiments import languages
from experiments.pages import README, RESULTS, fill_readme


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
    languages.write_tables(languages.clips(tmp_path / "english", tmp_path / "chinese"), tmp_path / "runs")
    for direction in languages.DIRECTIONS:
        with (tmp_path / "runs" / f"{direction}.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        sides = [{row["speaker"].split()[0] for row in rows if row["split"] == split} for split in ("train", "test")]
        wanted = [{"ravdess"}, {"casia"}]
        assert sides == (wanted if direction == "english_chinese" else wanted[::-1])
        assert {row["label"] for row in rows} == {*languages.SHARED}


def test_collect_and_render(tmp_path):
    folder = tmp_path / "chinese_english_full_1111"
    (folder / "test").mkdir(parents=True)
    rows = []
    for actor in range(1, 5):
        for label in languages.SHARED:
            answer = "sad" if label == "neutral" else label
            answers = {"distribution": answer, "experts": label, "llm": "sad", "greedy": answer}
            rows.append({"id": f"03-01-01-01-01-01-{actor:02}", "gold": label, "answers": answers})
    (folder / "test" / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    probed = [{"gold": row["gold"], "answer": "happy"} for row in rows]
    (folder / "probe.json").write_text(json.dumps({"tasks": {"table": {"predictions": probed}}}))
    (folder / "command.txt").write_text("python train.py\n")
    [own] = languages.collect(tmp_path)
    assert (own["samples"], own["speakers"], own["seed"]) == (24, 4, 1111)
    assert own["distribution"]["accuracy"] == pytest.approx(5 / 6) and own["probe"]["ua"] == pytest.approx(1 / 6)
    page, short = languages.render([own])
    cells = "| 1111 | 83.33 (83.33 to 83.33) | 83.33 | 100.00 | 16.67 | 16.67 |"
    assert f"| Chinese to English | one clip at a time {cells}" in page and "python train.py" in page
    assert "| Chinese to English | one clip at a time | 83.33 (83.33 to 83.33) | 16.67 |" in short


def test_the_files_in_the_repository_match():
    found = json.loads((RESULTS / "languages.json").read_text(encoding="utf-8"))
    page, short = languages.render(found)
    assert (RESULTS / "languages.md").read_text(encoding="utf-8") == page
    text = README.read_text(encoding="utf-8")
    assert fill_readme(text, "languages", short) == text
