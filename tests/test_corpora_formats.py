"""Small generated files in the benchmarks' published forms: each reader returns exactly what was written, or fails.

`tests/formats.py` describes the files and their faults.
"""

import json
import logging

import numpy as np
import pytest
from formats import clip_table, cmu_mosei, lfmim, mmsa_pickle, mse_pickles, same_rows

from corpora import cherma, load_corpus, meld, mosei, simsv2
from corpora.schema import FEATURES
from egmf.tasks_egmf import BUILTIN_TASKS


def check(splits, expected) -> None:
    assert list(splits) == ["train", "validation", "test"]
    for split, rows in expected.items():
        assert splits[split].features == FEATURES
        same_rows(splits[split], rows)


# --- MMSA's pickles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(6))
def test_mosei_unaligned(tmp_path, protocol):
    file = tmp_path / "unaligned_50.pkl"
    expected = mmsa_pickle(file, protocol=protocol, arrays=protocol % 2 == 0)
    check(load_corpus("mosei", file), expected)


def test_mosei_unaligned_faults_are_counted(tmp_path, caplog):
    mmsa_pickle(tmp_path / "unaligned_50.pkl", frames=(2, 2))
    with caplog.at_level(logging.WARNING, logger="corpora.mosei"):
        splits = load_corpus("mosei", tmp_path / "unaligned_50.pkl")
    log = caplog.text
    assert "train: duplicate id, number added: 1 (first: train$_$0000)" in log
    assert "train: audio_features: none: 1 (first: train$_$0001)" in log
    assert "audio_features: -inf set to 0" in log and "vision_features: NaN set to 0" in log
    for split in splits.values():
        for row in split:
            for column in ("audio_features", "vision_features"):
                assert row[column] is None or np.isfinite(row[column]).all()


def test_mosei_large_arrays_stay_in_the_file_and_read_the_same(tmp_path, monkeypatch):
    """Large arrays of any type and protocol are read in several slices."""
    for protocol, types in ((2, ("float32", "float64")), (4, (">f8", "float32"))):
        monkeypatch.setattr("corpora.mmsa._CHUNK", 500_000)
        file = tmp_path / f"{protocol}.pkl"
        expected = mmsa_pickle(file, (60, 3, 4), frames=(50, 60), protocol=protocol, types=types)
        assert file.stat().st_size > 2 << 20
        check(load_corpus("mosei", file), expected)


def test_mosei_aligned(tmp_path):
    expected = mmsa_pickle(tmp_path / "aligned_50.pkl", frames=(9, 9), aligned=True)
    splits = load_corpus("mosei", tmp_path / "aligned_50.pkl")
    check(splits, expected)
    assert splits["train"][2]["audio_features"] is None and splits["train"][0]["audio_times"] is None


@pytest.mark.parametrize("version, widths", [(1, (33, 709)), (2, (25, 177))])
def test_sims_pickle(tmp_path, version, widths):
    expected = mmsa_pickle(
        tmp_path / "ch-simsv2s.pkl", language="zh", widths=widths, high=1.0, rates=None, types=("float64", "float64")
    )
    check(load_corpus("simsv2", tmp_path / "ch-simsv2s.pkl", version=version), expected)


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"regression_labels": np.full(3, 3.5)}, "train.*'regression_labels': got 3.5, wanted a score from -3 to 3"),
        ({"regression_labels": ["a", "b", "c"]}, "got 'a', wanted a score"),
        ({"regression_labels": np.zeros(2)}, "columns of different lengths .*audio 3.*regression_labels 2"),
        ({"raw_text": ["a"]}, "raw_text 1, id 3"),
        ({"audio": np.zeros((3, 74))}, r"column 'audio': got float64 of shape \(3, 74\)"),
        ({"audio": [np.zeros((2, 74)), np.zeros((3, 74)), np.zeros((1, 74))]}, "column 'audio': got list"),
        ({"vision": np.array([[["a"]]] * 3)}, "column 'vision': got <U1"),
        ({"audio_lengths": [1, 2, 2.5]}, "'audio_lengths': got 2.5, wanted a number of frames"),
        ({"audio_lengths": [1, 2, "x"]}, "'audio_lengths': got 'x'"),
        ({"vision_lengths": np.array([1, np.nan, 2])}, "'vision_lengths': got nan"),
        ({"id": None}, "column 'id': got NoneType"),
    ],
)
def test_mmsa_pickle_faults(tmp_path, columns, message):
    file = tmp_path / "unaligned_50.pkl"
    mmsa_pickle(file, (3, 3, 3), **columns)
    with pytest.raises(ValueError, match=message) as error:
        load_corpus("mosei", file)
    assert str(file) in str(error.value)


