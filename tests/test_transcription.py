"""Recognised words: every kind of model, the cache, and the pipeline and predict.py that use them."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from clips import write_clip
from models import build_processor, save_model_with_towers
from recognizers import build_ctc, build_whisper
from transformers import pipeline

import predict
from corpora.__main__ import main
from corpora.words import add_words
from egmf.commands import is_mistake
from egmf.media_egmf import MediaError
from egmf.transcription_egmf import Transcriber


RATE = 16000


@pytest.fixture(scope="module")
def place(tmp_path_factory, llm_folder, assemble) -> Path:
    """A folder with a model with towers, one that reads only words, three recognisers, and recordings."""
    folder = tmp_path_factory.mktemp("place")
    save_model_with_towers(folder, llm_folder(), assemble)
    words = build_processor(llm_folder())
    words.feature_extractor = words.image_processor = None
    words.default_task = "meld"
    assemble(audio_feature_size=None, vision_feature_size=None).save_pretrained(folder / "words")
    words.save_pretrained(folder / "words")
    build_whisper(folder / "whisper")
    build_whisper(folder / "english", is_multilingual=False)
    build_ctc(folder / "ctc")
    rng = np.random.default_rng(0)
    sound = (0.3 * np.sin(np.arange(40 * RATE) / 9) + 0.05 * rng.normal(size=40 * RATE)).astype(np.float32)
    sound[10 * RATE : 11 * RATE] = 0
    soundfile.write(folder / "long.wav", sound.clip(-1, 1), RATE)
    soundfile.write(folder / "short.wav", sound[: RATE // 2], RATE)
    soundfile.write(folder / "silent.wav", np.zeros(3 * RATE), RATE)
    write_clip(folder / "mute.mp4", 0.4, sound=False)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))


@pytest.fixture
def transcribe(place, tmp_path):
    return lambda model, language=None: Transcriber(place / model, language, cache=tmp_path / "cache")


@pytest.mark.parametrize("model", ["whisper", "english", "ctc"])
def test_a_long_recording_becomes_segments(place, transcribe, model):
    seen = []
    found = transcribe(model)(place / "long.wav", seen.append)
    assert found["recognized_by"] == str(place / model) and found["language"] in ("german", "english", None)
    assert (found["language"] is not None) == (model == "whisper")
    starts, ends = zip(*(chunk["timestamp"] for chunk in found["chunks"]), strict=True)
    assert found["text"] == " ".join(chunk["text"] for chunk in found["chunks"]) != ""
    assert all(0 <= start < end <= 40 for start, end in zip(starts, ends, strict=True))
    assert max(ends) > 29 and seen[-1] == 40  # more than Whisper hears at once
    samples, rate = soundfile.read(place / "long.wav", dtype="float32")
    by_array = transcribe(model)({"array": np.stack([samples, samples]), "sampling_rate": rate})
    assert by_array["text"] == found["text"]
    assert transcribe(model)((place / "long.wav").read_bytes()) == found


def test_the_same_file_is_recognised_once(place, transcribe, tmp_path, monkeypatch):
    first = transcribe("whisper")(place / "long.wav")
    shutil.copy(place / "long.wav", tmp_path / "copy.wav")
    again = transcribe("whisper")
    monkeypatch.setattr(Transcriber, "_recognize", lambda *_: pytest.fail("not in the cache"))
    assert again(tmp_path / "copy.wav") == first
    with pytest.raises(pytest.fail.Exception):
        transcribe("english")(place / "long.wav")
    with pytest.raises(pytest.fail.Exception):
        transcribe("whisper", "de")(place / "long.wav")
    monkeypatch.undo()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".json"]


def test_a_transcript_that_cannot_be_kept_is_returned(place, tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    found = Transcriber(place / "whisper", "en", cache=tmp_path / "file" / "cache")(place / "short.wav")
    assert found["text"] and "cache: the transcript is not kept: " in caplog.text


def test_the_language_is_set_or_detected(place, transcribe):
    assert transcribe("whisper", "en")(place / "short.wav")["language"] == "english"
    assert transcribe("whisper", "German")(place / "short.wav")["language"] == "german"
    for model, language, message in [
        ("whisper", "fr", "language: got 'fr' for .*, wanted one of de, en"),
        ("english", "de", "language: got 'de' for .*, wanted no language: this model cannot be told one"),
        ("ctc", "en", "language: got 'en' for .*, wanted no language"),
        ("model", None, "transcriber: got .*, wanted a speech recognition model"),
        ("gone", None, "transcriber: got .*, wanted a speech recognition model"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            transcribe(model, language)(place / "short.wav")
        assert is_mistake(error.value) and len(str(error.value).splitlines()) == 1


def test_what_has_no_words(place, transcribe):
    empty = transcribe("whisper")(place / "silent.wav")
    assert empty["text"] == "" and empty["chunks"] == [] and empty["language"] is None
    for name, kind in (("mute.mp4", "no audio"), ("gone.wav", "not readable"), ("broken.mp4", "not media")):
        with pytest.raises(MediaError) as raised:
            transcribe("whisper")(place / name)
        assert raised.value.kind == kind


def test_the_pipeline_recognises_the_words_of_samples_without(place, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = {"transcriber": str(place / "whisper"), "language": "en"}
    recognize = pipeline("affect-recognition", model=str(place / "model"), trust_remote_code=True, **options)
    short, long = str(place / "short.wav"), str(place / "long.wav")
    heard = recognize.processor.transcriber_class(place / "whisper", "en")(short)
    answers = recognize([short, {"file": short, "text": "no"}, str(place / "mute.mp4")])
    assert answers[0]["text"] == heard["text"] != "" and answers[0]["recognized_by"] == str(place / "whisper")
    wanted = recognize({"file": short, "text": heard["text"]})
    assert answers[0]["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-5)
    assert not {"text", "recognized_by"} & (answers[1].keys() | answers[2].keys() | wanted.keys())
    whole = recognize(long, return_timestamps=True)
    heard = recognize.processor.transcriber_class(place / "whisper", "en")(long)
    assert [chunk["text"] for chunk in whole["chunks"]] == [chunk["text"] for chunk in heard["chunks"]]
    assert [list(chunk["timestamp"]) for chunk in whole["chunks"]] == [one["timestamp"] for one in heard["chunks"]]
    assert all(one["recognized_by"] == str(place / "whisper") for one in [whole, *whole["chunks"]])
    silent = recognize(str(place / "silent.wav"), return_timestamps=True, window=None)
    assert [chunk["text"] for chunk in silent["chunks"]] == [None] * len(silent["chunks"]) and silent["label"]
    spans = [{"start": 1.0, "end": 2.0}, {"start": 3.0, "end": 4.0, "text": "so"}]
    first, second = recognize(long, return_timestamps=True, segments=spans)["chunks"]
    assert first["text"] and first["recognized_by"] and second["text"] == "so" and "recognized_by" not in second
    # Pictures have no sound.
    frames = np.zeros((4, 32, 48, 3), np.uint8)
    spans = [{"start": 0.0, "end": 0.2}, {"start": 0.2, "end": 0.4, "text": "so"}]
    mute = recognize(str(place / "mute.mp4"), return_timestamps=True, segments=spans)
    for answer in (recognize({"video": frames}), *mute["chunks"]):
        assert answer["label"] and "recognized_by" not in answer
    with pytest.raises(ValueError, match="window: got a value with a transcriber"):
        recognize(long, return_timestamps=True, window=1.0)
    with pytest.raises(ValueError, match="language: got 'de' without a transcriber's name"):
        recognize(short, language="de", transcriber=None)


def test_a_model_of_words_hears_with_a_transcriber(place):
    recognize = pipeline("affect-recognition", model=str(place / "words"), trust_remote_code=True)
    with pytest.raises(recognize.processor.media_error, match="takes neither sound nor pictures"):
        recognize(str(place / "short.wav"))
    options = {"transcriber": str(place / "whisper")}
    answer = recognize(str(place / "short.wav"), **options)
    assert answer["probabilities"] == pytest.approx(recognize({"text": answer["text"]})["probabilities"], abs=1e-6)
    whole = recognize(str(place / "long.wav"), return_timestamps=True, **options)
    assert len(whole["chunks"]) >= 2 and all(chunk["warnings"] == [] for chunk in whole["chunks"])
    silent = recognize(str(place / "silent.wav"), return_timestamps=True, on_error="report", **options)
    assert silent["error"] == "no segment could be answered" and silent["chunks"] == []
    spans = [{"start": 1.0, "end": 2.0}, {"start": 3.0, "end": 4.0, "text": "so"}]
    with pytest.raises(ValueError, match=r"segments\[0\]: got no text, wanted some: the model hears no sound"):
        recognize(str(place / "long.wav"), return_timestamps=True, segments=spans, **options)


def test_predict_marks_recognised_words(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert predict.main(["model", "short.wav", "long.wav", "mute.mp4", "--transcriber", "whisper"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    marked = [row for row in rows if row.get("recognized_by") == "whisper"]
    assert len(marked) == len(rows) - 1 and rows[-1]["file"] == "mute.mp4" and rows[1]["start"] > 0
    assert all(row["text"] for row in marked if "segments" not in row)
    with pytest.raises(ValueError, match="transcriber: got model, wanted a speech recognition model") as error:
        predict.main(["model", "short.wav", "--transcriber", "model"])
    assert is_mistake(error.value)


def test_a_table_gets_the_words_that_it_lacks(place, tmp_path, monkeypatch, capsys):
    for name in ("long.wav", "short.wav", "silent.wav"):
        shutil.copy(place / name, tmp_path / name)
    (tmp_path / "broken.wav").write_bytes(b"no sound at all")
    table, out = tmp_path / "clips.csv", tmp_path / "heard.csv"
    lines = [
        "file;words;label;start;end;note",
        "short.wav;;calm;;;kept",
        "short.wav;so it is;calm;0;0.4;",
        "long.wav;;tense;3;5;",
        "silent.wav;;tense;;;",
        "broken.wav;;tense;;;",
        "gone.wav;;tense;;;",
    ]
    table.write_text("\n".join(lines) + "\n")
    options = ["--corpus_options", json.dumps({"columns": {"text": "words"}})]
    model = ["--transcriber", str(place / "whisper"), "--language", "en"]
    assert main(["table", str(table), "--out", str(out), *options, *model]) == 0
    rows = list(csv.DictReader(out.open(encoding="utf-8", newline="")))
    hear, part = Transcriber(place / "whisper", "en"), soundfile.read(place / "long.wav", dtype="float32")[0]
    wanted = [hear(place / "short.wav")["text"], "so it is"]
    wanted += [hear({"array": part[3 * RATE : 5 * RATE], "sampling_rate": RATE})["text"], "", "", ""]
    assert [row["words"] for row in rows] == wanted and all(wanted[:3])
    assert [row["recognized_by"] != "" for row in rows] == [True, False, True, False, False, False]
    assert [row["note"] for row in rows] == ["kept", *[""] * 5] and rows[2]["start"] == "3"
    said = capsys.readouterr()
    assert "6 rows: words recognised in 2, nothing heard in 1" in said.out
    assert said.err.count("without words") == 2 and "clips.csv: line 6" in said.err and "gone.wav" in said.err
    with pytest.raises(FileExistsError, match="heard.csv: is there already, wanted a new file"):
        main(["table", str(table), "--out", str(out), *options, *model])
    with pytest.raises(ValueError, match="out: got .*elsewhere.csv, wanted a file"):
        main(["table", str(table), "--out", str(tmp_path / "a" / "elsewhere.csv"), *options, *model])
    with pytest.raises(SystemExit):
        main(["table", str(table), "--out", str(tmp_path / "new.csv")])
    assert "--transcriber: wanted with a table" in capsys.readouterr().err


def test_missing_numbers_stay_empty_and_clips_inside_a_table_are_refused(place, tmp_path):
    shutil.copy(place / "short.wav", tmp_path / "short.wav")
    rows = {"file": ["short.wav", "short.wav"], "label": ["a", "b"], "start": [None, 0.1], "text": ["so", "no"]}
    pd.DataFrame(rows).to_parquet(tmp_path / "t.parquet")
    add_words(tmp_path / "t.parquet", tmp_path / "out.csv", None)
    (tmp_path / "unlabelled.csv").write_text("file,text\nshort.wav,so\n", encoding="utf-8")
    assert add_words(tmp_path / "unlabelled.csv", tmp_path / "words.csv", None).rows == 1
    written = list(csv.DictReader((tmp_path / "out.csv").open(encoding="utf-8", newline="")))
    assert [row["start"] for row in written] == ["", "0.1"]
    inside = {"audio": [{"bytes": (place / "short.wav").read_bytes(), "path": "a.wav"}], "label": ["a"]}
    pd.DataFrame(inside).to_parquet(tmp_path / "inside.parquet")
    with pytest.raises(ValueError, match="audio: got content that CSV cannot hold, wanted the path of a file"):
        add_words(tmp_path / "inside.parquet", tmp_path / "new.csv", None)
