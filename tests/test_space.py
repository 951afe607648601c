"""What the page of app.py answers and shows, without a browser and without gradio."""

import csv
import io
import json
import logging
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

import pytest
from clips import write_clip, write_recorded
from models import save_model_with_towers

from egmf.media_egmf import media_length
from egmf.space.answering import FAILED, LONGEST_WORDS, Question, Recognizer, Refusal, Uploads
from egmf.space.rendering import render_answer, render_timeline


ROOT = Path(__file__).resolve().parents[1]
EVIL = '<img src=x onerror="alert(1)">'


@pytest.fixture(scope="module")
def place(tmp_path_factory, llm_folder, assemble) -> Path:
    """A folder with a model, two clips and one as browsers record them."""
    folder = tmp_path_factory.mktemp("space")
    save_model_with_towers(folder, llm_folder(), assemble)
    write_clip(folder / "short.mp4", 0.8)
    write_clip(folder / "long.mp4", 4.0)
    write_recorded(folder / "recorded.webm", 3.0)
    return folder


@pytest.fixture(scope="module")
def ask(place, recognize):
    """`ask(name, **question)`: the answers to a file of the folder, or to words alone."""
    recognizer = Recognizer(recognize, max_seconds=30)

    def asked(name: str | None = None, **question) -> list[dict]:
        file = None if name is None else str(place / name)
        *_, answers = recognizer(Question(file, **question))
        return answers

    return asked


@pytest.mark.slow
def test_nothing_but_the_page_imports_gradio():
    program = """
import importlib, pkgutil, sys
import app, train, eval, predict, publish, bench, corpora, egmf, experiments, metrics
for package in (egmf, corpora, metrics):
    for module in pkgutil.walk_packages(package.__path__[:1], package.__name__ + "."):
        if module.name != "egmf.space.page":
            importlib.import_module(module.name)
print([name for name in ("gradio", "playwright") if name in sys.modules])
"""
    outcome = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert outcome.stdout.strip().splitlines()[-1:] == ["[]"], outcome.stderr


def test_a_clip_is_answered_as_by_the_pipeline(place, recognize, ask):
    (answer,) = ask("short.mp4", words="that is just great", task="meld")
    wanted = recognize(str(place / "short.mp4"), text="that is just great")
    assert answer == {"file": "short.mp4", **wanted}
    assert ask(words="no")[0]["probabilities"] == recognize({"text": "no"})["probabilities"]
    own = ask("short.mp4", labels="calm, thrilled to bits\nbored")[0]
    assert list(own["probabilities"]) == ["calm", "thrilled to bits", "bored"]


@pytest.mark.parametrize(("name", "seconds"), [("long.mp4", 4.0), ("recorded.webm", 3.0)])
def test_a_recording_is_answered_segment_by_segment(place, recognize, ask, name, seconds):
    *segments, whole = ask(name)
    wanted = recognize(str(place / name), return_timestamps=True)
    assert whole["probabilities"] == pytest.approx(wanted["probabilities"])
    assert [(one["start"], one["end"]) for one in segments] == [
        tuple(round(time, 3) for time in chunk["timestamp"]) for chunk in wanted["chunks"]
    ]
    assert len(segments) > 2 and whole["warnings"] == [] and whole["seconds"] == pytest.approx(seconds, abs=0.15)


def test_a_recorded_clip_states_no_length_and_is_read_as_a_whole(place, recognize):
    assert media_length(place / "recorded.webm") is None
    answer = recognize(str(place / "recorded.webm"), text="no")
    assert answer["seconds"] > 0.9 and not [note for note in answer["warnings"] if "missing" in note]


def test_what_cannot_be_answered_says_why_without_a_folder(place, ask, recognize, caplog, monkeypatch):
    def error(*arguments, **question) -> str:
        (answer,) = ask(*arguments, **question)
        assert str(place) not in answer["error"]
        return answer["error"]

    assert error("broken.mp4") == (
        "Cannot read 'broken.mp4': it is not an audio or video file, or its index is missing."
    )
    assert error() == "There is nothing to answer: please choose or record a clip, or type words."
    assert error(words=" \n") == error()
    assert error(words="no", labels="joy") == "Your own labels: got joy, wanted two or more different ones."
    assert "wanted two or more different ones" in error(words="no", labels="a, b, a")
    assert error(words="no", labels=", ".join(map(str, range(51)))) == "Your own labels: got 51, wanted at most 50."
    assert error(words="no", labels="o" * 1001) == "Your own labels: got 1001 characters, wanted at most 1000."
    assert error(words="o" * 5001) == f"What is said: got 5001 characters, wanted at most {LONGEST_WORDS}."
    *_, answers = Recognizer(recognize, max_seconds=2)(Question(str(place / "long.mp4")))
    too_long = "The clip is too long: got more than 2 seconds, the limit of this page."
    assert [one["error"] for one in answers] == [too_long]

    def fail(*arguments, **options):
        raise RuntimeError(f"a secret of {place}")

    monkeypatch.setattr(recognize.processor, "is_long", fail)
    caplog.set_level(logging.DEBUG)
    assert error("short.mp4") == FAILED
    assert "RuntimeError" in caplog.text and "secret" not in caplog.text