def test_aligned_modalities_have_the_same_frames(tmp_path):
    mmsa_pickle(tmp_path / "a.pkl", (3, 3, 3), frames=(9, 9), aligned=True, vision=np.ones((3, 8, 35)))
    with pytest.raises(ValueError, match="train: got audio 9, vision 8 frames and no 'audio_lengths'"):
        load_corpus("mosei", tmp_path / "a.pkl")


def test_mmsa_pickle_without_labels_or_texts(tmp_path, caplog):
    file = tmp_path / "unaligned_50.pkl"
    labels, texts = np.array([[1.0], [np.nan], [-1.0]]), ["a", "b", None]
    mmsa_pickle(file, (3, 3, 3), regression_labels=labels, raw_text=texts, audio_lengths=[99, 2, -1])
    splits = load_corpus("mosei", file)
    assert splits["test"]["sentiment"][:] == [1.0, -1.0] and splits["test"]["text"][:] == ["a", None]
    assert len(splits["test"][0]["audio_features"]) == 12 and splits["test"][1]["audio_features"] is None
    assert "test: row left out: no label: 1 (first: test$_$0001)" in caplog.text
    assert "length exceeds the number of frames: 1 (first: test$_$0000)" in caplog.text


def test_scores_of_mosei_do_not_pass_as_those_of_sims(tmp_path):
    mmsa_pickle(tmp_path / "unaligned_50.pkl")
    with pytest.raises(ValueError, match="wanted a score from -1 to 1"):
        load_corpus("simsv2", tmp_path / "unaligned_50.pkl")


def test_other_pickles_are_named(tmp_path):
    mse_pickles(tmp_path, "meld", meld.EMOTIONS, "en")
    with pytest.raises(ValueError, match="meld_train.pkl: got list, wanted a dict of train, valid, test"):
        load_corpus("mosei", tmp_path / "meld_train.pkl")
    with pytest.raises(FileNotFoundError, match="nowhere.pkl"):
        load_corpus("mosei", tmp_path / "nowhere.pkl")


# --- MSE-Adapter's pickles -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lists, protocol", [(False, 2), (False, 4), (True, 3)])
def test_meld_of_mse_adapter(tmp_path, lists, protocol):
    expected = mse_pickles(tmp_path, "meld", meld.EMOTIONS, "en", lists=lists, protocol=protocol)
    check(load_corpus("meld", tmp_path), expected)


def test_cherma_of_mse_adapter(tmp_path):
    """With the published shapes, the arrays stay in the file."""
    expected = mse_pickles(
        tmp_path, "cherma", cherma.EMOTIONS, "zh", frames=(543, 16), widths=(1024, 2048), sizes=(7, 2, 2)
    )
    check(load_corpus("cherma", tmp_path), expected)


def test_labels_of_meld_do_not_reach_cherma(tmp_path):
    mse_pickles(tmp_path, "cherma", meld.EMOTIONS, "en")
    with pytest.raises(ValueError, match="cherma_train.pkl: item 0: 'label': got 'neutral', wanted one of 愤怒"):
        load_corpus("cherma", tmp_path)


@pytest.mark.parametrize(
    "item, message",
    [
        ({"label": "bored"}, "item 0: 'label': got 'bored', wanted one of neutral"),
        ({"text": ["It", "is"]}, "'text': got list, wanted a string"),
        ({"audio": [[1.0, 2.0], [3.0]]}, "'audio': got rows of different lengths"),
        ({"audio": np.zeros(64)}, r"'audio': got float64 of shape \(64,\)"),
        ({"audio": [["a"]]}, "'audio': got <U1"),
        ({"audio": np.zeros((11, 63))}, "item 1: 'audio': got 64 features, wanted 63 as before"),
        ({"audio_len": 1.5}, "'audio_len': got 1.5, wanted a number of frames"),
    ],
)
def test_mse_adapter_faults(tmp_path, item, message):
    mse_pickles(tmp_path, "meld", meld.EMOTIONS, "en", **item)
    with pytest.raises(ValueError, match=message) as error:
        load_corpus("meld", tmp_path)
    assert "meld_train.pkl" in str(error.value)


