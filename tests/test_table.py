"""Your own clips: tables in every form, their mistakes, splits, tasks from labels, and the run before it starts."""

import csv
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
import yaml
from clips import tone, write_clip
from commands import read_lines, run
from corpus_files import MELD_FILE_OF, published, write_meld
from datasets import Audio, ClassLabel, Dataset, DatasetDict
from datasets.table import embed_table_storage
from models import build_processor, save_whisper, whisper
from safetensors.torch import load_file

from corpora import clusters_of, load_corpus, speakers_of
from corpora.report import describe_corpus, find_doubts
from corpora.splits import make_splits, read_splits, write_splits
from corpora.table import load_unlabelled
from egmf.data.clips import load_row_media, load_together
from egmf.data.collator import AffectCollator, check_labels, expand_by_task
from egmf.data.mixture import MixtureSampler, mix_rows
from egmf.data.tasks import infer_tasks
from egmf.data.tower_cache import _by_file
from egmf.media_egmf import Recording, load_video
from egmf.processing_egmf import EGMFProcessor
from egmf.recipe_reading import load_recipe
from egmf.training.dry_run import describe_prompt


ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    {"file": "clips/a1.wav", "text": "I told you, twice", "label": "calm", "speaker": "Ann", "split": "train"},
    {"file": "clips/a2.wav", "text": "Where were you?", "label": "tense", "speaker": "Ann", "split": "train"},
    {"file": "clips/b1.wav", "text": "None", "label": "calm", "speaker": "Bob", "split": "dev"},
    {"file": "clips/b2.wav", "text": "Sie sagt „ja“", "label": "tense", "speaker": "Bob", "split": "test"},
    {"file": "clips/c1.wav", "text": "", "label": "tense", "speaker": "007", "split": "test"},
]


def write_sounds(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, tone(0.3 + 0.02 * number, 150.0 + 40 * number), 16000)