def test_the_length_is_checked_while_a_recording_is_read(tmp_path, recognize):
    """A file without a length is stopped soon after the limit."""
    file = write_recorded(tmp_path / "endless.webm", 25.0)
    *_, answers = Recognizer(recognize, max_seconds=5)(Question(file))
    assert answers[-1]["error"].startswith("The clip is too long") and answers[-2]["end"] < 20
    [[answer]] = Recognizer(recognize, max_seconds=5)(Question(file, words="so it is"))
    assert answer["error"].startswith("The clip is too long")


def test_uploads_are_deleted_after_their_answer(tmp_path, place):
    example = str(place / "short.mp4")
    uploads = Uploads([example])

    def arrive(name: str) -> Path:
        path = uploads.folder / name / "a.wav"
        path.parent.mkdir()
        path.write_bytes(b"sound")
        return path

    first, second = arrive("first"), arrive("second")
    with pytest.raises(ZeroDivisionError), uploads.held(str(first)) as held:
        assert Path(held).read_bytes() == b"sound"
        raise ZeroDivisionError
    assert not first.parent.exists() and second.exists()
    for path in (None, example):
        with uploads.held(path) as held:
            assert held == path
    assert Path(example).is_file()

    outside = tmp_path / "secret.wav"
    shutil.copyfile(place / "voice.wav", outside)
    link, folder = uploads.folder / "link.wav", uploads.folder / "elsewhere"
    link.symlink_to(outside)
    folder.symlink_to(tmp_path)
    for path in (link, folder / "secret.wav", outside, uploads.folder / ".." / outside.name, first, second.parent):
        with pytest.raises(Refusal, match=r"^The clip is no longer on the server. Please choose it again.$"):
            with uploads.held(str(path)):
                pass
    assert outside.is_file()

    uploads.sweep(age=60)
    assert second.exists()
    uploads.sweep(age=-1)
    assert not second.parent.exists() and outside.is_file() and uploads.folder.is_dir()


def test_downloads_are_the_files_of_predict(ask):
    answers = ask("long.mp4")
    html = render_answer(answers)
    files = {
        name.rpartition(".")[2]: b64decode(content).decode()
        for name, content in re.findall(r'download="(long\.\w+)" href="data:[\w/]+;base64,([^"]+)"', html)
    }
    assert json.loads(files["json"]) == json.loads(json.dumps(answers))
    rows = list(csv.DictReader(io.StringIO(files["csv"])))
    assert len(rows) == len(answers) and [row["label"] for row in rows] == [one["label"] for one in answers]
    assert files["vtt"].startswith("WEBVTT") and files["vtt"].count("-->") == len(answers) - 1
    assert f"[{answers[0]['label']} " in files["vtt"]


def test_what_is_shown(ask):
    *segments, whole = answers = ask("long.mp4")
    html = render_answer(answers)
    assert f"<strong>{whole['label']}</strong>" in html and f"mean of {len(segments)} segments" in html
    for label, share in whole["probabilities"].items():
        assert re.search(rf">{label}</th>.*?<td>{100 * share:.1f} %</td>", html)
    for expert, share in whole["gate_weights"]["expert"].items():
        assert f"{expert} <span>{100 * share:.0f} %</span>" in html
    assert "Warnings" not in html
    timeline = render_timeline(answers)
    assert timeline.count("<button") == len(segments)
    assert f'data-start="{segments[1]["start"]:.3f}"' in timeline and "Play from here" in timeline

    (score,) = ask("short.mp4", words="no", task="mosei")
    low, high = score["interval"]
    assert f"{score['score']:+.2f}</strong>" in render_answer([score])
    assert f"90 % interval {low:+.1f} to {high:+.1f}" in render_answer([score])
    assert render_timeline([score]).count("<button") == 1
    assert render_timeline(ask(words="no")) == ""


def test_what_users_type_is_no_html(ask):
    answers = ask("short.mp4", words=EVIL, labels=f"{EVIL}, other")
    shown = render_answer(answers) + render_timeline(answers)
    answers[0] |= {"file": f"{EVIL}.mp4", "text": EVIL, "recognized_by": EVIL, "language": EVIL, "warnings": [EVIL]}
    shown += render_answer(answers) + render_timeline(answers) + render_answer([{"file": "x", "error": EVIL}])
    assert "<img" not in shown and shown.count("&lt;img") > 5


def test_gaps_between_segments(ask):
    first, second = ask("long.mp4")[:2]
    timeline = render_timeline([first | {"start": 1.0, "end": 2.0}, second | {"start": 2.5, "end": 3.0}])
    assert re.findall(r"flex-grow:([\d.]+)", timeline) == ["1.000", "1.000", "0.500", "0.500"]
    assert timeline.count('class="egmf-gap"') == timeline.count("<button") == 2