def test_one_form_at_a_time(tmp_path):
    mse_pickles(tmp_path, "meld", meld.EMOTIONS, "en")
    with pytest.raises(ValueError, match="media: got 'anywhere', wanted None"):
        load_corpus("meld", tmp_path, media="anywhere")
    (tmp_path / "dev_sent_emo.csv").touch()
    with pytest.raises(ValueError, match="CSV files and pickles of MELD"):
        load_corpus("meld", tmp_path)
    (tmp_path / "dev_sent_emo.csv").unlink()
    (tmp_path / "meld_valid.pkl").unlink()
    with pytest.raises(FileNotFoundError, match="meld_valid.pkl: no such file"):
        load_corpus("meld", tmp_path)


# --- LFMIM's files ---------------------------------------------------------------------------------------------------


def test_cherma_of_lfmim(tmp_path, caplog):
    expected = lfmim(tmp_path, cherma.EMOTIONS)
    check(load_corpus("cherma", tmp_path), expected)
    assert "test: duplicate id, number added: 1 (first: shared_0000)" in caplog.text
    assert "train: audio_features: no file: 1 (first: train_0002)" in caplog.text
    assert "validation: vision_features: unreadable file (ValueError): 1 (first: dev_0003)" in caplog.text
    assert "test: vision_features: NaN set to 0: 4 in 1 rows (first: test_0001)" in caplog.text


def test_cherma_of_lfmim_without_validation(tmp_path):
    """Validation is the same part of train every time, and its features are read from the folder of train."""
    expected = lfmim(tmp_path, cherma.EMOTIONS, {"train": 30, "test": 4})
    splits = load_corpus("cherma", tmp_path)
    assert [len(split) for split in splits.values()] == [27, 3, 4]
    rows = {row["id"]: row for row in expected["train"]}
    for split in ("train", "validation"):
        same_rows(splits[split], [rows[row_id] for row_id in splits[split]["id"]])
    assert load_corpus("cherma", tmp_path)["validation"]["id"][:] == splits["validation"]["id"][:]


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"audio_file": "a.wav", "video_label": "joy"}, "item 0: 'video_label': got 'joy', wanted one of 愤怒"),
        ({"audio_file": "a.wav"}, "item 0: got .* wanted a dict with 'audio_file' and 'video_label'"),
        ({"audio_file": "../../a.wav", "video_label": "高兴"}, "'audio_file': got '../../a.wav'"),
        ("a.wav", "item 0: got 'a.wav'"),
    ],
)
def test_cherma_of_lfmim_faults(tmp_path, entry, message):
    lfmim(tmp_path, cherma.EMOTIONS)
    (tmp_path / "test.json").write_text(json.dumps([entry]), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        load_corpus("cherma", tmp_path)
    assert "test.json" in str(error.value)


def test_npy_files_are_no_pickles(tmp_path, caplog):
    """A npy file with objects is a pickle and is not read; a false header does not allocate terabytes."""
    lfmim(tmp_path, cherma.EMOTIONS)
    np.save(tmp_path / "audio/train/train_0004.npy", np.array([{"a": 1}, None]), allow_pickle=True)
    file = tmp_path / "audio/train/train_0005.npy"
    header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 1024)}
    with file.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
    rows = load_corpus("cherma", tmp_path)["train"]
    assert [rows[index]["audio_features"] for index in (4, 5)] == [None, None]
    assert "audio_features: unreadable file (ValueError): 2 (first: train_0004, train_0005)" in caplog.text