def write_csv(file: Path, rows: list[dict], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding=encoding) as target:
        writer = csv.DictWriter(target, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return file


def write_words(folder: Path, rows: list[tuple], columns: str = "text label speaker dialogue") -> Path:
    return write_csv(folder / "words.csv", [dict(zip(columns.split(), row, strict=False)) for row in rows])


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """A folder with the clips of `ROWS`."""
    folder = tmp_path_factory.mktemp("table")
    write_sounds(folder, [row["file"] for row in ROWS])
    return folder


@pytest.fixture(scope="module")
def expected(clips) -> dict[str, list[dict]]:
    return {split: rows.to_list() for split, rows in load_corpus("table", write_csv(clips / "a.csv", ROWS)).items()}


# --- forms -----------------------------------------------------------------------------------------------------------


def test_a_table_becomes_rows_of_the_schema(clips, expected):
    assert {split: len(rows) for split, rows in expected.items()} == {"train": 2, "validation": 1, "test": 2}
    first, none, last = expected["train"][0], expected["validation"][0], expected["test"][1]
    assert first["id"] == "clips/a1.wav" and first["audio"] == str(clips / "clips/a1.wav") and first["video"] is None
    assert first["text"] == "I told you, twice" and first["emotion"] == "calm" and first["sentiment"] is None
    assert none["text"] == "None" and last["text"] == "" and last["speaker"] == "007"


@pytest.mark.parametrize(
    "form", ["semicolon.csv", "excel.csv", "mark.csv", "tabs.tsv", "lines.jsonl", "table.parquet"]
)
def test_all_tables_give_the_same_rows(form, clips, expected):
    file = clips / form
    if form.endswith(("csv", "tsv")):
        delimiter = {"semicolon.csv": ";", "mark.csv": ","}.get(form, "\t")
        write_csv(file, ROWS, delimiter, {"excel.csv": "utf-16", "mark.csv": "utf-8-sig"}.get(form, "utf-8"))
    elif form == "lines.jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    else:
        pd.DataFrame(ROWS).to_parquet(file)
    assert {split: rows.to_list() for split, rows in load_corpus("table", file).items()} == expected


def test_folders_of_datasets_give_the_same_rows(tmp_path, clips, expected):
    parts = {"train": ROWS[:2], "validation": ROWS[2:3], "test": ROWS[3:]}
    for split, rows in parts.items():
        listed = [
            {"file_name": row["file"]} | {name: row[name] for name in ("text", "label", "speaker")} for row in rows
        ]
        shutil.copytree(clips / "clips", tmp_path / "folder" / split / "clips")
        write_csv(tmp_path / "folder" / split / "metadata.csv", listed)
    folder = load_corpus("table", tmp_path / "folder")
    saved = DatasetDict(
        {
            split: Dataset.from_list([row | {"audio": str(clips / row["file"])} for row in rows])
            .remove_columns(["file", "split"])
            .cast_column("audio", Audio())
            .cast_column("label", ClassLabel(names=["calm", "tense"]))
            for split, rows in parts.items()
        }
    )
    saved.save_to_disk(tmp_path / "saved")
    # A data set of the Hub has the sound in the table.
    for split, rows in saved.items():
        table = rows.with_format("arrow").map(embed_table_storage, batched=True, batch_size=1)
        table.to_parquet(tmp_path / "shards" / f"{split}-00000-of-00001.parquet")
    for split, rows in parts.items():
        write_csv(
            clips / "by_split" / f"{split}.csv", [row | {"file": f"../{row['file']}", "split": ""} for row in rows]
        )
    others = [load_corpus("table", folder) for folder in (tmp_path / "saved", tmp_path / "shards", clips / "by_split")]
    ids = [row_id for rows in others[1].values() for row_id in rows["id"]]
    assert all(re.fullmatch(r"[0-9a-f]{64}\.wav", row_id) for row_id in ids)  # the same on every machine
    for corpus in (folder, *others):
        for split, rows in corpus.items():
            assert [row["emotion"] for row in rows] == [row["emotion"] for row in expected[split]]
            assert [row["text"] for row in rows] == [row["text"] for row in expected[split]]
            for row, other in zip(rows, expected[split], strict=True):
                assert Path(row["audio"]).read_bytes() == Path(other["audio"]).read_bytes()


def test_equal_names_in_the_folders_of_splits_are_different_clips(tmp_path):
    write_sounds(tmp_path, [f"{split}/{number}.wav" for split in ("train", "test") for number in range(2)])
    for split in ("train", "test"):
        rows = [{"file_name": f"{number}.wav", "label": "ab"[number]} for number in range(2)]
        write_csv(tmp_path / split / "metadata.csv", rows)
    corpus = load_corpus("table", tmp_path)
    assert {split: rows["id"][:] for split, rows in corpus.items()} == {
        "train": ["train/0.wav", "train/1.wav"],
        "validation": [],
        "test": ["test/0.wav", "test/1.wav"],
    }


def test_folders_by_class_name_the_labels(tmp_path):
    write_sounds(tmp_path, [f"{label}/{number}.wav" for label in ("calm", "tense") for number in range(3)])
    corpus = load_corpus("table", tmp_path)
    assert Counter(label for rows in corpus.values() for label in rows["emotion"]) == {"calm": 3, "tense": 3}
    assert all(len(rows) for rows in corpus.values())
    write_sounds(tmp_path / "divided", [f"{split}/{label}/1.wav" for split in ("train", "test") for label in "ab"])
    divided = load_corpus("table", tmp_path / "divided")
    assert divided["train"]["id"][:] == ["train/a/1.wav", "train/b/1.wav"] and divided["test"]["emotion"][:] == [
        "a",
        "b",
    ]


def test_a_file_fills_what_it_holds(tmp_path):
    write_clip(tmp_path / "talk.mp4")
    write_sounds(tmp_path, ["talk.flac"])
    shutil.copy(tmp_path / "talk.mp4", tmp_path / "face.JPG")
    rows = [{"file": name, "label": "x", "split": "train"} for name in ("talk.mp4", "talk.flac", "face.JPG")]
    found = load_corpus("table", write_csv(tmp_path / "t.csv", rows))["train"]
    names = [[row[column] and Path(row[column]).name for column in ("audio", "video")] for row in found]
    assert names == [["talk.mp4", "talk.mp4"], ["talk.flac", None], [None, "face.JPG"]]
    seen = [
        {"video": "talk.mp4", "audio": "", "label": "x"},
        {"video": "talk.mp4", "audio": "talk.flac", "label": "x"},
    ]
    seen = write_csv(tmp_path / "v.csv", [row | {"id": n, "split": "train"} for n, row in enumerate(seen)])
    assert [Path(row["audio"]).name for row in load_corpus("table", seen)["train"]] == ["talk.mp4", "talk.flac"]
    beside = [{"audio": "talk.flac", "image": "face.JPG", "label": "x", "split": "train"}]
    (row,) = load_corpus("table", write_csv(tmp_path / "t.csv", beside))["train"]
    assert (Path(row["audio"]).name, Path(row["video"]).name) == ("talk.flac", "face.JPG")


def test_tab_separated_text_may_have_quotes_that_enclose_nothing(tmp_path):
    lines = ["text\tlabel\tsplit", '"I see," he said\tcalm\ttrain', 'so "it" is\tcalm\ttrain', '"Why\ttense\ttrain']
    (tmp_path / "t.tsv").write_text("\n".join([*lines, 'he asked"\tcalm\ttrain']))
    texts = load_corpus("table", tmp_path / "t.tsv")["train"]["text"][:]
    assert texts == ['"I see," he said', 'so "it" is', '"Why', 'he asked"']
    (tmp_path / "t.tsv").write_text("\n".join([lines[0], '"a ""word"""\tcalm\ttrain', '"two\tcells"\ttense\ttrain']))
    assert load_corpus("table", tmp_path / "t.tsv")["train"]["text"][:] == ['a "word"', "two\tcells"]


def test_the_name_of_a_file_says_more_than_that_of_its_folder(tmp_path):
    (tmp_path / "training_data").mkdir()
    for split in ("train", "test"):
        rows = [{"text": f"{split} words", "label": "ab"[split == "test"]}]
        write_csv(tmp_path / "training_data" / f"{split}.csv", rows)
    found = load_corpus("table", tmp_path)
    assert {split: len(rows) for split, rows in found.items()} == {"train": 1, "validation": 0, "test": 1}


@pytest.mark.parametrize(("names", "sizes"), [("train eval test", [1, 1, 1]), ("train eval", [1, 0, 1])])
def test_eval_is_validation_beside_a_test_split(names, sizes, tmp_path, caplog):
    rows = [(f"words {name}", "ab"[name == "train"], name) for name in names.split()]
    found = load_corpus("table", write_words(tmp_path, rows, "text label split"))
    assert [len(part) for part in found.values()] == sizes
    assert ("eval beside test is taken for validation" in caplog.text) == (sizes[1] == 1)


def test_other_names_are_mapped(tmp_path, caplog):
    caplog.set_level("INFO")
    file = write_words(tmp_path, [("yes", "calm", "1", "x"), ("no", "tense", "2", "y")], "Words Emotion Actor Note")
    columns = {"text": "Words", "label": "Emotion", "speaker": "Actor"}
    corpus = load_corpus("table", file, columns=columns)
    assert sorted(label for rows in corpus.values() for label in rows["emotion"]) == ["calm", "tense"]
    assert "not read: Note" in caplog.text
    for wrong, message in (
        ({"label": "Emotoin"}, "columns: got label: 'Emotoin', wanted one of its columns Words, Emotion"),
        ({"lable": "Emotion"}, "columns: got 'lable', wanted some of id, file"),
        ({"text": "Words"}, "got the columns Words, Emotion, Actor, Note, wanted label or score"),
        ({"label": "Emotion"}, "wanted file, audio, video, image or text"),
    ):
        with pytest.raises(ValueError, match=message):
            load_corpus("table", file, columns=wrong)


# --- mistakes --------------------------------------------------------------------------------------------------------


WRONG = """\
file,text,label,speaker,split,start,end
good.wav,"Hello, you",calm,Ann,train,,
lost.wav,hi,calm,Ann,train,,
good.wav,again,tense,Ann,train,,
next.wav,oh,,Ann,train,,
note.dat,oh,tense,Bob,test,,
next.wav,oh,tense,Bob,tset,,
next.wav,oh, yes,tense,Bob,test,,
next.wav,oh,tense,Bob,test,3,1
next.wav,oh,tense,Bob,test,soon,
void.wav,oh,tense,Bob,test,,
,,tense,Bob,test,,
http://example.org/a.wav,oh,tense,Bob,test,,
,words alone,tense,Bob,test,,
"""
SAID = """\
line 3: file: got lost.wav, which does not exist, wanted a file
line 4: got 'good.wav' again ({file}: line 2), wanted each clip or id once
line 5: label: got nothing, wanted the label of the row
line 6: file: got note.dat, wanted the suffix of sound, video or an image, or the column audio, video or image
line 7: split: got tset, wanted one of train, validation, test
line 8: got 8 cells, wanted 7, as in the header: put a text that contains ',' into double quotes
line 9: end: got 1, wanted more than start (3)
line 10: start: got 'soon', wanted seconds or a time such as 0:01:02.5
line 11: file: got void.wav, which is empty, wanted a clip
line 12: got neither words nor a file, wanted one of them
line 13: file: got the address http://example.org/a.wav, wanted a file on this machine
"""


@pytest.fixture
def wrong(tmp_path) -> Path:
    write_sounds(tmp_path, ["good.wav", "next.wav"])
    (tmp_path / "note.dat").write_text("x")
    (tmp_path / "void.wav").touch()
    (tmp_path / "wrong.csv").write_text(WRONG)
    return tmp_path / "wrong.csv"


def test_every_wrong_row_gets_one_line(wrong):
    with pytest.raises(ValueError) as error:
        load_corpus("table", wrong)
    head, *lines = str(error.value).splitlines()
    assert head.startswith(f"{wrong}: 11 of 13 rows are wrong; correct them")
    assert lines == [f"{wrong}: {line}" for line in SAID.format(file=wrong).splitlines()]


def test_wrong_rows_are_left_out_on_demand(wrong, caplog):
    corpus = load_corpus("table", wrong, drop_wrong_rows=True)
    assert [row["id"] for rows in corpus.values() for row in rows][0] == "good.wav" and len(corpus["test"]) == 1
    assert "11 of 13 rows are wrong and left out" in caplog.text and "line 12: got neither" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\n", "got no rows"),
        ('text,label\n"yes,calm\n', "line 2: got a faulty quote"),
        ('text,"label\nyes,calm\n', "line 1: got a faulty quote"),
        ("text,label,text\na,b,c\n", "line 1: got the column text twice"),
        ('text,score\nyes,"0,5"\n', "line 2: score: got '0,5', wanted a number such as 0.5"),
        ("text,score\nyes,nan\n", "line 2: score: got 'nan', wanted a number"),
        (
            b"text,label\nd\xe9j\xe0,calm\n",
            "line 2: got a byte 0xe9 that is not UTF-8, wanted the file saved as UTF-8",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said(content, message, tmp_path):
    file = tmp_path / "t.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load_corpus("table", file)


def test_lines_that_end_as_on_an_old_macintosh(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"text;label\rso;calm\rwhat;tense\r")
    found = load_corpus("table", tmp_path / "t.csv").values()
    assert {row["text"]: row["emotion"] for rows in found for row in rows} == {"so": "calm", "what": "tense"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "t.jsonl: got an empty file, wanted one row in each line"),
        (b'{"text": "a", "label": "b"}\n{"text": "d\xe9j\xe0", "label": "b"}\n', "t.jsonl: line 2: got a byte 0xe9"),
    ],
)
def test_what_is_wrong_with_json_lines_is_said(content, message, tmp_path):
    (tmp_path / "t.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_corpus("table", tmp_path / "t.jsonl")


def test_a_source_that_is_nothing_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"clips.csv: no such file or folder, wanted a table \(.csv"):
        load_corpus("table", tmp_path / "clips.csv")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="broken.parquet: got no dataset that can be read"):
        load_corpus("table", tmp_path / "broken.parquet")
    (tmp_path / "clips.xlsx").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"got a file \*.xlsx, wanted a table"):
        load_corpus("table", tmp_path / "clips.xlsx")


