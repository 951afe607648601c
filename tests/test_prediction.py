"""predict.py along recordings: inputs, segments of every format, outputs, plots."""

import csv
import json
import os
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from clips import tone, write_clip
from models import save_model_with_towers

import predict
from egmf.commands import is_mistake
from egmf.prediction.inputs import find_files
from egmf.prediction.outputs import cue
from egmf.prediction.segments import read_segments


WANTED = [
    {"start": 0.5, "end": 1.25, "text": "It <broke> & fell.", "speaker": None},
    {"start": 3661.0, "end": 3662.5, "text": "Why? Tell me.", "speaker": "Ross"},
]
SRT = "1\n00:00:00,500 --> 00:00:01,250\nIt <broke> & fell.\n\n2\n01:01:01,000 --> 01:01:02,500\nWhy?\nTell me.\n"
VTT = """WEBVTT - a talk

NOTE not said

STYLE
::cue { color: red }

00:00.500 --> 00:01.250 align:start
It &lt;broke&gt; &amp; <i>fell.</i>

second
01:01:01.000 --> 01:01:02.500
<v.loud Ross>Why?
Tell me.
"""
WHISPER = [
    {"id": 0, "start": 0.5, "end": 1.25, "text": " It <broke> & fell.", "tokens": [1]},
    {"id": 1, "start": 3661, "end": 3662.5, "text": " Why? Tell me.", "speaker": "Ross"},
]
CHUNKS = [{"timestamp": [one["start"], one["end"]], **one} for one in WHISPER]
CPP = [
    {"offsets": {"from": 500, "to": 1250}, "text": " It <broke> & fell."},
    {"offsets": {"from": 3661000, "to": 3662500}, "text": "Why? Tell me.", "speaker": "Ross"},
]
TABLE = "start,end,text,speaker\n0.5,1.25,It <broke> & fell.,\n01:01:01,3662.5,Why? Tell me.,Ross\n"
FORMATS = {
    "a.srt": SRT.replace("<broke>", "&lt;broke&gt;"),
    "windows.srt": SRT.replace("<broke>", "&lt;broke&gt;").replace("\n", "\r\n"),
    "a.VTT": VTT,
    "whisper.json": json.dumps({"text": "...", "segments": WHISPER, "language": "en"}),
    "chunks.json": json.dumps({"text": "...", "chunks": CHUNKS}),
    "list.json": json.dumps(WHISPER),
    "cpp.json": json.dumps({"transcription": CPP}),
    "a.csv": TABLE,
    "a.tsv": TABLE.replace(",", "\t"),
    "semicolons.csv": TABLE.replace(",", ";").replace("0.5", "0,5").upper().replace("IT <BROKE> & FELL.", "x"),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_segments_of_every_format(tmp_path, name, encoding):
    (tmp_path / name).write_bytes(FORMATS[name].encode(encoding))
    found = read_segments(tmp_path / name)
    if name == "semicolons.csv":
        assert [one["start"] for one in found] == [0.5, 3661.0] and found[1]["speaker"] == "ROSS"
    else:
        speakers = [None, None if name.endswith("srt") else "Ross"]
        assert found == [{**one, "speaker": speaker} for one, speaker in zip(WANTED, speakers, strict=True)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.srt", "1\n00:00:01 -> 00:00:02\nso\n", "line 1: got '1', wanted times such as 00:00:01.000 --> "),
        ("a.srt", "1\n00:00:01,0 --> later\nso\n", "line 2: got '00:00:01,0 --> later', wanted times"),
        ("a.vtt", "WEBVTT\n\n00:02.000 --> 00:01.000\nso\n", "line 3: got 2.0 to 1.0, wanted start before end"),
        ("a.vtt", "WEBVTT\n", "got no segment, wanted some"),
        ("a.json", "{", "got no JSON"),
        ("a.json", '{"text": "so"}', "got no list of segments, wanted one in segments, chunks, transcription"),
        ("a.json", '[{"start": 1, "text": "so"}]', "segment 0: got .*, wanted its start and end"),
        ("a.json", '[{"timestamp": [null, 1], "text": "so"}]', "segment 0: got .*, wanted its start and end"),
        (
            "a.json",
            '[{"timestamp": [2, null]}, {"timestamp": [1, 3]}]',
            "segment 0: got 2.0 to 1.0, wanted start before end",
        ),
        ("a.csv", "begin,end\n0,1\n", "line 1: got 'begin,end', wanted a header with the columns start and end"),
        ("a.csv", "start,end\n0,soon\n", "line 2: end: got 'soon', wanted seconds or a time such as 0:01:02.5"),
        ("a.txt", "so", "segments: got .*a.txt, wanted .srt, .vtt, .json"),
    ],
)
def test_faulty_segments(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_segments(tmp_path / name)
    assert len(str(error.value).splitlines()) == 1 and is_mistake(error.value)


def test_segments_without_length_are_left_out(tmp_path, caplog):
    rows = [{"start": 0, "end": 1, "text": "so"}, {"start": 1, "end": 1, "text": "uh"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert len(read_segments(tmp_path / "a.json")) == 1 and "1 segments have no length" in caplog.text


def test_ends_that_speech_recognition_leaves_open(tmp_path):
    chunks = [{"timestamp": [0.5, None], "text": " so"}, {"timestamp": [1, None], "text": " it goes"}]
    (tmp_path / "a.json").write_text(json.dumps({"chunks": chunks}))
    found = read_segments(tmp_path / "a.json")
    assert [(one["start"], one["end"]) for one in found] == [(0.5, 1.0), (1.0, None)]


def test_inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "b.mp4",
        "a.wav",
        "a.txt",
        ".hidden.wav",
        "deep/c.opus",
        "deep/.x/d.wav",
        "odd [1].wav",
        "none/e.txt",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    assert find_files(["."], False) == ["./a.wav", "./b.mp4", "./odd [1].wav"]
    assert find_files(["."], True) == ["./a.wav", "./b.mp4", "./odd [1].wav", "./deep/c.opus"]
    assert find_files(["*.wav", "a.wav", "gone.wav"], False) == ["a.wav", "odd [1].wav", "gone.wav"]
    assert find_files(["**/*.opus", "odd [1].wav"], False) == ["deep/c.opus", "odd [1].wav"]
    assert find_files(["a.txt", "http://x/?.wav"], False) == ["a.txt", "http://x/?.wav"]  # named, so wanted
    wanted = "none: got a folder without sound and video files, wanted some, or pictures .*; --recursive"
    with pytest.raises(ValueError, match=wanted):
        find_files(["none"], False)
    with pytest.raises(ValueError, match=r"\*.mp3: got a pattern that matches no file"):
        find_files(["*.mp3"], False)


@pytest.fixture(scope="module")
def place(tmp_path_factory, llm_folder, assemble) -> Path:
    """A folder with a model that hears 1 s, a clip, and recordings of 4 s."""
    folder = tmp_path_factory.mktemp("place")
    save_model_with_towers(folder, llm_folder(), assemble)
    (folder / "talks").mkdir()
    write_clip(folder / "talks/talk.mp4", 4.0)
    soundfile.write(folder / "talks/short.wav", tone(0.4), 16000)
    (folder / "words.csv").write_text(
        "start,end,text,speaker\n0,0.8,It broke.,Joey\n1,1.9,that is --> great,\n6,7,so,\n"
    )
    return folder


@pytest.fixture
def run(place, monkeypatch, capsys):
    """Runs predict.py in the folder; returns its status and the JSON lines."""
    monkeypatch.chdir(place)

    def called(*arguments: str) -> tuple[int, list[dict]]:
        status = predict.main(["model", *arguments])
        return status, [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return called


def test_a_long_recording_is_divided_and_a_short_one_is_not(run):
    status, rows = run("talks", "broken.mp4")
    assert status == 1 and [row["file"] for row in rows[:1]] == ["talks/short.wav"] and "start" not in rows[0]
    *parts, whole = [row for row in rows if row["file"] == "talks/talk.mp4"]
    assert "Cannot read 'broken.mp4'" in rows[-1]["error"] and whole["segments"] == len(parts) >= 4
    assert parts[0]["start"] == 0 and whole["end"] == parts[-1]["end"] == pytest.approx(4.0, abs=0.1)
    assert all(0.49 <= part["end"] - part["start"] <= 1 and part["label"] for part in parts)
    assert rows[0].keys() | {"start", "end", "text", "speaker"} == parts[0].keys()
    status, rows = run("talks/talk.mp4", "--window", "2", "--hop", "2")
    assert status == 0 and [(row["start"], row.get("segments")) for row in rows] == [(0, None), (2, None), (0, 2)]
    status, rows = run("talks/talk.mp4", "--text", "so")  # the words are those of the whole file
    assert status == 0 and len(rows) == 1 and "the model reads only the first 1.0 of" in rows[0]["warnings"][0]


def test_segments_to_lines_tables_subtitles_and_plots(run, place):
    options = ["talks/talk.mp4", "--segments", "words.csv"]
    status, rows = run(*options, "--plot", "talk.png")
    assert status == 0 and [row["text"] for row in rows[:3]] == ["It broke.", "that is --> great", "so"]
    assert rows[2]["warnings"] == ["the recording has 0.0 of these 1.0 seconds"]
    with av.open(str(place / "talk.png")) as picture:
        assert picture.streams.video[0].width > 800
    assert run(*options, "--output", "talk.csv") == (0, [])
    with (place / "talk.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    for row, cells in zip(rows, table, strict=True):
        assert cells["label"] == row["label"] and float(cells["end"]) == row["end"] and cells["file"] == row["file"]
        assert float(cells["probabilities.joy"]) == pytest.approx(row["probabilities"]["joy"], abs=1e-6)
        assert float(cells["gate_weights.expert.local"]) == pytest.approx(row["gate_weights"]["expert"]["local"])
        assert cells["warnings"] == "; ".join(row["warnings"])
    assert run(*options, "--output", "talk.vtt", "--task", "mosei") == (0, [])
    content = (place / "talk.vtt").read_text(encoding="utf-8")
    assert content.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:00.800\n<v Joey>[")
    assert (
        "that is --&gt; great\n" in content and content.count(" --> ") == 3 and "\nNOTE talks/talk.mp4: [" in content
    )
    again = read_segments(place / "talk.vtt")  # which other programs read as well
    assert [one["start"] for one in again] == [0, 1, 6] and again[1]["text"].endswith("] that is --> great")


def test_a_table_waits_for_the_first_answer(run, place):
    status, _ = run("broken.mp4", "talks/short.wav", "--output", "all.csv")
    with (place / "all.csv").open(encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert status == 1 and "Cannot read" in first["error"] and second["label"] and "probabilities.joy" in second
    assert {"language", "recognized_by"} < first.keys()  # a later answer may have them
    run("broken.mp4", "--output", "none.csv")
    assert "Cannot read" in (place / "none.csv").read_text()


def test_a_terminal_gets_a_table(run, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    predict.main(["model", "talks/talk.mp4", "--segments", "words.csv"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0].startswith("00:00.000 to 00:00.800 ") and '"It broke."' in lines[0]
    assert lines[-1].startswith("talks/talk.mp4: mean of 3 ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["talks", "--segments", "words.csv"], "--segments: got 2 files, wanted one"),
        (["talks", "--plot", "a.png"], "--plot: got 2 files, wanted one"),
        (["talks", "--output", "a.vtt"], "--output: got 2 files for subtitles, wanted one"),
        (["talks", "--output", "a.txt"], "--output: got a.txt, wanted a file that ends in .csv, .jsonl, .vtt"),
        (["a.wav", "--plot", "a.txt"], "--plot: got a.txt, wanted a file that ends in .pdf, .png, .svg"),
        (["a.wav", "--segments", "words.csv", "--window", "3"], "--window: got a value with --segments"),
        (["a.wav", "--window", "0"], "argument --window: got '0', wanted seconds from 0.05"),
        (["a.wav", "--language", "en"], "--language: got a value without --transcriber"),
        (["words.csv", "--output", "words.csv"], "got words.csv, which is read"),
    ],
)
def test_wrong_arguments(place, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as stop:
        predict.main(["model", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_cues():
    answer = {"file": "a", "start": 1.0, "end": 3725.5, "seconds": 2.0, "label": "joy", "error": None}
    answer |= {"probabilities": {"joy": 0.834}, "speaker": "A & B", "text": " x  <y>"}
    assert cue(answer) == "00:00:01.000 --> 01:02:05.500\n<v A &amp; B>[joy 83 %] x &lt;y&gt;"
    assert cue({**answer, "error": "gone"}).endswith("(gone) x &lt;y&gt;")
    assert cue({"file": "a", "seconds": None, "error": "no --> way"}) == "NOTE a: (no -> way)"
    assert os.linesep not in cue({**answer, "text": np.str_("x\ny")}).split("\n", 1)[1]
