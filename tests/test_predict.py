"""A file in, an answer out: the pipeline that travels with a checkpoint, and predict.py, which uses it."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from test_media_inputs import build_processor, tone, write_clip
from test_towers import IMAGE, whisper
from transformers import CLIPVisionConfig, CLIPVisionModel, pipeline

from egmf.data.collator import AffectCollator


ROOT = Path(__file__).resolve().parents[1]
WORDS = ["that is just great", "no", "so"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, llm_folder, assemble):
    """A folder with a checkpoint that has both towers, two clips, a voice and a broken file."""
    folder = tmp_path_factory.mktemp("place")
    processor = build_processor(llm_folder())
    processor.default_task = "meld"
    torch.manual_seed(3)
    towers = {"audio_tower": whisper(), "vision_tower": CLIPVisionModel(CLIPVisionConfig(**IMAGE))}
    model = assemble(**towers, audio_input_rate=100)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    write_clip(folder / "one.mp4")
    write_clip(folder / "two.mp4", 0.4, sound=False, seed=1)
    import soundfile

    soundfile.write(folder / "three.wav", tone(0.3), 16000)
    (folder / "broken.mp4").write_bytes(b"\0" * 500)
    return folder, processor, model


@pytest.fixture(scope="module")
def recognize(place):
    return pipeline("affect-recognition", model=str(place[0] / "model"), trust_remote_code=True)


def predict(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """predict.py from another folder than the repository's."""
    command = [sys.executable, str(ROOT / "predict.py"), "model", *arguments]
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def files(folder: Path) -> list[str]:
    return [str(folder / name) for name in ("one.mp4", "two.mp4", "three.wav")]


def test_answer_has_everything(place, recognize):
    folder, processor, _ = place
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


def test_one_answer_by_every_way(place, recognize):
    """The pipeline alone and in batches, the processor, and a corpus's batch as training and evaluation make it."""
    folder, processor, model = place
    names = files(folder)
    alone = [recognize(name, text=words) for name, words in zip(names, WORDS, strict=True)]
    samples = [{"file": name, "text": words} for name, words in zip(names, WORDS, strict=True)]
    row = {"task": "meld", "context": [], "following": [], "speaker": None, "emotion": "joy", "sentiment": None}
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
    folder = place[0]
    broken = str(folder / "broken.mp4")
    with pytest.raises(Exception, match=r"Cannot read .*broken.mp4") as raised:
        recognize(broken)
    assert raised.type.__name__ == "MediaError"  # the checkpoint's own
    first, second, third = recognize([files(folder)[0], broken, str(folder / "gone.wav")], on_error="report")
    assert first["error"] is None and first["label"]
    for answer in (second, third):
        assert answer["label"] is None and answer["probabilities"] is None and "Cannot read" in answer["error"]


def test_wrong_arguments(recognize):
    with pytest.raises(ValueError, match="wanted text, speaker, context, task, on_error"):
        recognize("clip.mp4", words="so")
    with pytest.raises(ValueError, match="task: wanted one of"):
        recognize({"text": "so"}, task="mood")
    with pytest.raises(ValueError, match=r"a sample got \['words'\]"):
        recognize({"words": "so"})


def test_words_alone(recognize):
    answer = recognize({"text": "that is just great", "context": ["It broke."]})
    assert answer["label"] and answer["seconds"] is None


def test_warnings_that_are_not_of_media_reach_the_user(recognize, place):
    class Clip(type(recognize.processor.load_media(video=files(place[0])[0]).video)):
        told = False  # the first look at a clip, where the pipeline listens for what is missing

        @property
        def frames(self):
            if not self.seeded_collator:
                type(self).told = True
                warnings.warn("old frames", DeprecationWarning, stacklevel=1)
            return vars(self)["frames"]

        @frames.setter
        def frames(self, value):
            vars(self)["frames"] = value

    found = recognize.processor.load_media(video=files(place[0])[0]).video
    clip = Clip(found.frames, found.times, found.duration, found.warnings)
    with pytest.warns(DeprecationWarning, match="old frames"):
        answer = recognize({"text": "so", "video": clip})
    assert answer["warnings"] == []


def test_the_pipelines_model_can_be_saved(recognize, tmp_path):
    """`pipeline()` puts classes into its model's config, which JSON does not hold."""
    recognize.model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["custom_pipelines"]["affect-recognition"]["pt"] == ["AutoModel"]


def test_predict_answers_as_the_pipeline_and_goes_on_past_a_bad_file(place, recognize):
    folder = place[0]
    lines = [
        "file,text,speaker",
        "one.mp4,that is just great,",
        f"{folder / 'two.mp4'},no,",
        "three.wav,so,",
        "broken.mp4,,",
    ]
    (folder / "words.csv").write_text("\n".join(lines), encoding="utf-8")
    names = ["one.mp4", "broken.mp4", str(folder / "two.mp4"), "three.wav"]
    outcome = predict(folder, *names, "--transcripts", "words.csv", "--batch_size", "2")
    assert outcome.returncode == 1, outcome.stderr
    assert outcome.stdout, outcome.stderr
    answers = {Path(answer["file"]).name: answer for answer in map(json.loads, outcome.stdout.splitlines())}
    assert list(answers) == [Path(name).name for name in names]
    assert "Cannot read 'broken.mp4'" in answers["broken.mp4"]["error"]
    for name, words in zip(files(folder), WORDS, strict=True):
        wanted = recognize(name, text=words)
        for label, probability in answers[Path(name).name]["probabilities"].items():
            assert probability == pytest.approx(wanted["probabilities"][label], abs=1e-5)


def test_predict_one_file(place):
    outcome = predict(place[0], "one.mp4", "--text", "so", "--task", "mosei")
    assert outcome.returncode == 0, outcome.stderr
    answer = json.loads(outcome.stdout)
    assert -3 <= answer["score"] <= 3 and answer["interval"][0] <= answer["interval"][1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("name,text\none.mp4,so", "words.csv: no column file"),
        ("file,text\ntwo.mp4,so", "words.csv: got no line for one.mp4"),
        ("file,text\none.mp4,so\none.mp4,no", "words.csv: one.mp4 is there twice"),
    ],
)
def test_faulty_transcripts(tmp_path, lines, message):
    from predict import main

    (tmp_path / "words.csv").write_text(lines)
    with pytest.raises(ValueError, match=message):
        main(["model", "one.mp4", "--transcripts", str(tmp_path / "words.csv")])