def test_doubts_name_their_rows(tmp_path):
    write_sounds(tmp_path, ["a.wav", "b.wav"])
    shutil.copy(tmp_path / "a.wav", tmp_path / "copy.wav")
    labels = {"a.wav": ("calm", "train"), "b.wav": ("Calm", "train"), "copy.wav": ("tense", "test")}
    rows = [{"file": name, "label": label, "split": split} for name, (label, split) in labels.items()]
    corpus = load_corpus("table", write_csv(tmp_path / "t.csv", rows))
    assert find_doubts(corpus) == [
        "the same clip is in train (a.wav) and in test (copy.wav)",
        "label 'calm' has one clip: a.wav in train",
        "label 'Calm' has one clip: b.wav in train",
        "label 'tense' has one clip: copy.wav in test",
        "test: all rows have the label 'tense'",
        "labels 'Calm', 'calm' look like one",
    ]
    write_clip(tmp_path / "mute.mp4", sound=False)
    rows = [{"file": "mute.mp4", "text": "NA", "label": "a"}, {"file": "b.wav", "text": "so", "label": "b"}]
    doubts = find_doubts(load_corpus("table", write_csv(tmp_path / "m.csv", rows)))
    assert f"files without a sound track: 1 of 2, such as {tmp_path / 'mute.mp4'}" in doubts
    assert "text: got 'NA' in 1 rows; a cell without a value must be empty" in doubts
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    rows = [("a.wav", "Ann", "train", "0"), ("b.wav", "Bob", "train", "0"), ("b.wav", "Bob", "test", "300")]
    rows += [("empty.wav", "ann", "train", "0")]
    names = ("file", "speaker", "split", "start")
    cells = [dict(zip(names, row, strict=True)) | {"label": "ab"[number % 2]} for number, row in enumerate(rows)]
    doubts = find_doubts(load_corpus("table", write_csv(tmp_path / "u.csv", cells)))
    assert [
        doubt for doubt in doubts if doubt.startswith("clips without sound, or with a start behind the end of their")
    ]
    assert "speakers 'Ann', 'ann' look like one" in doubts
    assert doubts[-1] == (
        "speakers in several splits: 1, such as Bob in train and test; figures then hold for known speakers"
    )
    said = describe_corpus(corpus)
    assert said[0] == "train: 2 rows" and "  audio: in 2 rows, seconds 0.3 to 0.32, median 0.31" in said


# --- splits, context, parts ------------------------------------------------------------------------------------------


def test_made_splits_keep_speakers_apart_and_labels_even():
    rng = np.random.default_rng(0)
    rows = [
        {"speaker": str(speaker), "dialogue": None, "recording": None, "emotion": label}
        for speaker in range(20)
        for label in ["calm"] * int(rng.integers(3, 6)) + ["tense"] * 2
    ]
    assert make_splits(rows, 0) == "speaker"
    splits = {name: [row for row in rows if row["split"] == name] for name in ("train", "validation", "test")}
    for name, share in (("train", 0.7), ("validation", 0.15), ("test", 0.15)):
        assert len(splits[name]) / len(rows) == pytest.approx(share, abs=0.06)
        assert sum(row["emotion"] == "tense" for row in splits[name]) / 40 == pytest.approx(share, abs=0.06)
    speakers = [{row["speaker"] for row in part} for part in splits.values()]
    assert sum(map(len, speakers)) == len(set.union(*speakers)) == 20
    before = [row["split"] for row in rows]
    make_splits(rows, 0)
    assert before == [row["split"] for row in rows]
    make_splits(rows, 1)
    assert before != [row["split"] for row in rows]


