"""Answers for files: the pipeline that is part of a checkpoint, and predict.py, which uses it."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from clips import tone, write_clip
from models import save_model_with_towers
from PIL import Image
from transformers import AutoModelForCausalLM

from egmf.data.clips import load_row_media
from egmf.data.collator import AffectCollator
from egmf.prediction.answers import Answerer
from egmf.prediction.outputs import table_row
from egmf.prediction.tables import read_samples
from predict import main


ROOT = Path(__file__).resolve().parents[1]
WORDS = ["that is just great", "no", "so"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, llm_folder, assemble):
    """A folder with a checkpoint with both towers, two clips, a sound and a broken file; its processor and model."""
    folder = tmp_path_factory.mktemp("place")
    processor, model = save_model_with_towers(folder, llm_folder(), assemble)
    write_clip(folder / "one.mp4")
    write_clip(folder / "two.mp4", 0.4, sound=False, seed=1)
    return folder, processor, model


@pytest.fixture(scope="module")
def place(checkpoint) -> Path:
    """The folder of the checkpoint."""
    return checkpoint[0]


def predict(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run predict.py outside the repository's folder."""
    command = [sys.executable, str(ROOT / "predict.py"), "model", *arguments]
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def files(folder: Path) -> list[str]:
    return [str(folder / name) for name in ("one.mp4", "two.mp4", "voice.wav")]


def test_answer_has_everything(checkpoint, recognize):
    folder, processor, _ = checkpoint
    answer = recognize(str(folder / "one.mp4"), text="that is just great")
    labels = processor.tasks["meld"].labels
    assert answer["label"] in labels and list(answer["probabilities"]) == list(labels)
    assert sum(answer["probabilities"].values()) == pytest.approx(1)
    assert answer["label"] == max(answer["probabilities"], key=answer["probabilities"].get)
    assert 0.9 < answer["seconds"] < 1.2 and answer["warnings"] == [] and answer["error"] is None
    for weights in answer["gate_weights"]["modality"].values():
        assert sum(weights.values()) == pytest.approx(1) and set(weights) == {"text", "audio", "vision"}
    score = recognize(str(folder / "two.mp4"), task="mosei")
    low, high = score["interval"]
    assert (
        -3 <= low <= score["median"] <= high <= 3
        and low <= score["score"] <= high
        and len(score["probabilities"]) == 61
    )
    assert all(weights["audio"] == 0 for weights in score["gate_weights"]["modality"].values())  # it has no sound


def test_one_answer_by_every_way(checkpoint, recognize):
    """The pipeline (single and batched), the processor, and the batches of training and evaluation give one answer."""
    folder, processor, model = checkpoint
    names = files(folder)
    alone = [recognize(name, text=words) for name, words in zip(names, WORDS, strict=True)]
    samples = [{"file": name, "text": words} for name, words in zip(names, WORDS, strict=True)]
    row = {"task": "meld", "context": [], "speaker": None, "emotion": "joy", "sentiment": None}
    media = [(names[0], names[0]), (None, names[1]), (names[2], None)]
    rows = [
        {**row, "id": words, "text": words, "audio": audio, "video": video}
        for words, (audio, video) in zip(WORDS, media, strict=True)
    ]
    modalities = ["text", "audio", "vision"]
    collate = AffectCollator(processor, [processor.tasks["meld"]], modalities, with_answers=False)
    inputs = {name: value for name, value in collate(rows).items() if not name.endswith("_index")}
    with torch.no_grad():
        scores = model.score_labels(processor.candidates("meld"), **inputs).log_probs.exp()
    for ways in (recognize(samples), recognize(samples, batch_size=2)):
        for answer, wanted, row_scores in zip(ways, alone, scores, strict=True):
            found, expected = (torch.tensor(list(one["probabilities"].values())) for one in (answer, wanted))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(found, row_scores, rtol=0, atol=1e-5)