def test_cherma_files_are_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither train.json nor cherma_train.pkl"):
        load_corpus("cherma", tmp_path)
    lfmim(tmp_path, cherma.EMOTIONS)
    (tmp_path / "test.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="test.json: got no readable JSON"):
        load_corpus("cherma", tmp_path)
    (tmp_path / "test.json").unlink()
    with pytest.raises(FileNotFoundError, match="test.json: no such file"):
        load_corpus("cherma", tmp_path)


# --- tables and clips ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["meta.csv", "meta(s).csv", "label.csv"])
def test_sims_clips(tmp_path, table, caplog):
    expected = clip_table(tmp_path, table, "zh")
    check(load_corpus("simsv2", tmp_path), expected)
    assert "train: clip: none: 1 (first: 0007$_$0010)" in caplog.text
    assert "train: row left out: no label: 1 (first: 0007$_$0003)" in caplog.text
    assert "row left out: mode 'unlabelled' is none of train, valid, test: 1" in caplog.text


def test_mosei_clips(tmp_path):
    expected = clip_table(tmp_path, "label.csv", "en")
    check(load_corpus("mosei", tmp_path), expected)


def test_mosei_clips_of_cmu(tmp_path, caplog):
    expected = cmu_mosei(tmp_path)
    check(load_corpus("mosei", tmp_path), expected)
    assert "transcript that is not UTF-8, read as cp1252: 1 (first: x-9.txt)" in caplog.text
    assert "transcript line that is not a segment: 1 (first: 0007.txt:5)" in caplog.text
    assert "validation: text: not in the transcripts, taken from label.csv: 2" in caplog.text
    assert "test: text: the transcript differs from label.csv: 1 (first: x-9$_$0001)" in caplog.text


def test_clips_of_a_table_without_leading_zeros(tmp_path):
    """Spreadsheets remove leading zeros; if two clips match the same number, neither is used."""
    clips = [("7", "1", "0.5", "train"), ("7", "2", "0.5", "valid"), ("7", "3", "0.5", "test")]
    clip_table(tmp_path, "meta.csv", "zh", clips=clips)
    folder = tmp_path / "Raw" / "7"
    (folder / "1.mp4").rename(folder / "0001.mp4")
    (folder / "2.mp4").rename(folder / "0002.mp4")
    (folder / "02.mp4").touch()
    splits = load_corpus("simsv2", tmp_path)
    assert [split[0]["video"] for split in splits.values()] == [
        str(folder / "0001.mp4"),
        None,
        str(folder / "3.mp4"),
    ]


def test_ids_do_not_lead_out_of_the_folder(tmp_path):
    (tmp_path / "secret.mp4").touch()
    (tmp_path / "sims").mkdir()
    clips = [("..", "secret", "0.5", mode) for mode in ("train", "valid", "test")]
    clip_table(tmp_path / "sims", "meta.csv", "zh", clips=clips)
    assert load_corpus("simsv2", tmp_path / "sims")["test"][0]["video"] is None


@pytest.mark.parametrize(
    "clips, message",
    [
        ([("a", "1", "1.1", "train")], "row 1, column 'label': got 1.1, wanted a score from -1 to 1"),
        ([("a", "1", "0.1", "train"), ("a", "2", "x", "train")], "row 2, column 'label': got 'x'"),
    ],
)
def test_table_faults(tmp_path, clips, message):
    clip_table(tmp_path, "meta.csv", "zh")
    lines = [
        "video_id,clip_id,text,label,mode",
        *(f"{video},{clip},a,{label},{mode}" for video, clip, label, mode in clips),
    ]
    (tmp_path / "meta.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message) as error:
        load_corpus("simsv2", tmp_path)
    assert "meta.csv" in str(error.value)


def test_unreadable_tables(tmp_path):
    with pytest.raises(FileNotFoundError, match="none of meta.csv, meta.s..csv, label.csv"):
        load_corpus("simsv2", tmp_path)
    mmsa_pickle(tmp_path / "unaligned_50.pkl")
    with pytest.raises(FileNotFoundError, match="features of unaligned_50.pkl are read if you name that file"):
        load_corpus("mosei", tmp_path)
    (tmp_path / "meta.csv").write_text("video_id,clip_id,text,label\n")
    with pytest.raises(FileNotFoundError, match="Raw: no such folder"):
        load_corpus("simsv2", tmp_path)
    (tmp_path / "Raw").mkdir()
    with pytest.raises(ValueError, match="meta.csv: column 'mode' is missing"):
        load_corpus("simsv2", tmp_path)
    (tmp_path / "meta.csv").write_bytes("video_id,文本\n".encode("gb18030"))
    with pytest.raises(ValueError, match="meta.csv: got another encoding, wanted UTF-8"):
        load_corpus("simsv2", tmp_path)
    with pytest.raises(ValueError, match="version: got 3, wanted one of 1, 2"):
        load_corpus("simsv2", tmp_path, version=3)


def test_ranges_are_those_of_the_tasks():
    tasks = [BUILTIN_TASKS[name] for name in ("mosei", "simsv2")]
    assert [mosei.SCORES, simsv2.SCORES] == [(task.low, task.high) for task in tasks]