def test_the_same_words_are_in_one_split(tmp_path):
    words = ["no way", "great", "hm", "Fine by me", *(f"line {number}" for number in range(20))]
    cells = [{"text": text.upper() if n else f" {text}", "label": "ab"[n % 2]} for text in words for n in range(5)]
    corpus = load_corpus("table", write_csv(tmp_path / "t.csv", cells))
    found = [{text.strip().casefold() for text in corpus[split]["text"]} for split in corpus]
    assert all(found) and sum(map(len, found)) == len(words)


def test_rows_without_a_speaker_leave_the_others_together(tmp_path, caplog):
    cells = [{"text": f"{n}", "label": "ab"[n % 2], "speaker": "" if n == 7 else f"s{n % 8}"} for n in range(80)]
    corpus = load_corpus("table", write_csv(tmp_path / "t.csv", cells))
    where = {
        speaker: {split for split in corpus if speaker in corpus[split]["speaker"]} for speaker in "s0 s1 s7".split()
    }
    assert all(len(splits) == 1 for splits in where.values())
    assert "speaker: got nothing in 1 rows, such as" in caplog.text and "line 9" in caplog.text
    ids = [row_id for rows in corpus.values() for row_id in rows["id"]]
    speakers = [speaker for rows in corpus.values() for speaker in rows["speaker"]]
    unit, clusters = clusters_of("table", ids, speakers)
    assert unit == "speakers" and len(set(clusters)) == 9
    assert clusters_of("table", ["a.wav#t=0,1", "a.wav#t=1,2", "b.wav"], [None] * 3) == (
        "recordings",
        ["a.wav", "a.wav", "b.wav"],
    )
    with pytest.raises(ValueError, match="got no speaker in 1 of 80 rows of table"):
        speakers_of("table", ids, speakers)


@pytest.mark.parametrize("column", ["label", "score"])
def test_scores_are_split_by_size_alone(tmp_path, column):
    """Each number would otherwise be a class of its own, and the rare ones all in train."""
    cells = [{"text": f"{n}", column: f"{n / 100}", "speaker": f"s{n % 40}"} for n in range(400)]
    corpus = load_corpus("table", write_csv(tmp_path / "t.csv", cells))
    assert [len(rows) for rows in corpus.values()] == [280, 60, 60]


def test_columns_that_may_be_meant_are_named(tmp_path, caplog):
    write_sounds(tmp_path, ["a.wav", "b.wav"])
    cells = [{"text": name, "label": name[0], "filename": f"{name}.wav", "set": "train"} for name in "ab"]
    load_corpus("table", write_csv(tmp_path / "t.csv", cells))
    assert (
        """the column filename, with 'a.wav', is not read; --corpus_options '{"columns": {"file": "filename"}}'"""
        in (caplog.text)
    )
    assert "the column set, with 'train', is not read" in caplog.text


def test_names_of_columns_ignore_case(tmp_path):
    table = write_csv(tmp_path / "t.csv", [{"Words": name, "Emotion": name} for name in "ab"])
    corpus = load_corpus("table", table, columns={"text": "words", "label": "emotion"})
    assert sorted((row["text"], row["emotion"]) for rows in corpus.values() for row in rows) == [
        ("a", "a"),
        ("b", "b"),
    ]
    assert [row["text"] for row in load_unlabelled(table, {"text": "words", "speaker": "who"})] == ["a", "b"]


def test_a_speaker_column_of_another_name_is_named(tmp_path, caplog):
    cells = [{"Transcript": name, "Emotion": name, "Speaker ID": "Ann", "text": name, "label": name} for name in "ab"]
    load_corpus("table", write_csv(tmp_path / "t.csv", cells))
    assert (
        """the column Speaker ID, with 'Ann', is not read; --corpus_options '{"columns": {"speaker":""" in caplog.text
    )
    assert "column Transcript" not in caplog.text  # there is a column text
    caplog.clear()
    load_unlabelled(write_csv(tmp_path / "u.csv", [{"file": "", "Sentence": "a", "text_id": "1", "text": ""}]))
    assert caplog.text == ""
    with pytest.raises(ValueError, match="got the columns Sentence, wanted file, audio, video, image or text$"):
        load_unlabelled(write_csv(tmp_path / "v.csv", [{"Sentence": "a"}]))
    write_sounds(tmp_path, ["a.wav"])
    load_unlabelled(write_csv(tmp_path / "w.csv", [{"file": "a.wav", "Sentence": "a", "emotion": "b"}]))
    assert "the column Sentence, with 'a', is not read; text is the name that is read" in caplog.text
    assert "emotion" not in caplog.text


@pytest.mark.parametrize(
    "names",
    [("Training set/{}", "Test set/{}"), ("data/train/{}", "data/test/{}"), ("train_data/all/{}", "test_data/all/{}")],
)
def test_folders_of_splits_around_those_of_classes(tmp_path, names):
    files = [f"{name.format(label)}/{n}.wav" for name in names for label in ("calm", "tense") for n in range(4)]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    write_sounds(tmp_path, files)
    corpus = load_corpus("table", tmp_path)
    assert [len(corpus[split]) for split in ("train", "validation", "test")] == [8, 0, 8]
    assert all(
        "est" in Path(row["audio"]).relative_to(tmp_path).parts[names[0].startswith("data")] for row in corpus["test"]
    )
    assert {row["emotion"] for row in corpus["test"]} == {"calm", "tense"}


def test_rows_that_a_run_did_not_have_are_named_if_their_speaker_is_known(tmp_path, caplog):
    cells = [{"text": f"line {n}", "label": "ab"[n % 2], "speaker": f"s{n % 8}"} for n in range(40)]
    cells += [{"text": "yes", "label": "ab"[n % 2], "speaker": f"s{n}"} for n in range(8)]
    made = load_corpus("table", write_csv(tmp_path / "t.csv", cells))
    write_splits(tmp_path / "splits.csv", made)
    known = read_splits(tmp_path / "splits.csv")
    again = load_corpus(
        "table", write_csv(tmp_path / "t.csv", sorted(cells, key=lambda row: row["label"])), splits=known
    )
    for split, rows in made.items():  # the same words of other speakers keep their splits in any order
        said, said_again = (sorted(zip(one["speaker"], one["text"], strict=True)) for one in (rows, again[split]))
        assert said == said_again
    speaker = made["train"]["speaker"][0]
    more = [*cells, {"text": "something new", "label": "a", "speaker": speaker}]
    caplog.clear()
    assert (
        len(load_corpus("table", write_csv(tmp_path / "t.csv", more), splits=known)["test"]) == len(made["test"]) + 1
    )
    assert "1 test rows are new, and have a speaker of train or validation rows of this run, such as" in caplog.text