def test_files_that_cannot_be_read(place, recognize):
    broken = str(place / "broken.mp4")
    with pytest.raises(Exception, match=r"Cannot read .*broken.mp4") as raised:
        recognize(broken)
    assert raised.type.__name__ == "MediaError"  # the checkpoint's own
    first, second, third = recognize([files(place)[0], broken, str(place / "gone.wav")], on_error="report")
    assert first["error"] is None and first["label"]
    for answer in (second, third):
        assert answer["label"] is None and answer["probabilities"] is None and "Cannot read" in answer["error"]


def test_wrong_arguments(recognize):
    with pytest.raises(ValueError, match="wanted text, speaker, context, speaker_clips, task, on_error"):
        recognize("clip.mp4", words="so")
    with pytest.raises(ValueError, match="task: got 'mood', wanted one of"):
        recognize({"text": "so"}, task="mood")
    with pytest.raises(ValueError, match=r"a sample got \['words'\]"):
        recognize({"words": "so"})


def test_words_alone(recognize, place, capsys):
    answer = recognize({"text": "that is just great", "context": ["It broke."]})
    assert answer["label"] and answer["seconds"] is None
    assert main([str(place / "model"), "--text", "that is just great", "--speaker", "Ann"]) == 0
    said = json.loads(capsys.readouterr().out)
    alone = recognize({"text": "that is just great", "speaker": "Ann"})
    assert said.pop("file") is None and said == json.loads(json.dumps(alone))
    assert table_row({"file": None, **alone}).startswith("-  ")
    assert main([str(place / "model"), "--text", "I love it", "--dtype", "bfloat16"]) == 0
    rounded = json.loads(capsys.readouterr().out)["probabilities"]
    exact = recognize({"text": "I love it"})["probabilities"]
    assert rounded != exact and rounded == pytest.approx(exact, abs=0.05)
    for arguments, message in (
        (["model"], "INPUT: got nothing, wanted files, or --text without a file"),
        (["model", "--text", "so", "--plot", "a.png"], "--plot: got a value without a file, wanted both"),
        (["model", "a.csv", "b.wav"], "INPUT: got a.csv and 1 more, wanted a table alone, or files"),
        (["model", "a.csv", "--hop", "2"], "--hop: got a value with the table a.csv, wanted one of them"),
        (["model", "a.csv", "--output", "a.vtt"], "--output: got subtitles for the table a.csv, wanted .jsonl or"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err


def test_warnings_that_are_not_of_media_reach_the_user(recognize, place):
    class Clip(type(recognize.processor.load_media(video=files(place)[0]).video)):
        told = False  # the first look at a clip, where the pipeline listens for what is missing

        @property
        def frames(self):
            if not self.told:
                type(self).told = True
                warnings.warn("old frames", DeprecationWarning, stacklevel=1)
            return vars(self)["frames"]

        @frames.setter
        def frames(self, value):
            vars(self)["frames"] = value

    found = recognize.processor.load_media(video=files(place)[0]).video
    clip = Clip(found.frames, found.times, found.duration, found.warnings)
    with pytest.warns(DeprecationWarning, match="old frames"):
        answer = recognize({"text": "so", "video": clip})
    assert answer["warnings"] == []


def test_the_pipelines_model_can_be_saved(recognize, tmp_path):
    """`pipeline()` adds classes to the model's config, which JSON cannot represent."""
    recognize.model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["custom_pipelines"]["affect-recognition"]["pt"] == ["AutoModel"]


def test_predict_answers_as_the_pipeline_and_goes_on_past_a_bad_file(place, recognize):
    names = ["one.mp4", "broken.mp4", str(place / "two.mp4"), "voice.wav"]
    rows = zip(names, ["that is just great", "", "no", "so"], strict=True)
    (place / "words.csv").write_text("\n".join(["file,text", *map(",".join, rows)]))
    outcome = predict(place, "words.csv", "--batch_size", "2", "--num_workers", "2")
    assert outcome.returncode == 1, outcome.stderr
    assert outcome.stdout, outcome.stderr
    answers = {Path(answer["file"]).name: answer for answer in map(json.loads, outcome.stdout.splitlines())}
    assert list(answers) == [Path(name).name for name in names]
    assert "Cannot read 'broken.mp4'" in answers["broken.mp4"]["error"]
    for name, words in zip(files(place), WORDS, strict=True):
        wanted = recognize(name, text=words)
        for label, probability in answers[Path(name).name]["probabilities"].items():
            assert probability == pytest.approx(wanted["probabilities"][label], abs=1e-5)


def test_other_processes_decode_the_same_answers_in_order(place, recognize):
    names = [*files(place), str(place / "broken.mp4"), *files(place)[::-1]]
    wanted = recognize(names, batch_size=2, on_error="report")
    for size in (1, 2):
        found = recognize(iter(names), batch_size=size, num_workers=2, on_error="report")
        for answer, alone in zip(found, wanted, strict=True):
            assert answer["error"] == alone["error"] and answer["warnings"] == alone["warnings"]
            assert answer["probabilities"] == pytest.approx(alone["probabilities"], abs=1e-5)
    with pytest.raises(Exception, match=r"Cannot read .*broken.mp4") as raised:
        recognize(names, num_workers=2)
    assert raised.type.__name__ == "MediaError"


@pytest.mark.slow
def test_two_processes_share_the_files(place):
    """The main process prints all answers in the files' order."""
    config = ROOT / "recipes" / "accelerate" / "cpu_2.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), str(ROOT / "predict.py"), "model"]
    names = ["one.mp4", "broken.mp4", "two.mp4", "voice.wav"]
    environment = os.environ | {"HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1"}
    rows = [*(f"{name},well,," for name in names), "one.mp4,so,0.5,0.8", "two.mp4,no,0,0.2", "one.mp4,so,0,0.4"]
    (place / "all.csv").write_text("\n".join(["file,text,start,end", *rows]))
    command = [sys.executable, *launch, "all.csv", "--batch_size", "1"]
    outcome = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    answers = list(map(json.loads, outcome.stdout.splitlines()))
    parts = ["one.mp4#t=0,0.4", "one.mp4#t=0.5,0.8", "two.mp4#t=0,0.2"]
    assert [answer["id"] for answer in answers] == [*names, *parts], outcome.stderr
    assert [answer["error"] is None for answer in answers] == [True, False, True, True, True, True, True]


def test_predict_one_file(place):
    name = os.fsdecode(b"caf\xe9.mp4")  # no Unicode
    (place / name).symlink_to("one.mp4")
    outcome = predict(place, name, "--text", "so", "--task", "mosei")
    assert outcome.returncode == 0, outcome.stderr
    answer = json.loads(outcome.stdout)
    assert answer["file"] == name
    assert -3 <= answer["score"] <= 3 and answer["interval"][0] <= answer["interval"][1]


def test_rows_of_a_table_are_answered_as_training_reads_them(place, recognize, capsys):
    lines = [
        "file,text,speaker,dialogue,start,end,id",
        "one.mp4,I won,Ann,1,0,0.4,",
        "two.mp4,no,,1,,,",
        "one.mp4,again,Ann,1,0.7,,last",
        "one.mp4,so,,1,0.4,0.7,",
        "gone.wav,what,Ann,1,,,",
        "one.mp4,what,Ann,1,7,,",
        ",well,Ann,2,,,",
    ]
    (place / "parts.csv").write_text("\n".join(lines))
    assert main([str(place / "model"), str(place / "parts.csv"), "--speaker", "Bob", "--batch_size", "2"]) == 1
    answers = {answer["id"]: answer for answer in map(json.loads, capsys.readouterr().out.splitlines())}
    one, two = str(place / "one.mp4"), str(place / "two.mp4")
    end = answers["last"]["end"]  # as the file states its length
    assert answers["last"]["file"] == one and answers["last"]["start"] == 0.7 and end == pytest.approx(1.0, abs=0.1)
    spoken = [
        {"speaker": "Ann", "text": "I won"},
        {"speaker": "Bob", "text": "no"},
        {"speaker": "Ann", "text": "again"},
    ]
    wanted = {
        "one.mp4#t=0,0.4": (f"{one}#t=0,0.4", "I won", "Ann", []),
        "two.mp4": (two, "no", "Bob", spoken[:1]),
        "one.mp4#t=0.4,0.7": (f"{one}#t=0.4,0.7", "so", "Bob", spoken),
        "last": (f"{one}#t=0.7,{end}", "again", "Ann", spoken[:2]),
    }
    for row_id, (clip, text, speaker, context) in wanted.items():
        sample = {"text": text, "speaker": speaker, "context": context}
        for name in ("audio", "video") if clip != two else ("video",):
            sample[name] = getattr(load_row_media(recognize.processor, name, clip), name)
        answer, expected = answers[row_id], recognize(sample)
        assert answer["error"] is None and (answer["text"], answer["speaker"]) == (text, speaker)
        assert answer["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-4), row_id
    assert answers["line 8"]["probabilities"] == pytest.approx(
        recognize({"text": "well", "speaker": "Ann"})["probabilities"], abs=1e-4
    )
    assert "line 6: file: got gone.wav, which does not exist" in answers["line 6"]["error"]
    assert "start: got 7, wanted less than the recording's 1.1 seconds" in answers["one.mp4#t=7"]["error"]
    assert len(answers) == 7


def test_a_table_of_other_columns_gets_a_table(place, tmp_path):
    """As in training: the columns' names, and dialogues that begin anew in each split. A malformed row is answered."""
    model = shutil.copytree(place / "model", tmp_path / "model")
    options = {"columns": {"text": "words", "label": "emotion"}, "context": 1}
    (model / "recipe.json").write_text(json.dumps({"corpus": "table", "corpus_options": options}))
    rows = ["train,1,it works", "test,1,no", "test,1,so, so", "test,1,well"]
    (tmp_path / "words.csv").write_text("\n".join(["split,dialogue,words", *rows]))
    contexts = [sample.get("context") for sample in read_samples(tmp_path / "words.csv", options)]
    assert contexts == [[], [], None, [{"speaker": None, "text": "no"}]]
    arguments = [str(model), str(tmp_path / "words.csv"), "--task", "meld", "--output", str(tmp_path / "answers.csv")]
    assert main(arguments) == 1
    with (tmp_path / "answers.csv").open(newline="") as file:
        answers = list(csv.DictReader(file))
    assert [answer["id"] for answer in answers] == ["line 2", "line 3", "line 4", "line 5"]
    assert [answer["text"] for answer in answers] == ["it works", "no", "", "well"]
    assert "line 4: got 4 cells, wanted 3" in answers[2]["error"] and answers[3]["probabilities.joy"]
    with pytest.raises(ValueError, match="task: got 'joy', wanted one of mosi, "):
        main([str(model), str(tmp_path / "words.csv"), "--task", "joy"])


def test_a_model_of_words_answers_the_words_of_a_table(place, llm_folder, assemble, processor, tmp_path, capsys):
    model = assemble(AutoModelForCausalLM.from_pretrained(llm_folder()))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    lines = [f"{place / 'voice.wav'},so,0,0.2", f"{place / 'one.mp4'},so,,", ",so,,", ",no,,"]
    (tmp_path / "words.csv").write_text("\n".join(["file,text,start,end", *lines]))
    assert main([str(tmp_path / "model"), str(tmp_path / "words.csv"), "--task", "meld"]) == 0
    answers = list(map(json.loads, capsys.readouterr().out.splitlines()))
    found = [answer["probabilities"] for answer in answers]
    assert found[0] == found[1] == found[2] != found[3] and answers[0]["end"] == 0.2


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp"])
def test_a_picture_is_a_clip_and_no_recording(recognize, tmp_path, name):
    Image.new("RGB", (20, 20)).save(tmp_path / name)
    [(_, answer)] = Answerer(recognize, 1, {}, {})([{"file": str(tmp_path / name)}])
    assert answer["error"] is None and "segments" not in answer


@pytest.mark.parametrize("size", ["0", "-1", "two"])
def test_a_batch_size_that_answers_nothing_is_refused(capsys, recognize, size):
    with pytest.raises(SystemExit) as stop:
        main(["model", "one.mp4", "--batch_size", size])
    assert stop.value.code == 2 and f"got {size!r}, wanted a whole number from 1" in capsys.readouterr().err
    if size != "two":
        with pytest.raises(ValueError, match=f"batch_size: got {size}, wanted a positive number"):
            recognize([{"text": "so"}], batch_size=int(size))


def test_a_fault_of_one_sample_is_its_own_error(recognize, tmp_path):
    """Also of one that is only found in the model: features that are not finite."""
    good = {"text": "so"}
    loud = {"text": "so", "audio": {"array": np.full(4800, 1e20), "sampling_rate": 16000}}
    clip = recognize.processor.load_media(audio={"array": tone(0.3), "sampling_rate": 16000})
    made = recognize.processor.tower_inputs(clip).audio

    class Overflown(type(made)):
        duration = 0.3

    features = Overflown(np.full_like(made.values, np.inf), made.mask)
    samples = [good, loud, {"text": "so", "audio": features}, {"text": 3}, {"words": "so"}, good]
    answers = recognize(samples, on_error="report", batch_size=3)
    assert [answer["error"] is None for answer in answers] == [True, False, False, False, False, True]
    assert "samples up to 1e+20" in answers[1]["error"] and "NaN or infinite" in answers[2]["error"]
    assert "wanted a string" in answers[3]["error"] and "a sample got ['words']" in answers[4]["error"]
    assert all(answer["label"] is None and answer["warnings"] == [] for answer in answers[1:5])
    assert answers[0]["probabilities"] == pytest.approx(recognize(good)["probabilities"], abs=1e-5)
    with pytest.raises(ValueError, match=r"samples up to 1e\+20"):
        recognize(samples)
    wave = tone(0.3)
    wave[1000:1200] *= 1e20
    soundfile.write(tmp_path / "loud.wav", wave, 16000, subtype="FLOAT")
    answer = recognize(str(tmp_path / "loud.wav"))  # the rest of it is heard
    assert answer["label"] and "samples far beyond full scale" in answer["warnings"][0]


def test_seconds_of_frames_without_times_are_null(recognize):
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    answer = recognize({"text": "so", "video": frames})
    assert answer["seconds"] is None and json.loads(json.dumps(answer, allow_nan=False))


def test_what_is_left_out_of_a_long_text_is_said(recognize):
    limit = recognize.model.config.text_config.max_position_embeddings
    assert recognize.processor.tokenizer.model_max_length == limit
    long = "so " * limit
    context = ["It broke. " * 9]
    cut, short = recognize([{"text": long, "context": context}, {"text": "so", "context": context}])
    assert short["warnings"] == []
    [warning] = cut["warnings"]
    found = re.fullmatch(
        rf"the language model reads {limit} tokens: (\d+) tokens of the context and "
        r"the first (\d+) of (\d+) tokens of the text are left out",
        warning,
    )
    assert found and 0 < int(found[2]) < int(found[3])
    with pytest.warns(UserWarning, match="are left out"):
        inputs = recognize.processor(text=long, context=context, task="meld")
    answer_room = recognize.processor.max_answer_tokens("meld")
    assert inputs["input_ids"].shape[1] == limit - answer_room
    assert "so" in recognize.processor.tokenizer.decode(
        inputs["input_ids"][0][inputs["utterance_mask"][0].bool()][-9:]
    )


def test_an_answer_to_nothing_says_so(recognize):
    answer = recognize({"text": " "})
    assert answer["label"] and answer["warnings"] == [
        "there is no text, no sound and no picture: the answer is a guess"
    ]