def test_a_dialogue_out_of_order_is_named(tmp_path, caplog):
    write_sounds(tmp_path, ["a.wav"])
    starts = (0, 0.2, 0.1, 0.3)
    rows = [
        {"file": "a.wav", "start": start, "end": start + 0.1, "label": f"{start}x", "dialogue": 1} for start in starts
    ]
    load_corpus("table", write_csv(tmp_path / "t.csv", rows))
    assert "1 rows of a dialogue start before an earlier row" in caplog.text and "line 4" in caplog.text
    rows[0]["end"] = 900
    corpus = load_corpus("table", write_csv(tmp_path / "t.csv", rows))
    assert "clips with an end behind that of their file: 1, such as a.wav#t=0,900" in find_doubts(corpus)


def test_excel_may_name_the_delimiter_and_accents_have_one_spelling(tmp_path):
    write_sounds(tmp_path, ["é.wav"])  # as one character
    lines = ["sep=;", "file;label;text", "é.wav;fâché;a, b|c"]
    composed, apart = (normalize(form, lines[2]) for form in ("NFC", "NFD"))
    (tmp_path / "t.csv").write_text("\n".join([*lines[:2], composed]), encoding="utf-8")
    (tmp_path / "u.csv").write_text("\n".join([*lines[:2], apart]), encoding="utf-8")
    first, second = (load_corpus("table", tmp_path / name)["train"][0] for name in ("t.csv", "u.csv"))
    assert first["text"] == "a, b|c" and first["audio"] == second["audio"]
    (tmp_path / "v.csv").write_text(
        "\n".join(["label,text", *(line.split(";")[1] + ",x" for line in (composed, apart))])
    )
    assert {row["emotion"] for rows in load_corpus("table", tmp_path / "v.csv").values() for row in rows} == {
        first["emotion"]
    }


@pytest.mark.parametrize(("groups", "sizes"), [(1, [4, 1, 1]), (2, [3, 0, 3]), (3, [2, 2, 2])])
def test_few_speakers_still_give_a_test_split(groups, sizes):
    rows = [
        {"speaker": str(n % groups), "dialogue": None, "recording": None, "emotion": None, "sentiment": None}
        for n in range(6)
    ]
    assert make_splits(rows, 0) == ("speaker" if groups > 1 else "row")
    assert [Counter(row["split"] for row in rows)[name] for name in ("train", "validation", "test")] == sizes


def test_words_of_another_table_with_the_same_ids_are_new(tmp_path):
    words = ["yes", "no", "so", "well", "oh", "ah"]
    for name, more in (("mine", ""), ("other", " indeed")):
        rows = [{"id": n, "text": word + more, "label": "ab"[n % 2]} for n, word in enumerate(words)]
        write_csv(tmp_path / f"{name}.csv", rows)
    made = load_corpus("table", tmp_path / "mine.csv")
    write_splits(tmp_path / "splits.csv", made)
    known = read_splits(tmp_path / "splits.csv")
    assert load_corpus("table", tmp_path / "mine.csv", splits=known)["train"]["id"][:] == made["train"]["id"][:]
    assert len(load_corpus("table", tmp_path / "other.csv", splits=known)["test"]) == 6


def test_written_splits_hold_for_a_table_that_has_grown(tmp_path, caplog):
    write_sounds(tmp_path, [f"{number}.wav" for number in range(6)])
    rows = [{"file": f"{number}.wav", "label": "ab"[number % 2]} for number in range(6)]
    made = load_corpus("table", write_csv(tmp_path / "t.csv", rows[:5]))
    write_splits(tmp_path / "splits.csv", made)
    write_splits(tmp_path / "splits.csv", made)  # a run that goes on
    known = read_splits(tmp_path / "splits.csv")
    again = load_corpus("table", write_csv(tmp_path / "t.csv", rows[::-1]), splits=known)
    for split in ("train", "validation"):
        assert set(again[split]["id"]) == set(made[split]["id"]) != set()
    assert set(again["test"]["id"]) == set(made["test"]["id"]) | {"5.wav"}
    changed = "rows that are new, gone, changed or in another split"
    with pytest.raises(ValueError, match=f"splits.csv: got 1 {changed}"):
        write_splits(tmp_path / "splits.csv", again)
    corrected = [row | {"label": "a" if row["file"] == "1.wav" else row["label"]} for row in rows[:5]]
    with pytest.raises(ValueError, match=f"splits.csv: got 1 {changed}"):
        write_splits(
            tmp_path / "splits.csv", load_corpus("table", write_csv(tmp_path / "t.csv", corrected), splits=known)
        )
    # Other clips of the same names were not trained on.
    write_sounds(tmp_path / "other", [f"{number}.wav" for number in (5, 0, 1, 2, 3, 4)])
    other = load_corpus("table", write_csv(tmp_path / "other" / "t.csv", rows), splits=known)
    assert len(other["test"]) == 6
    named = [row | {"split": "test"} for row in rows[:5]]
    assert len(load_corpus("table", write_csv(tmp_path / "named.csv", named), splits=known)["test"]) == 5
    learned = sum(split != "test" for split in known.values())
    assert f"{learned} test rows were train or validation rows of this run, such as" in caplog.text
    caplog.clear()
    assert len(load_corpus("table", tmp_path / "t.csv", splits={})["test"]) == 5
    assert "no splits.csv beside the model has its rows: all 5 are test rows" in caplog.text


def test_dialogues_give_context(tmp_path):
    rows = [("one", "a", "Ann", "1"), ("two", "b", "Bob", "1"), ("new", "a", "Ann", "2"), ("three", "a", "Ann", "1")]
    file = write_words(tmp_path, rows)
    found = {row["text"]: row["context"] for part in load_corpus("table", file, context=2).values() for row in part}
    assert found["one"] == found["new"] == []
    assert found["three"] == [{"speaker": "Ann", "text": "one"}, {"speaker": "Bob", "text": "two"}]


def test_words_without_a_label_stay_context(tmp_path):
    """Of an interview, often only one side is labelled."""
    file = write_words(
        tmp_path, [("How are you?", "", "Ann", "1"), ("Fine", "calm", "Bob", "1"), ("I see", "b", "", "")]
    )
    with pytest.raises(ValueError, match="1 of 3 rows are wrong.*\n.*line 2: label: got nothing"):
        load_corpus("table", file)
    corpus = load_corpus("table", file, drop_wrong_rows=True)
    found = {row["text"]: row["context"] for part in corpus.values() for row in part}
    assert found == {"Fine": [{"speaker": "Ann", "text": "How are you?"}], "I see": []}
    write_sounds(tmp_path, ["a.wav"])  # which two annotators have heard
    rows = [("a.wav", "one", "", 1), ("a.wav", "one", "calm", 1), ("", "two", "tense", 1)]
    cells = [dict(zip(("file", "text", "label", "dialogue"), row, strict=True)) for row in rows]
    corpus = load_corpus("table", write_csv(tmp_path / "both.csv", cells), drop_wrong_rows=True)
    found = {row["text"]: [turn["text"] for turn in row["context"]] for part in corpus.values() for row in part}
    assert found == {"one": [], "two": ["one"]}


def test_a_part_of_a_recording_is_heard_as_the_same_part_in_a_file(tmp_path, llm_folder):
    sound = np.concatenate([tone(0.5, 200.0), tone(0.5, 400.0), tone(0.5, 800.0)])
    soundfile.write(tmp_path / "long.wav", sound, 16000)
    soundfile.write(tmp_path / "cut.wav", sound[8000:16000], 16000)
    rows = [("long.wav", "0.5", "1"), ("long.wav", "0:00:01", ""), ("cut.wav", "", "")]
    rows = [{"file": file, "label": "x", "split": "train", "start": start, "end": end} for file, start, end in rows]
    part, rest, cut = load_corpus("table", write_csv(tmp_path / "t.csv", rows))["train"]
    assert part["id"] == "long.wav#t=0.5,1" and rest["id"] == "long.wav#t=1"
    processor = build_processor(llm_folder())
    heard = [load_row_media(processor, "audio", row["audio"]).audio for row in (part, rest, cut)]
    assert np.array_equal(heard[0].samples, heard[2].samples)
    assert np.array_equal(heard[1].samples, soundfile.read(tmp_path / "long.wav", dtype="float32")[0][16000:])
    with pytest.raises(processor.media_error, match="the recording ends after 1.5 seconds"):
        load_row_media(processor, "audio", str(tmp_path / "long.wav#t=2,3"))


def test_a_part_of_a_video_is_seen(tmp_path, llm_folder):
    write_clip(tmp_path / "talk.mp4")
    rows = [
        {"file": "talk.mp4", "label": "x", "split": "train", "start": start, "end": "0.8"} for start in ("", "0.4")
    ]
    rows.append(rows[1] | {"end": ""})
    found = load_corpus("table", write_csv(tmp_path / "t.csv", rows))["train"]
    processor, whole = build_processor(llm_folder()), load_video(tmp_path / "talk.mp4", 100)
    for row, start, end in zip(found, (0.0, 0.4, 0.4), (0.8, 0.8, 1.0), strict=True):
        seen = load_row_media(processor, "video", row["video"]).video
        assert len(seen.frames) == processor.num_frames and seen.duration == pytest.approx(end - start, abs=0.1)
        assert 0 <= seen.times[0] < seen.times[-1] < end - start
        places = [int(np.abs(whole.times - start - time).argmin()) for time in seen.times]
        assert np.array_equal(seen.frames, whole.frames[places])
    with pytest.raises(processor.media_error, match="no pictures after 7 seconds"):
        load_row_media(processor, "video", str(tmp_path / "talk.mp4#t=7"))


def test_the_parts_of_a_video_are_decoded_together(tmp_path, llm_folder, monkeypatch):
    write_clip(tmp_path / "talk.mp4")
    processor, talk = build_processor(llm_folder()), tmp_path / "talk.mp4"
    parts = [f"{talk}#t={start},{end}" for start, end in ((0.6, 0.9), (0, 0.3), (0.1, 0.9), (8, 9))]
    alone = {name: load_row_media(processor, "video", name).video for name in parts[:-1]}
    whole, together = _by_file(("vision", name, 1.0) for name in (str(talk), *parts))
    assert whole == [("vision", str(talk), 1.0)]
    opened = []
    monkeypatch.setattr(Recording, "__iter__", lambda self, read=Recording.__iter__: opened.append(1) or read(self))
    names = [name for _, name, _ in together]
    found = dict(zip(names, load_together(processor, "video", names), strict=True))
    assert len(opened) == 1 and "no pictures after 8 seconds" in str(found.pop(parts[-1]))
    assert found.keys() == alone.keys()
    assert all(np.array_equal(found[name].video.frames, alone[name].frames) for name in alone)


# --- tasks and balance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "low", "high", "step"),
    [
        (["-2.8", "3.1", "0.05"], -2.8, 3.1, 0.1),
        (["0", "1", "10"], 0.0, 10.0, 1.0),
        (["0.5", "99"], 0.0, 100.0, 2.0),
        (["0.3", "0.9"], 0.3, 0.9, 0.1),
        (["36.6", "40.1"], 36.6, 40.1, 0.1),  # 36.6 is 36.599998 in float32
        (["1999.9996", "2001.5"], 1999.9, 2001.5, 0.1),
    ],
)
@pytest.mark.parametrize("column", ["score", "label"])
def test_numbers_make_a_score_task_with_the_range_seen(column, values, low, high, step, tmp_path, caplog):
    caplog.set_level("INFO")
    rows = [(f"text {number}", value) for number, value in enumerate(values)]
    corpus = load_corpus("table", write_words(tmp_path, rows, f"text {column}"))
    (task,) = infer_tasks(corpus)
    for split, part in corpus.items():
        check_labels(split, part, task)
    assert (task.name, task.kind, task.low, task.high, task.step) == ("table", "regression", low, high, step)
    assert "task table: scores from" in caplog.text and len(task.answers) <= 61


def test_classes_with_an_underscore_are_no_numbers(tmp_path, caplog):
    """Python reads 18_25 as 1825."""
    rows = [("yes", "18_25"), ("no", "26_40")]
    (task,) = infer_tasks(load_corpus("table", write_words(tmp_path, rows, "text label")))
    assert (task.kind, task.labels) == ("classification", ("18_25", "26_40"))
    assert "numbers" not in caplog.text


def test_a_table_in_chinese_is_asked_in_chinese(tmp_path):
    rows = [("好", "喜悦", "zh-CN"), ("不", "愤怒", "")]
    for more, language in (([], "zh"), ([("no", "愤怒", "en")], "en")):
        (task,) = infer_tasks(load_corpus("table", write_words(tmp_path, rows + more, "text label language")))
        assert task.language == language and ("情绪" in task.prompt) == (language == "zh")


def test_labels_and_scores_make_two_tasks(tmp_path):
    file = write_words(tmp_path, [("yes", "calm", "0.1"), ("no", "tense", "0.9")], "text label score")
    corpus = load_corpus("table", file)
    first, second = infer_tasks(corpus)
    assert (first.name, first.labels, second.name) == ("table", ("calm", "tense"), "table_score")
    with pytest.raises(ValueError, match="label: got 'calm' in every row, wanted two or more"):
        infer_tasks(load_corpus("table", write_words(tmp_path, [("yes", "calm"), ("no", "calm")], "text label")))
    with pytest.raises(ValueError, match=r"label: got '3,5', wanted a decimal point \(3.5\), or `tasks`"):
        infer_tasks(load_corpus("table", write_words(tmp_path, [("yes", "3,5"), ("no", "2")], "text label")))
    with pytest.raises(ValueError, match="score: got 2 in every row, wanted two or more different scores"):
        infer_tasks(load_corpus("table", write_words(tmp_path, [("yes", "2"), ("no", "2")], "text score")))
    with pytest.raises(ValueError, match="score: got scores from 0.01 to 0.05, wanted a range of at least 0.2"):
        infer_tasks(load_corpus("table", write_words(tmp_path, [("yes", "0.01"), ("no", "0.05")], "text score")))


def test_a_recipe_defines_tasks_and_records_them(tmp_path):
    stress = {"name": "stress", "labels": ["calm", "tense"], "prompt": "Calm or tense?", "cue": "Answer:"}
    for words in ([json.dumps(stress), "mosei"], [json.dumps([stress, "mosei"])]):
        recipe = load_recipe([str(ROOT / "recipes/own_clips.yaml"), "--tasks", *words])
        assert recipe.data.tasks == ["stress", "mosei"]
    assert recipe.record()["task_definitions"]["stress"] == stress | {"kind": "classification", "language": "en"}
    for wrong, message in (
        ({"labels": ["a", "b"]}, "tasks: got .*, wanted a `name` in it"),
        (stress | {"name": "meld"}, "tasks: got 'meld' again"),
        (stress | {"labels": ["calm"]}, "Task 'stress': wanted two or more different `labels`"),
        ({"name": "pain", "low": 0.0, "high": 10.0}, "Task 'pain': wanted `low` < `high`"),
        (stress | {"colour": "red"}, "Task 'stress': .*colour"),
    ):
        with pytest.raises(ValueError, match=message):
            load_recipe([str(ROOT / "recipes/own_clips.yaml"), "--tasks", json.dumps(wrong)])


def test_balanced_classes_are_drawn_equally_often(tmp_path, processor):
    rows = [(f"text {number}", "rare" if number < 3 else "common", "train") for number in range(30)]
    corpus = load_corpus("table", write_words(tmp_path, rows, "text label split"))
    data = load_recipe([str(ROOT / "recipes/own_clips.yaml")]).data
    data.define(infer_tasks(corpus))
    processor.tasks["table"] = infer_tasks(corpus)[0]
    try:
        plain, none = mix_rows(data.parts, [corpus], processor, balanced=False)
        mixed, mixture = mix_rows(data.parts, [corpus], processor, balanced=True)
    finally:
        del processor.tasks["table"]
    assert none is None and sorted(plain["text"]) == sorted(mixed["text"])
    labels, drawn = mixed["emotion"][:], list(MixtureSampler(*mixture, seed=0))
    assert len(drawn) == 30 and Counter(labels[place] for place in drawn) == {"rare": 15, "common": 15}


# --- the same as the built-in corpora --------------------------------------------------------------------------------


def meld_table(folder: Path, file: Path) -> Path:
    """MELD's CSV files as one table."""
    frames = []
    for split, name in MELD_FILE_OF.items():
        frame = pd.read_csv(folder / name, dtype=str, keep_default_na=False)
        numbers = frame[["Dialogue_ID", "Utterance_ID"]].astype(int)
        frame = frame.loc[numbers.sort_values(["Dialogue_ID", "Utterance_ID"]).index]
        names = {"Utterance": "text", "Speaker": "speaker", "Emotion": "label", "Dialogue_ID": "dialogue"}
        table = frame.rename(columns=names)[[*names.values()]].assign(split=split, language="en")
        frames.append(table.assign(id=f"{split}_dia" + frame["Dialogue_ID"] + "_utt" + frame["Utterance_ID"]))
    pd.concat(frames).to_csv(file, index=False)
    return file


def ravdess_table(folder: Path, file: Path, **options) -> Path:
    rows = []
    for split, part in load_corpus("ravdess", folder, **options).items():
        for row in part:
            own = {name: row[name] for name in ("id", "text", "language")}
            rows.append(own | {"file": Path(row["audio"]).name, "label": row["emotion"], "split": split})
    return write_csv(file, rows)


@pytest.mark.parametrize("find", [write_meld, lambda _: published("meld")], ids=["small", "published"])
def test_meld_as_a_table_has_the_same_rows(tmp_path, find):
    folder = find(tmp_path)
    table = load_corpus("table", meld_table(folder, tmp_path / "t.csv"), context=3)
    for split, rows in load_corpus("meld", folder, context=3).items():
        assert table[split].to_list() == rows.to_list()


def small_ravdess(folder: Path) -> None:
    write_sounds(folder, [f"03-01-{code:02}-01-01-01-{actor:02}.wav" for code in (1, 5) for actor in range(1, 25)])


def published_ravdess(folder: Path) -> None:
    for clip in published("ravdess").glob("*.flac"):
        (folder / clip.name).symlink_to(clip)


@pytest.mark.parametrize("find", [small_ravdess, published_ravdess], ids=["small", "published"])
def test_ravdess_as_a_table_has_the_same_rows(tmp_path, find):
    find(tmp_path)
    table = load_corpus("table", ravdess_table(tmp_path, tmp_path / "t.csv", fold=2))
    for split, rows in load_corpus("ravdess", tmp_path, fold=2).items():
        assert table[split].to_list() == rows.to_list()
        ids, speakers = rows["id"][:], [str(int(row_id[-2:])) for row_id in rows["id"]]
        assert clusters_of("table", ids, speakers)[1] == [speaker for speaker in speakers]


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    save_whisper(folder, whisper().get_encoder())
    return folder


def small(tower: Path) -> list:
    """Overrides that make `own_clips.yaml` small."""
    fields = {"language_model": "tiny-random", "audio_tower": tower, "audio_window": 0, "bf16": "false"}
    fields |= {"fusion_hidden_size": 16, "fusion_intermediate_size": 32, "num_pseudo_tokens": 2}
    fields |= {"fusion_epochs": 1, "num_train_epochs": 1, "per_device_train_batch_size": 4, "logging_steps": 1}
    return [word for name, value in fields.items() for word in (f"--{name}", value)]


@pytest.mark.slow
def test_a_table_without_validation_rows_trains_a_model_that_hears_its_experts(tower, tmp_path):
    """Speakers are mixed, so those of the training rows must be known, and those of the test rows need not."""
    names = [f"{number}.wav" for number in range(8)]
    write_sounds(tmp_path, names)
    rows = [{"file": name, "label": "ab"[place % 2]} for place, name in enumerate(names)]
    parts = [{"speaker": "Ann", "split": "train"}] * 3 + [{"speaker": "Bob", "split": "train"}] * 3
    parts += [{"speaker": "", "split": "test"}] * 2
    table = write_csv(tmp_path / "t.csv", [row | part for row, part in zip(rows, parts, strict=True)])
    fields = ["--corpus_dir", table, "--output_dir", tmp_path / "run", "--speaker_mixing", 1.0]
    fields += ["--temperature", 2.5]  # the gain is 1 without validation rows
    said = run("train", "recipes/own_clips.yaml", *small(tower), *fields).said
    assert "no validation rows: expert_gain and temperature are not fitted" in said
    assert load_file(tmp_path / "run/model/model.safetensors")["model.readout.gain"].item() == 1.0
    assert EGMFProcessor.from_pretrained(tmp_path / "run/model").temperatures == {"table": 2.5}
    assert "no training row has words" in said  # and a user's words would be ignored
    assert EGMFProcessor.from_pretrained(tmp_path / "run/model").trained_modalities == ["audio", "vision"]


def test_a_table_without_sound_can_be_corrected(tower, tmp_path):
    """The recipe wants statistics of the sound; nothing was trained on the first table."""
    names = [f"{number}.wav" for number in range(8)]
    write_sounds(tmp_path, names)
    rows = [{"file": "", "text": name, "label": "ab"[place % 2]} for place, name in enumerate(names)]
    fields = [*small(tower), "--corpus_dir", tmp_path / "t.csv", "--output_dir", tmp_path / "run"]
    for more in (["--dry_run"], []):
        write_csv(tmp_path / "t.csv", rows)
        outcome = run("train", "recipes/own_clips.yaml", *fields, *more, check=False)
        assert outcome.status == 2
        assert "clip_statistics: got audio, of which no row has a clip, wanted one with audio in a" in outcome.said
    run("train", "recipes/own_clips.yaml", *fields, "--modalities", "text", "--dry_run")
    write_csv(tmp_path / "t.csv", [row | {"file": row["text"]} for row in rows])
    run("train", "recipes/own_clips.yaml", *fields)
    assert (tmp_path / "run/model/model.safetensors").is_file()


# --- the section of the README ---------------------------------------------------------------------------------------


def section() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8").split("## Train on your own clips\n")[1].split("\n## ")[0]


@pytest.mark.slow
def test_the_section_of_the_readme_runs_as_printed(tower, tmp_path):
    table = section().split("```csv\n")[1].split("```")[0]
    assert len(table.splitlines()) == 6
    (tmp_path / "clips.csv").write_text(table)
    write_sounds(tmp_path, [*(row["file"] for row in csv.DictReader(table.splitlines())), "new_clip.wav"])
    lines = [line for line in section().split("```bash\n")[1].splitlines() if line.startswith("python ")]
    assert [line.split()[1] for line in lines] == ["train.py", "train.py", "eval.py", "predict.py"]
    new = {f"new_{number}.wav": speaker for number, speaker in enumerate(["Ann", "Bob", "Cid", "Dan"])}
    write_sounds(tmp_path, new)
    said = []
    for line in lines:
        script, *arguments = next(csv.reader([line.removeprefix("python ")], delimiter=" "))
        if script == "eval.py":  # the table has grown; its splits, drawn anew, would be others
            more = "".join(f"{name},Well,calm,{speaker}\n" for name, speaker in new.items())
            (tmp_path / "clips.csv").write_text(table + more)
        arguments = [word.replace("runs/own_clips", str(tmp_path / "run")) for word in arguments]
        arguments = [str(tmp_path / word) if word in ("clips.csv", "new_clip.wav") else word for word in arguments]
        if script == "train.py":
            arguments += [str(word) for word in (*small(tower), "--output_dir", tmp_path / "run")]
        said.append(run(script.removesuffix(".py"), *arguments).said)
        if len(said) == 1:
            assert not (tmp_path / "run").exists(), "a dry run writes nothing"
    plan, training, evaluation, answer = said
    assert "1 validation rows of table: expert_gain and temperature are not fitted" in training
    for words in ("train: ", "speakers", "labels: ", "learned", "pseudo tokens", "parameters", "memory of a step"):
        assert words in plan
    assert "table / test: " in evaluation
    splits = {key.split()[0]: split for key, split in read_splits(tmp_path / "run/splits.csv").items()}
    evaluated = {row["id"] for row in read_lines(tmp_path / "run/test/predictions.jsonl")}
    assert evaluated & splits.keys() == {row_id for row_id, split in splits.items() if split == "test"}
    assert len(evaluated - splits.keys()) == len(new)
    answer = json.loads(answer.strip().splitlines()[-1])
    assert answer["label"] in ("calm", "tense") and sum(answer["probabilities"].values()) == pytest.approx(1)
    recorded = yaml.safe_load((tmp_path / "run/model/recipe.json").read_text())
    assert recorded["task_definitions"]["table"]["labels"] == ["calm", "tense"]
    assert len(read_splits(tmp_path / "run/splits.csv")) == 5


def test_a_dry_run_shows_what_the_model_reads_and_learns(tmp_path, processor):
    file = write_words(tmp_path, [("hello", "joy", "Ann", "1"), ("so what", "anger", "Bob", "1")])
    rows = [
        row for part in load_corpus("table", file).values() for row in expand_by_task(part, [processor.tasks["meld"]])
    ]
    row = next(row for row in rows if row["text"] == "so what")
    lines = describe_prompt(row, AffectCollator(processor, [processor.tasks["meld"]], ["text", "audio"], True))
    assert "Ann: hello\\n" in lines[0] and "Bob: so what\\nEmotion: anger" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["read", "pseudo", "read", "utterance", "read", "learned"]
    assert lines[-1].endswith("|a|n|g|e|r|<|endoftext|>") and lines[2].split()[2] == "3"
